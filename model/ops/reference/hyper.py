"""Hyper-connections: collapse the residual streams before a sub-layer, spread its output after (architecture, 2.2)."""

from torch import Tensor

from model.ops.reference.activation import sigmoid
from model.ops.registry import LinearOp


def _mixes(x_TMD: Tensor, fn: Tensor, norm_eps: float, linear: LinearOp) -> tuple[Tensor, Tensor]:
    """fp32 streams and the site's normalised projections [T, outputs]."""
    wide = x_TMD.float()
    flat = wide.flatten(1)
    return wide, linear(flat, fn) * (flat.square().mean(-1, keepdim=True) + norm_eps).rsqrt()


def sinkhorn(logits_TMM: Tensor, iters: int, eps: float) -> Tensor:
    """Nearly doubly stochastic [T, M, M]: softmax over destinations, then columns and rows normalised in turn.

    The first and the last normalisation are of columns (sums over sources); `iters` column normalisations in all.
    """
    comb = logits_TMM.softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb


def _collapse(wide_TMD: Tensor, weights_TM: Tensor) -> Tensor:
    out = wide_TMD[:, 0] * weights_TM[:, 0, None]
    for m in range(1, wide_TMD.shape[1]):
        out = out + wide_TMD[:, m] * weights_TM[:, m, None]
    return out


def hyper_pre(
    x_TMD: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    iters: int,
    eps: float,
    norm_eps: float,
    linear: LinearOp,
) -> tuple[Tensor, Tensor, Tensor]:
    m = x_TMD.shape[1]
    wide_TMD, mix = _mixes(x_TMD, fn, norm_eps, linear)
    mix = mix * scale + base
    pre, post = sigmoid(mix[:, :m]) + eps, 2 * sigmoid(mix[:, m : 2 * m])
    comb = sinkhorn(mix[:, 2 * m :].reshape(-1, m, m), iters, eps)
    return _collapse(wide_TMD, pre).to(x_TMD.dtype), post, comb


def hyper_post(y_TD: Tensor, x_TMD: Tensor, post_TM: Tensor, comb_TMM: Tensor) -> Tensor:
    """Stream k becomes post_k * y plus the sum over j of comb[j, k] * stream j."""
    wide_TMD = x_TMD.float()
    out = post_TM.unsqueeze(-1) * y_TD.float().unsqueeze(1)
    for j in range(x_TMD.shape[1]):
        out = out + comb_TMM[:, j, :, None] * wide_TMD[:, j, None]
    return out.to(x_TMD.dtype)


def hyper_head(
    x_TMD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, eps: float, norm_eps: float, linear: LinearOp
) -> Tensor:
    wide_TMD, mix = _mixes(x_TMD, fn, norm_eps, linear)
    return _collapse(wide_TMD, sigmoid(mix * scale + base) + eps).to(x_TMD.dtype)
