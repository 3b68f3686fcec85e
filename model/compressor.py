"""Compressors: every 4 tokens (with overlap) or 128 tokens become one entry row (architecture, 2.4)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model.build import Build, CheckpointModule
from model.kv_cache import RowStore
from model.kv_layout import FP8_BLOCK
from model.norm import RMSNorm
from model.ops.reference import quant
from model.step import CompressPlan
from model.tensors import CheckpointTensor


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
        # wkv over wgate: one product gives values and scores. fp32, because both are computed in fp32.
        shape = (2, width, build.config.hidden_size)
        self.wkv_gate = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=build.device), requires_grad=False)

    def own_tensors(self, prefix: str) -> Iterator[CheckpointTensor]:
        yield from super().own_tensors(prefix)
        for name, part in zip(("wkv.weight", "wgate.weight"), self.wkv_gate.unbind(0), strict=True):
            yield CheckpointTensor(
                name=prefix + name, dtype=self.build.float_code, shape=tuple(part.shape), destination=part
            )

    def forward(self, x_TD: Tensor, plan: CompressPlan, accumulators: Tensor, store: RowStore | None) -> None:
        """Without a store the accumulators advance and the entries are dropped: pages hold them already."""
        build, config = self.build, self.build.config
        values, scores = build.ops.linear_fp32(x_TD, self.wkv_gate.flatten(0, 1)).chunk(2, dim=1)
        scores = scores + self.ape.index_select(0, plan.phase_T)
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
