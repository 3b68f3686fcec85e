"""Routed experts with all activations of the step in one buffer, sorted by expert."""

import torch
from torch import Tensor

from model.ops.expert_bank import ExpertBank
from model.ops.reference.activation import swiglu
from model.ops.reference.moe import sum_choices


def experts(x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor, bank: ExpertBank, *, weight_first: bool) -> Tensor:
    """As the reference; the weighted sum over a token's choices is a product of its own."""
    tokens, choices = ids_TA.shape
    order = ids_TA.flatten().argsort()
    counts = torch.bincount(ids_TA.flatten(), minlength=bank.start + bank.length).tolist()
    first = sum(counts[: bank.start])
    groups = []
    for expert, count in enumerate(counts[bank.start : bank.start + bank.length]):
        if count:
            groups.append((expert, first, first + count))
        first += count
    x_ND = bank.round_activations(x_TD.index_select(0, torch.div(order, choices, rounding_mode="floor")))
    h_NF: Tensor | None = None
    for expert, start, stop in groups:
        weight = bank.gate_up(expert)
        if h_NF is None:
            h_NF = x_TD.new_empty(tokens * choices, weight.shape[0])
        torch.mm(x_ND[start:stop], weight.t(), out=h_NF[start:stop])
    y_ND = torch.zeros_like(x_ND) if sum(g[2] - g[1] for g in groups) < tokens * choices else torch.empty_like(x_ND)
    if h_NF is not None:
        gate, up = h_NF.chunk(2, dim=-1)
        if weight_first:
            weights_N1 = weights_TA.flatten().index_select(0, order).unsqueeze(1)
            a_NF = (swiglu(gate.float(), up.float(), bank.limit) * weights_N1).to(x_TD.dtype)
        else:
            a_NF = swiglu(gate, up, bank.limit)
        a_NF = bank.round_activations(a_NF)
        for expert, start, stop in groups:
            torch.mm(a_NF[start:stop], bank.down(expert).t(), out=y_ND[start:stop])
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    y_TAD = y_ND.index_select(0, back).view(tokens, choices, -1)
    if weight_first:
        return sum_choices(y_TAD.float())
    return torch.bmm(weights_TA.unsqueeze(1), y_TAD.float()).squeeze(1)
