"""From logits to tokens, for the whole batch at once. A row's token depends on its logits, its parameters and its own
random number: never on its neighbours.

    raw logits -> logit_bias -> repetition, presence, frequency -> only allowed tokens, no banned ones -> a forced token
               -> temperature 0: the likeliest token, else
               -> temperature -> top_k -> top_p -> min_p -> one draw from what is left

Tokens stand in one order everywhere: higher logit first, ties by lower id. top_k, top_p and min_p each keep a prefix
of that order, so the three together keep the shortest of the prefixes (top_p's mass is taken among top_k's tokens).
The draw inverts the cumulative distribution over the prefix with one uniform number. Log probabilities are those of
the model: log-softmax of the raw logits, before bias, penalties, masks and temperature (as OpenAI reports them); under
a grammar the likeliest tokens may be ones that could not be chosen.

Letters: L rows, V vocabulary, K tokens of a prefix, N rows of a subset.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.plan import NOTHING_LEFT, TokenLogprobs
from engine.runner.penalties import PenaltyCounts

GREEDY_TEMPERATURE = 1e-5
"""Below this a temperature is 0."""
PREFIX_TOKENS = 256
"""Likeliest tokens that are looked at first; a row that needs more is sorted whole. The result is the same."""
SORT_TOKENS = 1024
"""Vocabularies up to this size are sorted whole at once."""
NO_PENALTIES = np.array([[1.0], [0.0], [0.0]])
"""repetition, presence, frequency; a column."""
_TIE_ROOM = 64


@dataclass(slots=True, kw_only=True)
class SamplingBatch:
    """Parameters of L rows on the host, in columns; meanings and ranges as in `SamplingParams`."""

    temperature_L: np.ndarray
    top_k_L: np.ndarray
    """int64; 0: off."""
    top_p_L: np.ndarray
    min_p_L: np.ndarray
    uniform_L: np.ndarray
    """float64 in [0, 1): each row's random number."""
    num_logprobs_L: np.ndarray
    """int64; -1: none."""
    slot_L: np.ndarray
    """Row of the penalty counts."""
    penalties_3L: np.ndarray
    """repetition, presence, frequency."""
    bias_rows_N: np.ndarray
    """int64, ascending; each entry adds `bias_values_N` to one logit."""
    bias_ids_N: np.ndarray
    bias_values_N: np.ndarray
    banned_rows_N: np.ndarray
    """int64, ascending; each entry excludes one token."""
    banned_ids_N: np.ndarray
    allowed_rows_N: np.ndarray
    """int64, ascending; each of these rows chooses among the tokens whose bit is set in"""
    allowed_bits_NW: np.ndarray
    """uint8 [N, ceil(V / 8)], lowest bit first."""
    forced_rows_N: np.ndarray
    """int64, ascending; each of these rows gets the token of"""
    forced_ids_N: np.ndarray

    def __len__(self) -> int:
        return len(self.temperature_L)

    @property
    def penalized_L(self) -> np.ndarray:
        penalized: np.ndarray = (self.penalties_3L != NO_PENALTIES).any(0)
        return penalized

    def rows(self, start: int, stop: int) -> "SamplingBatch":
        bias = slice(*np.searchsorted(self.bias_rows_N, (start, stop)))
        banned = slice(*np.searchsorted(self.banned_rows_N, (start, stop)))
        allowed = slice(*np.searchsorted(self.allowed_rows_N, (start, stop)))
        forced = slice(*np.searchsorted(self.forced_rows_N, (start, stop)))
        return replace(
            self,
            temperature_L=self.temperature_L[start:stop],
            top_k_L=self.top_k_L[start:stop],
            top_p_L=self.top_p_L[start:stop],
            min_p_L=self.min_p_L[start:stop],
            uniform_L=self.uniform_L[start:stop],
            num_logprobs_L=self.num_logprobs_L[start:stop],
            slot_L=self.slot_L[start:stop],
            penalties_3L=self.penalties_3L[:, start:stop],
            bias_rows_N=self.bias_rows_N[bias] - start,
            bias_ids_N=self.bias_ids_N[bias],
            bias_values_N=self.bias_values_N[bias],
            banned_rows_N=self.banned_rows_N[banned] - start,
            banned_ids_N=self.banned_ids_N[banned],
            allowed_rows_N=self.allowed_rows_N[allowed] - start,
            allowed_bits_NW=self.allowed_bits_NW[allowed],
            forced_rows_N=self.forced_rows_N[forced] - start,
            forced_ids_N=self.forced_ids_N[forced],
        )

    def masked(self, rows_N: np.ndarray, mask_NW: np.ndarray, *, vocab_size: int, end: int) -> "SamplingBatch":
        """The same rows with the masks of their grammars, int32 words (bit b of word w is token 32 w + b), on top of
        the tokens that the request allows. `rows_N` ascends.

        Where a mask allows the `end` token alone nothing else can follow, and neither min_tokens nor bad words exclude
        it.
        """
        bits_NW = np.ascontiguousarray(mask_NW).view(np.uint8)[:, : (vocab_size + 7) // 8]
        bits = {int(row): bits_W for row, bits_W in zip(self.allowed_rows_N, self.allowed_bits_NW, strict=True)}
        ended = set()
        for row, bits_W in zip(rows_N.tolist(), bits_NW, strict=True):
            (used,) = np.nonzero(bits_W)
            if used.tolist() == [end >> 3] and bits_W[end >> 3] == 1 << (end & 7):
                ended.add(row)
            bits[row] = bits_W & bits[row] if row in bits else bits_W
        allowed_rows = sorted(bits)
        kept_N = np.array([row not in ended for row in self.banned_rows_N.tolist()], dtype=bool)
        return replace(
            self,
            allowed_rows_N=np.array(allowed_rows, dtype=np.int64),
            allowed_bits_NW=np.stack([bits[row] for row in allowed_rows]),
            banned_rows_N=self.banned_rows_N[kept_N],
            banned_ids_N=self.banned_ids_N[kept_N],
        )


@dataclass(slots=True, kw_only=True)
class Sampled:
    """One token for each row; rows in `failed` have none (theirs is meaningless)."""

    token_ids_L: np.ndarray
    """int64."""
    logprobs_L: list[TokenLogprobs | None]
    failed: dict[int, str]
    """Row -> reason."""


def sample(logits_LV: Tensor, batch: SamplingBatch, counts: PenaltyCounts) -> Sampled:
    """Pick a token for each row of float32 logits, which are left as they are."""
    assert len(batch) == len(logits_LV) and logits_LV.dtype == torch.float32
    sound_L = torch.isfinite(logits_LV.amin(-1)) & torch.isfinite(logits_LV.amax(-1))
    adjusted_LV = _adjust(logits_LV, batch, counts)
    possible_L = sound_L if adjusted_LV is logits_LV else torch.isfinite(adjusted_LV.amax(-1))

    random_N = np.flatnonzero(batch.temperature_L >= GREEDY_TEMPERATURE)
    ids_L = adjusted_LV.argmax(-1) if len(random_N) < len(batch) else torch.zeros_like(sound_L, dtype=torch.int64)
    certain_L = torch.ones_like(sound_L)
    if len(random_N):
        rows_N = _to(random_N, logits_LV)
        # A row that failed would draw garbage; zeros keep it harmless until it is reported.
        some_NV = _take(adjusted_LV, random_N).masked_fill(~(sound_L & possible_L)[rows_N].unsqueeze(-1), 0.0)
        prefix = adjusted_LV.shape[-1] if adjusted_LV.shape[-1] <= SORT_TOKENS else PREFIX_TOKENS
        ids_L[rows_N], certain_L[rows_N] = _draw(some_NV, _draw_parameters(batch, random_N, logits_LV), prefix)

    # The one copy to the host of a usual step.
    ids, sound, possible, certain = (
        torch.stack([ids_L, sound_L.long(), possible_L.long(), certain_L.long()]).cpu().numpy()
    )
    unsure_N = np.flatnonzero((certain == 0) & (sound == 1) & (possible == 1))
    if len(unsure_N):
        parameters = _draw_parameters(batch, unsure_N, logits_LV)
        ids[unsure_N] = _draw(_take(adjusted_LV, unsure_N), parameters, adjusted_LV.shape[-1])[0].cpu().numpy()

    failed = {int(row): "the model's output is not finite" for row in np.flatnonzero(sound == 0)}
    for row in np.flatnonzero((sound == 1) & (possible == 0)):
        failed[int(row)] = NOTHING_LEFT
    return Sampled(token_ids_L=ids, logprobs_L=_logprobs(logits_LV, batch, ids, failed), failed=failed)


def sorted_prefix(x_LV: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `size` tokens of each row, higher value first, ties by lower id.

    Returns values [L, K], ids [L, K] and known [L]: places before `known` are certain; behind it stand tokens that tie
    with tokens outside the prefix.
    """
    if size >= x_LV.shape[-1]:
        values_LV, ids_LV = torch.sort(x_LV, dim=-1, descending=True, stable=True)
        return values_LV, ids_LV, torch.full_like(ids_LV[:, 0], x_LV.shape[-1])
    ids_LK = torch.topk(x_LV, size, dim=-1, sorted=False).indices.sort(dim=-1).values
    values_LK, order_LK = torch.sort(x_LV.gather(-1, ids_LK), dim=-1, descending=True, stable=True)
    last_L1 = values_LK[:, -1:]
    tied_L = (x_LV >= last_L1).sum(-1) > size
    return values_LK, ids_LK.gather(-1, order_LK), torch.where(tied_L, (values_LK > last_L1).sum(-1), size)


def _draw(x_NV: Tensor, parameters: tuple[Tensor, ...], size: int) -> tuple[Tensor, Tensor]:
    """Draw from each row by looking at its first `size` tokens -> ids [N], certain [N].

    A row is certain when those tokens decide it; with `size` = V every row is.
    """
    temperature_N, top_k_N, top_p_N, min_p_N, uniform_N = parameters
    vocab = x_NV.shape[-1]
    values_NK, ids_NK, known_N = sorted_prefix(x_NV, size)
    # softmax works row by row, so a probability has the same bits in any batch; a sum over [1, V] need not.
    probs_NV = torch.softmax((x_NV - values_NK[:, :1]) / temperature_N.float().unsqueeze(-1), dim=-1)
    probs_NK = probs_NV.gather(-1, ids_NK).double()
    cumulative_NK = probs_NK.cumsum(-1)
    width = ids_NK.shape[-1]

    def leading(holds_NK: Tensor) -> Tensor:
        """Length of the prefix where a condition holds; V when its end is not in sight."""
        length_N = holds_NK.sum(-1)
        return torch.where(length_N == width, vocab, length_N) if width < vocab else length_N

    top_k_N = torch.where((top_k_N > 0) & (top_k_N < vocab), top_k_N, vocab)
    has_top_k_N, has_top_p_N, has_min_p_N = top_k_N < vocab, top_p_N < 1.0, min_p_N > 0.0
    top_k_mass_N = cumulative_NK.gather(-1, (top_k_N.clamp(max=width) - 1).unsqueeze(-1)).squeeze(-1)
    mass_N = torch.where(has_top_k_N, top_k_mass_N, 1.0)
    before_NK = torch.nn.functional.pad(cumulative_NK[:, :-1], (1, 0))
    by_top_p_N = leading(before_NK < (top_p_N * mass_N).unsqueeze(-1))
    by_min_p_N = leading(probs_NK >= min_p_N.unsqueeze(-1) * probs_NK[:, :1])
    keep_N = torch.minimum(top_k_N, leading(probs_NK > 0))
    keep_N = torch.where(has_top_p_N, torch.minimum(keep_N, by_top_p_N), keep_N)
    keep_N = torch.where(has_min_p_N, torch.minimum(keep_N, by_min_p_N), keep_N).clamp(min=1)

    filtered_N = has_top_k_N | has_top_p_N | has_min_p_N
    kept_mass_N = cumulative_NK.gather(-1, (keep_N.clamp(max=width) - 1).unsqueeze(-1)).squeeze(-1)
    target_N = uniform_N * torch.where(filtered_N, kept_mass_N, 1.0)
    place_N = (cumulative_NK <= target_N.unsqueeze(-1)).sum(-1)
    if width < vocab:
        inside_N = (keep_N <= known_N) & ~(has_top_p_N & has_top_k_N & (top_k_N > known_N))
        certain_N = torch.where(filtered_N, inside_N, place_N < known_N)
    else:
        certain_N = torch.ones_like(filtered_N)
    place_N = torch.minimum(place_N, keep_N - 1).clamp(max=width - 1)
    return ids_NK.gather(-1, place_N.unsqueeze(-1)).squeeze(-1), certain_N


def _draw_parameters(batch: SamplingBatch, rows_N: np.ndarray, like: Tensor) -> tuple[Tensor, ...]:
    """temperature, top_k (int64), top_p, min_p and the random number of some rows, float64, in one transfer."""
    columns = (batch.temperature_L, batch.top_k_L, batch.top_p_L, batch.min_p_L, batch.uniform_L)
    temperature, top_k, top_p, min_p, uniform = _to(np.stack([c[rows_N].astype(np.float64) for c in columns]), like)
    return temperature, top_k.long(), top_p, min_p, uniform


def _adjust(logits_LV: Tensor, batch: SamplingBatch, counts: PenaltyCounts) -> Tensor:
    """Bias, penalties and masks; a new tensor if there is anything to change."""
    penalized_N = np.flatnonzero(batch.penalized_L)
    changes = (batch.bias_rows_N, penalized_N, batch.banned_rows_N, batch.allowed_rows_N, batch.forced_rows_N)
    if not any(len(rows_N) for rows_N in changes):
        return logits_LV
    adjusted_LV = logits_LV.clone()
    if len(batch.bias_rows_N):
        where = _to(np.stack([batch.bias_rows_N, batch.bias_ids_N]), logits_LV)
        adjusted_LV[where[0], where[1]] += _to(batch.bias_values_N.astype(np.float32), logits_LV)
    if len(penalized_N):
        rows_N = _to(penalized_N, logits_LV)
        adjusted_LV[rows_N] = counts.apply(
            adjusted_LV[rows_N], batch.slot_L[penalized_N], batch.penalties_3L[:, penalized_N]
        )
    if len(batch.banned_rows_N):
        where = _to(np.stack([batch.banned_rows_N, batch.banned_ids_N]), logits_LV)
        adjusted_LV[where[0], where[1]] = float("-inf")
    if len(batch.allowed_rows_N):
        rows_N = _to(batch.allowed_rows_N, logits_LV)
        adjusted_LV[rows_N] = only_allowed(adjusted_LV[rows_N], _to(batch.allowed_bits_NW, logits_LV))
    if len(batch.forced_rows_N):
        where = _to(np.stack([batch.forced_rows_N, batch.forced_ids_N]), logits_LV)
        adjusted_LV[where[0]] = float("-inf")
        # Any finite number: the raw one may have been banned, biased or masked away.
        adjusted_LV[where[0], where[1]] = 0.0
    return adjusted_LV


def only_allowed(logits_NV: Tensor, bits_NW: Tensor) -> Tensor:
    """Logits with minus infinity where a token's bit is not set; bits are uint8 [N, ceil(V / 8)], lowest bit first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits_NW.device)
    allowed_NV = ((bits_NW.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, : logits_NV.shape[-1]]
    return logits_NV.masked_fill(allowed_NV == 0, float("-inf"))


def _logprobs(
    logits_LV: Tensor, batch: SamplingBatch, ids_L: np.ndarray, failed: dict[int, str]
) -> list[TokenLogprobs | None]:
    result: list[TokenLogprobs | None] = [None] * len(batch)
    wanted_N = np.array([row for row in np.flatnonzero(batch.num_logprobs_L >= 0) if row not in failed], dtype=np.int64)
    if not len(wanted_N):
        return result
    raw_NV = _take(logits_LV, wanted_N)
    log_probs_NV = torch.log_softmax(raw_NV, dim=-1)
    chosen_N: list[float] = log_probs_NV.gather(-1, _to(ids_L[wanted_N, None], raw_NV)).squeeze(-1).tolist()
    most = int(min(batch.num_logprobs_L[wanted_N].max(), raw_NV.shape[-1]))
    top_ids_NK, top_NK = _top(raw_NV, log_probs_NV, most)
    for place, row in enumerate(wanted_N):
        n = int(batch.num_logprobs_L[row])
        result[row] = TokenLogprobs(
            logprob=chosen_N[place],
            top_ids=tuple(top_ids_NK[place][:n]),
            top_logprobs=tuple(top_NK[place][:n]),
        )
    return result


def _top(raw_NV: Tensor, log_probs_NV: Tensor, most: int) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and log probabilities of the `most` likeliest tokens of each row."""
    ids_NK = likeliest(raw_NV, most)
    ids: list[list[int]] = ids_NK.tolist()
    log_probs: list[list[float]] = log_probs_NV.gather(-1, ids_NK).tolist()
    return ids, log_probs


def likeliest(x_NV: Tensor, count: int) -> Tensor:
    """Ids [N, count] of the highest values of each row, best first, ties by lower id."""
    if count == 0:
        return torch.empty((len(x_NV), 0), dtype=torch.int64, device=x_NV.device)
    _, ids_NK, known_N = sorted_prefix(x_NV, count + _TIE_ROOM)
    ids_NK = ids_NK[:, :count]
    tied_N = (known_N < count).nonzero().squeeze(-1)
    if len(tied_N):
        ids_NK[tied_N] = sorted_prefix(x_NV[tied_N], x_NV.shape[-1])[1][:, :count]
    return ids_NK


def _take(x_LV: Tensor, rows_N: np.ndarray) -> Tensor:
    return x_LV if len(rows_N) == len(x_LV) else x_LV[_to(rows_N, x_LV)]


def _to(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device)
