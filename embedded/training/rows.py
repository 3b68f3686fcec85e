"""Rows of packed examples as the network sees them: positions, who sees whom, and what is predicted with what weight.

An example starts at a multiple of BLOCK of its row, so neither a window of a compressor nor a block belongs to two.
Letters as in the model, and B rows, S tokens of a row, N blocks of a row, Q queries of a piece.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
"""Tokens: the window, and what an HCA entry covers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Packed examples on one device."""

    ids_BS: Tensor
    """int64."""
    weights_BS: Tensor
    """fp32: what predicting this token counts in the loss."""
    starts_BS: Tensor
    """int64: where the example of each token begins in its row."""
    positions_BS: Tensor
    """int64: 0 at the start of an example. It may jump at a multiple of BLOCK: distances of a long context in a short
    one."""

    @classmethod
    def of(cls, ids_BS: Tensor, weights_BS: Tensor, starts_BS: Tensor, jumps_BN: Tensor | None = None) -> "Rows":
        """`jumps_BN`: tokens left out before a block; those in front of an example's first block are ignored."""
        tokens = ids_BS.shape[1]
        assert tokens % BLOCK == 0, f"rows are made of blocks of {BLOCK} tokens"
        positions = torch.arange(tokens, device=ids_BS.device) - starts_BS
        if jumps_BN is not None:
            first = starts_BS[:, ::BLOCK] // BLOCK
            total = jumps_BN.cumsum(1)
            within = total - total.gather(1, first)
            positions = positions + within.repeat_interleave(BLOCK, dim=1)
        return cls(ids_BS=ids_BS, weights_BS=weights_BS, starts_BS=starts_BS, positions_BS=positions)

    @property
    def examples_BN(self) -> Tensor:
        """The example of each block, named by where it begins."""
        return self.starts_BS[:, ::BLOCK]

    def window_mask(self, blocks: slice) -> Tensor:
        """bool [B, N, BLOCK, 2 * BLOCK]: which rows of its own block and the one before it each query sees."""
        device = self.ids_BS.device
        query = torch.arange(BLOCK, device=device).unsqueeze(1)
        key = torch.arange(2 * BLOCK, device=device) - BLOCK
        near = (key <= query) & (key > query - BLOCK)
        examples = self.examples_BN
        before = torch.cat([examples[:, :1] - 1, examples[:, :-1]], dim=1)
        same = (before == examples)[:, blocks, None, None]
        return near & (same | (key >= 0))

    def entry_mask(self, ratio: int, queries: slice) -> Tensor:
        """bool [B, Q, E]: which entries of `ratio` tokens each query sees, of those that end before the last one."""
        device = self.ids_BS.device
        query = torch.arange(queries.start, queries.stop, device=device)
        ends = (torch.arange(queries.stop // ratio, device=device) + 1) * ratio
        starts = self.starts_BS[:, : queries.stop : ratio]
        same = self.starts_BS[:, queries, None] == starts[:, None, : len(ends)]
        return same & (ends <= query.unsqueeze(1) + 1)

    def targets(self, ahead: int) -> tuple[Tensor, Tensor]:
        """The token `ahead` of each, int64 [B, S], and its weight, 0 where the example has no such token."""
        ids = torch.roll(self.ids_BS, -ahead, dims=1)
        same = torch.roll(self.starts_BS, -ahead, dims=1) == self.starts_BS
        same[:, -ahead:] = False
        return ids, torch.roll(self.weights_BS, -ahead, dims=1) * same
