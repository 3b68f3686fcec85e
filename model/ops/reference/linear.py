"""Matrix products. The tiled forms multiply fixed-shape row tiles, so that a row's bits depend on that row alone."""

from collections.abc import Callable

import torch
from torch import Tensor

ROW_TILE = 16
"""Rows of one product in the tiled forms; the last tile is filled with zeros."""


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight_OI)


def linear_fp32(x: Tensor, weight_OI: Tensor) -> Tensor:
    return torch.nn.functional.linear(x.float(), weight_OI.float())


def grouped_linear(x_TGX: Tensor, weight_GOX: Tensor) -> Tensor:
    return torch.bmm(x_TGX.transpose(0, 1), weight_GOX.transpose(1, 2)).transpose(0, 1)


def linear_tiled(x: Tensor, weight_OI: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = map_row_tiles(rows, lambda tile: torch.mm(tile, weight_OI.t()), weight_OI.shape[0])
    return out.view(*x.shape[:-1], -1)


def linear_fp32_tiled(x: Tensor, weight_OI: Tensor) -> Tensor:
    return linear_tiled(x.float(), weight_OI.float())


def grouped_linear_tiled(x_TGX: Tensor, weight_GOX: Tensor) -> Tensor:
    groups = zip(x_TGX.unbind(1), weight_GOX, strict=True)
    return torch.stack([linear_tiled(x.contiguous(), weight) for x, weight in groups], dim=1)


def map_row_tiles(rows_NX: Tensor, function: Callable[[Tensor], Tensor], width: int) -> Tensor:
    """[N, width]: `function` of each tile [ROW_TILE, X] in turn."""
    count = rows_NX.shape[0]
    out = rows_NX.new_empty(count, width)
    for first in range(0, count, ROW_TILE):
        tile = rows_NX[first : first + ROW_TILE]
        present = tile.shape[0]
        if present < ROW_TILE:
            tile = torch.cat([tile, tile.new_zeros(ROW_TILE - present, tile.shape[1])])
        out[first : first + present] = function(tile)[:present]
    return out
