"""The parts of the network that are many small ops on big tensors, as pure functions, so that a compiler can fuse them.

`Pieces` holds each either plain or compiled; parameters are arguments, so one compilation serves all layers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.reference.activation import sigmoid, softplus, swiglu
from model.ops.reference.hyper import sinkhorn
from model.ops.reference.norm import rms_norm


def mixes(x_BSMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float) -> Tensor:
    """A site's projections of the streams, normalised, scaled and shifted; fp32 [B, S, outputs]."""
    with torch.autocast(x_BSMD.device.type, enabled=False):
        flat = x_BSMD.float().flatten(2)
        mix = F.linear(flat, fn) * (flat.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
        return mix * scale + base


def pre(
    x_BSMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, norm_eps: float, eps: float, iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised input [B, S, D] of a sub-layer, post [B, S, M] and comb [B, S, M, M]."""
    m = x_BSMD.shape[2]
    mix = mixes(x_BSMD, fn, base, scale, norm_eps)
    comb = sinkhorn(mix[..., 2 * m :].unflatten(-1, (m, m)).flatten(0, 1), iters, eps).unflatten(0, mix.shape[:2])
    a_BSD = ((sigmoid(mix[..., :m]) + eps).unsqueeze(-1) * x_BSMD).sum(2)
    return rms_norm(a_BSD, norm, norm_eps), 2 * sigmoid(mix[..., m : 2 * m]), comb


def post(y_BSD: Tensor, x_BSMD: Tensor, post_BSM: Tensor, comb_BSMM: Tensor) -> Tensor:
    """Stream k becomes post_k * y plus the sum over j of comb[j, k] * stream j."""
    out = post_BSM.unsqueeze(-1) * y_BSD.float().unsqueeze(2)
    for j in range(x_BSMD.shape[2]):
        out = out + comb_BSMM[:, :, j, :, None] * x_BSMD[:, :, j, None]
    return out.to(x_BSMD.dtype)


def collapse(
    x_BSMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, norm_eps: float, eps: float
) -> Tensor:
    """What a head reads: the streams weighted, summed and normalised; [B, S, D]."""
    weights = sigmoid(mixes(x_BSMD, fn, base, scale, norm_eps)) + eps
    return rms_norm((weights.unsqueeze(-1) * x_BSMD).sum(2), norm, norm_eps)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary channels (the last ones, interleaved pairs) turned; not in place."""
    width = 2 * cos.shape[-1]
    still, tail = x[..., : x.shape[-1] - width], x[..., x.shape[-1] - width :].float()
    first, second = tail.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return torch.cat([still, pairs.flatten(-2).to(x.dtype)], dim=-1)


def softmax(near_BQHK: Tensor, near_mask: Tensor, far_BQHE: Tensor, far_mask: Tensor, sink_H: Tensor) -> Tensor:
    """fp32 [B, Q, H, K + 1 + E]: one softmax over window rows, sink and entries. Masks: bool [B, Q, K], [B, Q, E]."""
    near = near_BQHK.float().masked_fill(~near_mask.unsqueeze(2), float("-inf"))
    far = far_BQHE.float().masked_fill(~far_mask.unsqueeze(2), float("-inf"))
    sink = sink_H.view(1, 1, -1, 1).expand(*near.shape[:3], 1)
    return torch.cat([near, sink, far], dim=3).softmax(3)


def index_scores(q_BQIJ: Tensor, weights_BQI: Tensor, keys_BEJ: Tensor) -> Tensor:
    """fp32 [B, Q, E]: sum over heads of weight * relu(q . key)."""
    products = q_BQIJ.flatten(1, 2) @ keys_BEJ.to(q_BQIJ.dtype).transpose(1, 2)
    products = products.unflatten(1, q_BQIJ.shape[1:3]).relu()
    weighted: Tensor = products.float() * weights_BQI.float().unsqueeze(3)
    return weighted.sum(2)


def route(
    x_BSD: Tensor, gate: Tensor, ids_BSA: Tensor | None, bias_E: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    """Weights [B, S, E] of all experts (0 of those not chosen, before scaling), and which are chosen, fp32 0 or 1.

    Either `ids_BSA` says who is chosen, or the `count` best are by score plus `bias_E`.
    """
    with torch.autocast(x_BSD.device.type, enabled=False):
        scores_BSE = softplus(F.linear(x_BSD.float(), gate)).sqrt()
    if ids_BSA is None:
        assert bias_E is not None
        ids_BSA = (scores_BSE.detach() + bias_E).topk(count, dim=2).indices
    chosen = torch.zeros_like(scores_BSE).scatter(2, ids_BSA, 1.0)
    weights_BSE = scores_BSE * chosen
    return weights_BSE / (weights_BSE.sum(2, keepdim=True) + 1e-20), chosen


def experts(x_BSD: Tensor, weights_BSE: Tensor, w13: Tensor, w2: Tensor, limit: float) -> Tensor:
    """Every expert computes every token, and the unchosen ones count nothing: they are few and small."""
    gate_up = F.linear(x_BSD, w13.flatten(0, 2)).unflatten(2, w13.shape[:3])
    h = swiglu(gate_up[..., 0, :], gate_up[..., 1, :], limit)
    h = (h.float() * weights_BSE.unsqueeze(3)).to(h.dtype).flatten(2)
    return F.linear(h, w2.transpose(0, 1).flatten(1))


@dataclass(slots=True)
class Pieces:
    """The functions of this file as the network calls them."""

    pre: Callable[..., tuple[Tensor, Tensor, Tensor]] = pre
    post: Callable[..., Tensor] = post
    collapse: Callable[..., Tensor] = collapse
    turned: Callable[..., Tensor] = turned
    softmax: Callable[..., Tensor] = softmax
    index_scores: Callable[..., Tensor] = index_scores
    route: Callable[..., tuple[Tensor, Tensor]] = route
    experts: Callable[..., Tensor] = experts

    @classmethod
    def compiled(cls) -> "Pieces":
        """Each fused by torch.compile, once for each shape."""
        return cls(
            pre=torch.compile(pre, dynamic=False),
            post=torch.compile(post, dynamic=False),
            collapse=torch.compile(collapse, dynamic=False),
            turned=torch.compile(turned, dynamic=False),
            softmax=torch.compile(softmax, dynamic=False),
            index_scores=torch.compile(index_scores, dynamic=False),
            route=torch.compile(route, dynamic=False),
            experts=torch.compile(experts, dynamic=False),
        )
