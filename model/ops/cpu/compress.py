"""The compressors' softmax of a whole step at once: all tokens of a window in one pass, then merged with its state."""

import torch
from torch import Tensor

from model.ops.reference.compress import initial_state, store_state
from model.step import CompressPlan


def compress(
    values_TX: Tensor, scores_TX: Tensor, plan: CompressPlan, accumulators: Tensor, *, overlap: bool
) -> Tensor:
    """As the reference, with sums in another order."""
    windows, channels = plan.tokens_GK.shape[0], accumulators.shape[-1]
    slots_B = accumulators.index_select(0, plan.slot_B)
    values_GKX, scores_GKX = _of_windows(values_TX, scores_TX, plan)
    current = initial_state(windows, slots_B[:, 0], plan)
    following = None
    own = slice(channels, None) if overlap else slice(None)
    if overlap:
        carried = initial_state(windows, slots_B[:, 1], plan)
        following = _merge(carried, values_GKX[..., :channels], scores_GKX[..., :channels])
        first_B = current.index_select(1, plan.first_B)
        current = following.roll(1, dims=1).index_copy(1, plan.first_B, first_B)
    current = _merge(current, values_GKX[..., own], scores_GKX[..., own])
    store_state(current, following, plan, accumulators)
    _, weight_sum, weighted = current.index_select(1, plan.emit_windows)
    entries: Tensor = weighted / weight_sum
    return entries


def _of_windows(values_TX: Tensor, scores_TX: Tensor, plan: CompressPlan) -> tuple[Tensor, Tensor]:
    """[G, K, X]; absent tokens have a score of -inf."""
    tokens_GK = plan.tokens_GK
    if tokens_GK.shape[1] == 1:
        return values_TX.unsqueeze(1), scores_TX.unsqueeze(1)
    absent = tokens_GK < 0
    rows = tokens_GK.clamp_min(0).flatten()
    values = values_TX.index_select(0, rows).view(*tokens_GK.shape, -1)
    scores = scores_TX.index_select(0, rows).view(*tokens_GK.shape, -1)
    return values, scores.masked_fill_(absent.unsqueeze(2), float("-inf"))


def _merge(state_3GC: Tensor, values_GKC: Tensor, scores_GKC: Tensor) -> Tensor:
    maximum, weight_sum, weighted = state_3GC
    # Every window has a token in the step, so the new maximum is finite.
    new_maximum = torch.maximum(maximum, scores_GKC.amax(1))
    keep = torch.exp(maximum - new_maximum)
    weights_GKC = torch.exp(scores_GKC - new_maximum.unsqueeze(1))
    weighted = weighted * keep + (weights_GKC * values_GKC).sum(1)
    return torch.stack([new_maximum, weight_sum * keep + weights_GKC.sum(1), weighted])
