"""Online softmax of the compressors, one token at a time in position order (architecture, 2.4).

The order of additions is a property of the positions alone, so that chunks of any size give the same bits.
"""

import torch
from torch import Tensor

from model.step import CompressPlan


def fold(state_3GC: Tensor, values_GC: Tensor, scores_GC: Tensor) -> Tensor:
    """One more term for each window; a score of -inf leaves the state as it is, to the bit.

    State: running maximum, sum of weights, weighted sum; fp32. An empty softmax is (-inf, 0, 0).
    """
    maximum, weight_sum, weighted = state_3GC
    new_maximum = torch.maximum(maximum, scores_GC)
    # An empty state that stays empty would compute -inf minus -inf.
    reference = new_maximum.masked_fill(new_maximum == float("-inf"), 0.0)
    keep, weight = torch.exp(maximum - reference), torch.exp(scores_GC - reference)
    return torch.stack([new_maximum, weight_sum * keep + weight, weighted * keep + values_GC * weight])


def _fold_windows(state_3GC: Tensor, values_TC: Tensor, scores_TC: Tensor, tokens_GK: Tensor) -> Tensor:
    for tokens_G in tokens_GK.unbind(1):
        rows = tokens_G.clamp_min(0)
        scores = scores_TC.index_select(0, rows).masked_fill((tokens_G < 0).unsqueeze(1), float("-inf"))
        state_3GC = fold(state_3GC, values_TC.index_select(0, rows), scores)
    return state_3GC


def initial_state(windows: int, accumulators_B3C: Tensor, plan: CompressPlan) -> Tensor:
    """[3, G, C]: each request's first window goes on from its slot, the others start empty."""
    state = accumulators_B3C.new_zeros(3, windows, accumulators_B3C.shape[-1])
    state[0] = float("-inf")
    state.index_copy_(1, plan.first_B, accumulators_B3C.transpose(0, 1))
    return state


def compress(
    values_TX: Tensor, scores_TX: Tensor, plan: CompressPlan, accumulators: Tensor, *, overlap: bool
) -> Tensor:
    """Fold the step's tokens, update `accumulators` [slots, parts, 3, C] in place, return entries [E, C] fp32.

    `values_TX`, `scores_TX`: fp32 [T, C], or [T, 2C] with overlap: first the share in the next window's entry, then
    the share in the token's own. Scores carry the position bias already.
    """
    windows, channels = plan.tokens_GK.shape[0], accumulators.shape[-1]
    slots_B = accumulators.index_select(0, plan.slot_B)
    own = slice(channels, None) if overlap else slice(None)
    current = initial_state(windows, slots_B[:, 0], plan)
    following = None
    if overlap:
        carried = initial_state(windows, slots_B[:, 1], plan)
        following = _fold_windows(carried, values_TX[:, :channels], scores_TX[:, :channels], plan.tokens_GK)
        # A window that is not its request's first starts from the overlap of the window before it.
        first_B = current.index_select(1, plan.first_B)
        current = following.roll(1, dims=1).index_copy(1, plan.first_B, first_B)
    current = _fold_windows(current, values_TX[:, own], scores_TX[:, own], plan.tokens_GK)
    store_state(current, following, plan, accumulators)
    _, weight_sum, weighted = current.index_select(1, plan.emit_windows)
    entries: Tensor = weighted / weight_sum
    return entries


def store_state(current: Tensor, following: Tensor | None, plan: CompressPlan, accumulators: Tensor) -> None:
    """A completed window is over: the overlap becomes the entry in progress, and what follows it is empty."""
    last_B3C = current.index_select(1, plan.last_B).transpose(0, 1)
    empty_B3C = torch.zeros_like(last_B3C)
    empty_B3C[:, 0] = float("-inf")
    completes = plan.completes_B[:, None, None]
    if following is None:
        accumulators[plan.slot_B] = torch.where(completes, empty_B3C, last_B3C).unsqueeze(1)
        return
    next_B3C = following.index_select(1, plan.last_B).transpose(0, 1)
    accumulators[plan.slot_B] = torch.stack(
        [torch.where(completes, next_B3C, last_B3C), torch.where(completes, empty_B3C, next_B3C)], dim=1
    )
