"""Compressors: every 4 tokens (with overlap) or 128 tokens become one entry row (architecture, 2.4)."""

import torch
from torch import Tensor

from model.build import Build, CheckpointModule
from model.kv_cache import RowStore
from model.kv_layout import FP8_BLOCK
from model.linear import Linear
from model.norm import RMSNorm
from model.ops.reference import quant
from model.step import CompressPlan


class Compressor(CheckpointModule):
    """Folds tokens into a softmax for each channel and stores an entry when its last token has been folded.

    With overlap the first half of the projected channels belongs to the next window's entry, the second half to the
    token's own. `index_keys`: official numerics rotate these by Hadamard and round them to FP4; entry rows get
    the FP8 round trip instead.
    """

    def __init__(self, build: Build, channels: int, ratio: int, *, overlap: bool, index_keys: bool) -> None:
        super().__init__(build)
        width = channels * (2 if overlap else 1)
        self.overlap = overlap
        self.index_keys = index_keys
        self.ape = self.declare("ape", (ratio, width), "F32", torch.float32)
        self.norm = RMSNorm(build, channels)
        hidden = build.config.hidden_size
        # fp32 copies: values and scores are computed in fp32.
        self.wkv = Linear(build, hidden, width, quantized=False, dtype=torch.float32)
        self.wgate = Linear(build, hidden, width, quantized=False, dtype=torch.float32)

    def forward(self, x_TD: Tensor, plan: CompressPlan, accumulators: Tensor, store: RowStore | None) -> None:
        """Without a store the accumulators advance and the entries are dropped: pages hold them already."""
        build, config = self.build, self.build.config
        values = build.ops.linear_fp32(x_TD, self.wkv.weight)
        scores = build.ops.linear_fp32(x_TD, self.wgate.weight)
        scores += self.ape.index_select(0, plan.phase_T)
        entries = build.ops.compress(values, scores, plan, accumulators, overlap=self.overlap)
        if store is None or entries.shape[0] == 0:
            return
        rows = build.ops.rotate(self.norm(entries.to(build.dtype)), plan.emit_rotation)
        if build.numerics == "official":
            if self.index_keys:
                rows = quant.fp4_round_trip(quant.hadamard(rows))
            else:
                rows = quant.fp8_round_trip(rows, FP8_BLOCK, config.nope_head_dim)
        store.write(plan.emit_rows, store.pack(rows))
