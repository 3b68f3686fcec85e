"""Hyper-connections in tiles of tokens whose fp32 streams stay in the cache."""

import torch
from torch import Tensor

from model.ops.reference.activation import sigmoid

_TILE_ELEMENTS = 1 << 17
"""fp32 elements of one tile of streams."""


def sinkhorn(logits_TMM: Tensor, iters: int, eps: float) -> Tensor:
    """As the reference; sums over rows and columns are products with a matrix of zeros and ones."""
    tokens, m, _ = logits_TMM.shape
    eye, ones = torch.eye(m, device=logits_TMM.device), torch.ones(m, m, device=logits_TMM.device)
    row_sums, column_sums = torch.kron(eye, ones), torch.kron(ones, eye)
    bias = logits_TMM.new_full((m * m,), eps)
    comb = (logits_TMM.softmax(-1) + eps).view(tokens, m * m)
    comb.div_(torch.addmm(bias, comb, column_sums))
    for _ in range(iters - 1):
        comb.div_(torch.addmm(bias, comb, row_sums))
        comb.div_(torch.addmm(bias, comb, column_sums))
    return comb.view(tokens, m, m)


def hyper_pre(
    x_TMD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, iters: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    m = x_TMD.shape[1]
    a_TD, mix = _collapse(x_TMD, fn, scale, base, eps, norm_eps)
    comb = sinkhorn(mix[:, 2 * m :].reshape(-1, m, m), iters, eps)
    return a_TD, 2 * sigmoid(mix[:, m : 2 * m]), comb


def hyper_head(x_TMD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, eps: float, norm_eps: float) -> Tensor:
    return _collapse(x_TMD, fn, scale, base, eps, norm_eps)[0]


def _collapse(
    x_TMD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor]:
    """Streams summed by the first M outputs of the site, and all its outputs before their nonlinearity."""
    tokens, m, width = x_TMD.shape
    a_TD = x_TMD.new_empty(tokens, width)
    mix = fn.new_empty(tokens, fn.shape[0])
    for part in _tiles(tokens, m * width):
        wide = x_TMD[part].float()
        flat = wide.flatten(1)
        norm = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        factor = (norm.square_().div_(m * width).add_(norm_eps)).rsqrt_()
        out = torch.addcmul(base, torch.mm(flat, fn.t()).mul_(factor), scale, out=mix[part])
        pre = sigmoid(out[:, :m]).add_(eps)
        a_TD[part] = torch.bmm(pre.unsqueeze(1), wide).squeeze(1)
    return a_TD, mix


def hyper_post(y_TD: Tensor, x_TMD: Tensor, post_TM: Tensor, comb_TMM: Tensor) -> Tensor:
    """One product with [comb transposed | post] for each token over its streams and the sub-layer's output."""
    tokens, m, width = x_TMD.shape
    coefficients = torch.cat([comb_TMM.transpose(1, 2), post_TM.unsqueeze(2)], dim=2)
    out = torch.empty_like(x_TMD)
    for part in _tiles(tokens, m * width):
        wide = coefficients.new_empty(part.stop - part.start, m + 1, width)
        wide[:, :m] = x_TMD[part]
        wide[:, m] = y_TD[part]
        out[part] = torch.bmm(coefficients[part], wide)
    return out


def _tiles(tokens: int, elements: int) -> list[slice]:
    size = max(1, _TILE_ELEMENTS // elements)
    return [slice(first, min(first + size, tokens)) for first in range(0, tokens, size)]
