"""What the runner remembers between steps of each request, in columns by slot.

The table is told of a request once (`NewRequest`) and then follows the plans: pages are appended, sampled tokens are
appended, and the row is forgotten when a plan says so. Adding a request rewrites every column of its slot.
"""

import numpy as np

from engine.messages import ForcedToken, SamplingParams, unpack_ids
from engine.plan import NewRequest
from engine.runner.penalties import PenaltyCounts
from engine.runner.philox import uniform
from engine.runner.sampler import GREEDY_TEMPERATURE, NO_PENALTIES, SamplingBatch

_FIRST_PAGES = 16
_SPARE_TOKENS = 256


class RequestTable:
    """Rows of at most `num_slots` requests with at most `max_pages` pages each."""

    def __init__(self, *, num_slots: int, max_pages: int, eos_token_id: int, counts: PenaltyCounts) -> None:
        self.counts = counts
        self.page_ids_SP = np.zeros((num_slots, min(_FIRST_PAGES, max_pages)), dtype=np.int32)
        """Page ids of each slot; 0 past its own pages. Columns are added as requests grow."""
        self.num_pages_S = np.zeros(num_slots, dtype=np.int64)
        self.num_tokens_S = np.zeros(num_slots, dtype=np.int64)
        """Tokens known: prompt and output."""
        self.num_computed_S = np.zeros(num_slots, dtype=np.int64)
        """Tokens that the slot stands behind; -1 while a resumed request's slot is neither restored nor replayed."""
        self._max_pages = max_pages
        self._eos_token_id = eos_token_id
        self._slots: dict[str, int] = {}
        self._owners: list[str | None] = [None] * num_slots
        self._tokens: list[np.ndarray] = [np.empty(0, dtype=np.int32)] * num_slots
        self._num_prompt_S = np.zeros(num_slots, dtype=np.int64)
        self._temperature_S = np.zeros(num_slots)
        self._top_k_S = np.zeros(num_slots, dtype=np.int64)
        self._top_p_S = np.ones(num_slots)
        self._min_p_S = np.zeros(num_slots)
        self._seed_S = np.zeros(num_slots, dtype=np.uint64)
        self._penalties_3S = np.zeros((3, num_slots))
        self._num_logprobs_S = np.full(num_slots, -1, dtype=np.int64)
        self._min_tokens_S = np.zeros(num_slots, dtype=np.int64)
        no_ids, no_values = np.empty(0, dtype=np.int64), np.empty(0)
        self._bias: list[tuple[np.ndarray, np.ndarray]] = [(no_ids, no_values)] * num_slots
        self._stop_ids: list[np.ndarray] = [no_ids] * num_slots
        self._bad_words: list[dict[int, list[np.ndarray]]] = [{}] * num_slots
        """Bad words by the token before their last one; -1: words of one token."""
        self._allowed: list[np.ndarray | None] = [None] * num_slots
        """Bits of the allowed tokens; None: all."""
        self._forced: list[ForcedToken | None] = [None] * num_slots
        """None too once its condition cannot come true any more."""
        self.num_prompt_logprobs_S = np.full(num_slots, -1, dtype=np.int64)
        """-1: none."""

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, request_id: str) -> int:
        return self._slots[request_id]

    def add(self, new: NewRequest) -> None:
        """Take a request in; its slot must be free."""
        slot, sampling, known = new.slot, new.sampling, len(new.token_ids)
        assert new.request_id not in self._slots, f"{new.request_id} is new twice"
        assert self._owners[slot] is None, f"slot {slot} belongs to {self._owners[slot]}"
        assert known >= new.num_prompt_tokens >= 1
        assert 0 <= new.num_computed_tokens < known, "a resumed request computes at least its last known token"
        self._slots[new.request_id] = slot
        self._owners[slot] = new.request_id
        tokens = np.empty(known + min(sampling.max_tokens, _SPARE_TOKENS), dtype=np.int32)
        tokens[:known] = new.token_ids
        self._tokens[slot] = tokens
        self.num_tokens_S[slot] = known
        self.num_computed_S[slot] = -1 if new.num_computed_tokens else 0
        self._num_prompt_S[slot] = new.num_prompt_tokens
        self.page_ids_SP[slot] = 0
        self.num_pages_S[slot] = 0
        self._set_sampling(slot, sampling)
        for token_id in new.token_ids[new.num_prompt_tokens :].tolist():
            self._see(slot, token_id)
        if (self._penalties_3S[:, [slot]] != NO_PENALTIES).any():
            self.counts.start(slot, new.token_ids, new.num_prompt_tokens)

    def _set_sampling(self, slot: int, sampling: SamplingParams) -> None:
        # The engine draws a seed for every request; a greedy one never looks at it.
        assert sampling.seed is not None or sampling.temperature < GREEDY_TEMPERATURE, "a request without a seed"
        self._temperature_S[slot] = sampling.temperature
        self._top_k_S[slot] = sampling.top_k
        self._top_p_S[slot] = sampling.top_p
        self._min_p_S[slot] = sampling.min_p
        self._seed_S[slot] = (sampling.seed or 0) % 2**64
        self._penalties_3S[:, slot] = (
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        )
        self._num_logprobs_S[slot] = -1 if sampling.logprobs is None else sampling.logprobs
        self._min_tokens_S[slot] = sampling.min_tokens
        self._bias[slot] = (
            np.fromiter(sampling.logit_bias.keys(), dtype=np.int64),
            np.fromiter(sampling.logit_bias.values(), dtype=np.float64),
        )
        self._stop_ids[slot] = np.array(sorted({self._eos_token_id, *sampling.stop_token_ids}), dtype=np.int64)
        self.num_prompt_logprobs_S[slot] = -1 if sampling.prompt_logprobs is None else sampling.prompt_logprobs
        words: dict[int, list[np.ndarray]] = {}
        for word in sampling.bad_words:
            words.setdefault(word[-2] if len(word) > 1 else -1, []).append(np.array(word, dtype=np.int32))
        self._bad_words[slot] = words
        self._forced[slot] = sampling.forced_token
        self._allowed[slot] = None
        if sampling.allowed_token_ids is not None:
            allowed_V = np.zeros(self.counts.vocab_size, dtype=bool)
            allowed_V[unpack_ids(sampling.allowed_token_ids)] = True
            self._allowed[slot] = np.packbits(allowed_V, bitorder="little")

    def _see(self, slot: int, token_id: int) -> None:
        """A generated token may settle that no token is forced any more."""
        forced = self._forced[slot]
        if forced is not None and (token_id == forced.token_id or token_id in forced.unless):
            self._forced[slot] = None

    def remove(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored (the only step they were planned for may have failed)."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._owners[slot] = None
            self._tokens[slot] = np.empty(0, dtype=np.int32)

    def append_pages(self, slot: int, page_ids: tuple[int, ...]) -> None:
        first = int(self.num_pages_S[slot])
        last = first + len(page_ids)
        assert last <= self._max_pages, f"slot {slot}: {last} pages, at most {self._max_pages}"
        columns = self.page_ids_SP.shape[1]
        if last > columns:
            grown = min(max(last, 2 * columns), self._max_pages)
            self.page_ids_SP = np.pad(self.page_ids_SP, ((0, 0), (0, grown - columns)))
        self.page_ids_SP[slot, first:last] = page_ids
        self.num_pages_S[slot] = last

    def append_tokens(self, slots_N: np.ndarray, token_ids_N: np.ndarray) -> None:
        """One sampled token for each of these slots."""
        for slot, token_id in zip(slots_N.tolist(), token_ids_N.tolist(), strict=True):
            count = int(self.num_tokens_S[slot])
            if count == len(self._tokens[slot]):
                spare = np.empty(max(_SPARE_TOKENS, count // 4), dtype=np.int32)
                self._tokens[slot] = np.concatenate([self._tokens[slot], spare])
            self._tokens[slot][count] = token_id
            self._see(slot, token_id)
        self.num_tokens_S[slots_N] += 1
        counted = (self._penalties_3S[:, slots_N] != NO_PENALTIES).any(0)
        if counted.any():
            self.counts.add(slots_N[counted], token_ids_N[counted])

    def num_prompt_tokens(self, slots_N: np.ndarray) -> np.ndarray:
        """int64 [N]."""
        lengths: np.ndarray = self._num_prompt_S[slots_N]
        return lengths

    def token_ids(self, slot: int, start: int, stop: int) -> np.ndarray:
        """int32 view of tokens start .. stop, all of them known."""
        assert stop <= self.num_tokens_S[slot], f"slot {slot}: token {stop} of {self.num_tokens_S[slot]}"
        return self._tokens[slot][start:stop]

    def sampling(self, slots_L: np.ndarray) -> SamplingBatch:
        """Parameters of the rows that sample now; the token to come stands at position `num_tokens` of its request."""
        positions_L = self.num_tokens_S[slots_L]
        biases = [self._bias[slot] for slot in slots_L]
        young_L = positions_L - self._num_prompt_S[slots_L] < self._min_tokens_S[slots_L]
        banned = [self._banned(slot, young) for slot, young in zip(slots_L, young_L, strict=True)]
        rows_L = np.arange(len(slots_L))
        allowed = [(row, bits) for row, slot in enumerate(slots_L) if (bits := self._allowed[slot]) is not None]
        forced = [(row, token_id) for row, slot in enumerate(slots_L) if (token_id := self._due(slot)) is not None]
        return SamplingBatch(
            temperature_L=self._temperature_S[slots_L],
            top_k_L=self._top_k_S[slots_L],
            top_p_L=self._top_p_S[slots_L],
            min_p_L=self._min_p_S[slots_L],
            uniform_L=uniform(self._seed_S[slots_L], positions_L),
            num_logprobs_L=self._num_logprobs_S[slots_L],
            slot_L=slots_L,
            penalties_3L=self._penalties_3S[:, slots_L],
            bias_rows_N=np.repeat(rows_L, [len(ids) for ids, _ in biases]),
            bias_ids_N=np.concatenate([ids for ids, _ in biases]),
            bias_values_N=np.concatenate([values for _, values in biases]),
            banned_rows_N=np.repeat(rows_L, [len(ids) for ids in banned]),
            banned_ids_N=np.concatenate(banned),
            allowed_rows_N=np.array([row for row, _ in allowed], dtype=np.int64),
            allowed_bits_NW=np.stack([bits for _, bits in allowed]) if allowed else np.empty((0, 0), dtype=np.uint8),
            forced_rows_N=np.array([row for row, _ in forced], dtype=np.int64),
            forced_ids_N=np.array([token_id for _, token_id in forced], dtype=np.int64),
        )

    def _banned(self, slot: int, young: bool) -> np.ndarray:
        """int64 ids that may not come next: stop ids while the answer is young, and what would complete a bad word."""
        banned = self._stop_ids[slot] if young else self._stop_ids[slot][:0]
        words = self._bad_words[slot]
        if not words:
            return banned
        output = self._tokens[slot][self._num_prompt_S[slot] : self.num_tokens_S[slot]]
        last = [word[-1] for word in words.get(-1, ())]
        for word in words.get(int(output[-1]), ()) if len(output) else ():
            if len(word) - 1 <= len(output) and (output[1 - len(word) :] == word[:-1]).all():
                last.append(word[-1])
        return np.concatenate([banned, np.array(last, dtype=np.int64)])

    def _due(self, slot: int) -> int | None:
        """The token that must come next, if there is one."""
        forced = self._forced[slot]
        if forced is None or self.num_tokens_S[slot] - self._num_prompt_S[slot] < forced.after:
            return None
        return forced.token_id
