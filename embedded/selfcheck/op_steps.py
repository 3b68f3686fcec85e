"""Steps and stored rows for checks of single operations: a few requests of a small model of all layer kinds.

Letters: T tokens, N window rows, C channels.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from model.batch import ForwardBatch
from model.config import ModelConfig
from model.kv_cache import RowStore
from model.kv_layout import PAGE_TOKENS, KVLayout
from model.ops.reference import quant
from model.presets import preset
from model.rope import Rope
from model.step import Step

Stored = Literal["float32", "bfloat16", "fp8"]

STEPS: dict[str, tuple[tuple[int, int], ...]] = {
    "prompt": ((0, 200),),
    "chunk": ((300, 90),),
    "decode": ((5, 1), (131, 1), (700, 1)),
    "mixed": ((0, 70), (400, 1), (129, 40)),
}
"""(position of the first token, tokens) of each request."""


def small_config() -> ModelConfig:
    """Sixteen entries are selected, so most are not; rows are wide enough for FP8 blocks."""
    return replace(
        preset("nano"),
        hidden_size=96,
        num_attention_heads=4,
        head_dim=128,
        qk_rope_head_dim=64,
        index_n_heads=8,
        index_head_dim=64,
        index_topk=16,
        moe_intermediate_size=48,
    )


class SmallStep:
    """One step on a device, its pages in an order of their own."""

    def __init__(self, requests: Sequence[tuple[int, int]], stored: Stored, device: str) -> None:
        self.config = small_config()
        self.layout = KVLayout(config=self.config, row_format=stored, index_format=stored)
        lens = tuple(count for _, count in requests)
        starts = tuple(start for start, _ in requests)
        pages = [-(-(start + count) // PAGE_TOKENS) for start, count in requests]
        self.num_pages = sum(pages) + 1
        # Descending, and page 0 belongs to nobody: consecutive pages would hide a wrong page table.
        free = list(range(self.num_pages - 1, 0, -1))
        table = torch.zeros(len(requests), max(pages), dtype=torch.int64)
        for number, count in enumerate(pages):
            table[number, :count] = torch.tensor([free.pop(0) for _ in range(count)])
        ends = torch.tensor(lens).cumsum(0)
        batch = ForwardBatch(
            token_ids_T=torch.zeros(int(ends[-1]), dtype=torch.int64, device=device),
            positions_T=torch.cat([torch.arange(s, s + n) for s, n in requests]).to(device),
            request_index_T=torch.repeat_interleave(torch.arange(len(requests)), torch.tensor(lens)).to(device),
            query_start_B1=torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(device),
            seq_lens_B=torch.tensor([start + count for start, count in requests], device=device),
            page_table_BP=table.to(device),
            slot_B=torch.arange(len(requests), device=device),
            logits_index_L=(ends - 1).to(device),
            query_lens=lens,
            start_positions=starts,
        )
        rope = Rope(self.config)
        rope.to(torch.device(device))
        self.step = Step(batch, self.layout, rope)

    @property
    def num_tokens(self) -> int:
        return self.step.num_tokens

    def entry_store(self, rows_NC: Tensor, dtype: torch.dtype) -> RowStore:
        """Rows of the paged storage of one layer, packed as the layout says."""
        channels, rope_dim, stored = self.config.head_dim, self.config.qk_rope_head_dim, self.layout.row_format
        return RowStore(
            quant.pack_rows(rows_NC.to(dtype), stored, rope_dim),
            lambda x: quant.pack_rows(x, stored, rope_dim),
            lambda s: quant.unpack_rows(s, stored, channels, rope_dim, dtype),
        )

    def key_store(self, keys_NJ: Tensor, dtype: torch.dtype) -> RowStore:
        """Index keys of one layer."""
        channels, stored = self.config.index_head_dim, self.layout.index_format
        return RowStore(
            quant.pack_index_rows(keys_NJ.to(dtype), stored),
            lambda x: quant.pack_index_rows(x, stored),
            lambda s: quant.unpack_index_rows(s, stored, channels, dtype),
        )
