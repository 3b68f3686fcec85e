"""Routing and routed experts (architecture, 2.7)."""

import torch
from torch import Tensor

from model.ops.expert_bank import ExpertBank
from model.ops.reference.activation import softplus, swiglu
from model.ops.reference.topk import select
from model.ops.registry import LinearOp


def _normalised(scores_TA: Tensor, scaling: float) -> Tensor:
    # A floor far below any score: softplus never reaches it unless a logit is about -90.
    return scores_TA / (scores_TA.sum(-1, keepdim=True) + 1e-20) * scaling


def _scores(logits_TE: Tensor) -> Tensor:
    return softplus(logits_TE).sqrt()


def score_route(logits_TE: Tensor, bias_E: Tensor, count: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Ids [T, A] of the best biased scores, ascending, and the unbiased scores normalised over them, times `scaling`.

    Ties go to the lower id.
    """
    scores_TE = _scores(logits_TE)
    ids_TA = select(scores_TE + bias_E, count)
    return ids_TA, _normalised(scores_TE.gather(1, ids_TA), scaling)


def hash_route(logits_TE: Tensor, ids_TA: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Given ids, weighted like `score_route`."""
    return ids_TA, _normalised(_scores(logits_TE.gather(1, ids_TA)), scaling)


def experts(
    x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor, bank: ExpertBank, *, weight_first: bool, linear: LinearOp
) -> Tensor:
    """Tokens grouped by expert; a token's outputs are summed in the order of its choices.

    `weight_first` multiplies the routing weight into the activation before w2, as the reference does; otherwise it
    multiplies w2's output in fp32.
    """
    tokens, choices = ids_TA.shape
    local = ids_TA.flatten() - bank.start
    out = x_TD.new_zeros(tokens * choices, x_TD.shape[1], dtype=torch.float32)
    for expert in torch.unique(local).tolist():
        if not 0 <= expert < bank.length:
            continue
        pairs = (local == expert).nonzero().squeeze(1)
        x = bank.round_activations(x_TD.index_select(0, pairs // choices))
        gate, up = linear(x, bank.gate_up(expert)).chunk(2, dim=-1)
        weight = weights_TA.flatten().index_select(0, pairs).unsqueeze(1)
        if weight_first:
            h = (swiglu(gate.float(), up.float(), bank.limit) * weight).to(x.dtype)
            y = linear(bank.round_activations(h), bank.down(expert)).float()
        else:
            y = linear(swiglu(gate, up, bank.limit), bank.down(expert)).float() * weight
        out[pairs] = y
    return sum_choices(out.view(tokens, choices, -1))


def sum_choices(out_TAD: Tensor) -> Tensor:
    total = out_TAD[:, 0]
    for choice in out_TAD.unbind(1)[1:]:
        total = total + choice
    return total
