"""Rotary positions on the last channels, interleaved pairs (architecture, 1.4)."""

import torch
from torch import Tensor


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor], *, inverse: bool = False) -> Tensor:
    """Turn pair (2i, 2i + 1) of the rotary channels of x [N, C] or [N, H, C] by its row's angle, in place.

    `inverse` turns back. Products in fp32, rounded once.
    """
    cos, sin = rotation
    if x.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if inverse:
        sin = -sin
    tail = x[..., x.shape[-1] - 2 * cos.shape[-1] :]
    first, second = torch.unflatten(tail.float(), -1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    tail.copy_(turned.flatten(-2))
    return x
