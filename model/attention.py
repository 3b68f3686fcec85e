"""Attention of one layer: window rows plus compressed entries; a row is key and value (architecture, 2.3)."""

import torch
from torch import Tensor

from model.build import Build, CheckpointModule
from model.compressor import Compressor
from model.config import CSA_RATIO, HCA_RATIO, LayerKind
from model.indexer import Indexer
from model.kv_cache import KVCache, RowStore
from model.kv_layout import FP8_BLOCK
from model.linear import Linear
from model.norm import RMSNorm
from model.ops.reference import quant
from model.replay import ReplayRows
from model.rope import Rotation
from model.step import Step
from model.tensors import Shard


class Attention(CheckpointModule):
    """Queries and the grouped output projection are split by heads over the group; latents are replicated."""

    def __init__(self, build: Build, kind: LayerKind, layer: int) -> None:
        super().__init__(build)
        c, group = build.config, build.group
        self.kind = kind
        self.layer = layer
        self.scale = c.head_dim**-0.5
        start, heads = group.share("num_attention_heads", c.num_attention_heads)
        _, self.groups = group.share("o_groups", c.o_groups)
        self.heads = heads
        sink_shard = Shard(dim=0, start=start, length=heads) if group.size > 1 else None
        self.attn_sink = self.declare("attn_sink", (c.num_attention_heads,), "F32", torch.float32, sink_shard)
        all_heads = c.num_attention_heads * c.head_dim
        self.wq_a = Linear(build, c.hidden_size, c.q_lora_rank)
        self.q_norm = RMSNorm(build, c.q_lora_rank)
        self.wq_b = Linear(build, c.q_lora_rank, all_heads, field="num_attention_heads * head_dim", shard_dim=0)
        self.wkv = Linear(build, c.hidden_size, c.head_dim)
        self.kv_norm = RMSNorm(build, c.head_dim)
        ranks = c.o_groups * c.o_lora_rank
        self.wo_a = Linear(build, all_heads // c.o_groups, ranks, field="o_groups * o_lora_rank", shard_dim=0)
        self.wo_b = Linear(build, ranks, c.hidden_size, field="o_groups * o_lora_rank", shard_dim=1)
        self.compressor = None
        self.indexer = None
        if kind == "csa":
            self.compressor = Compressor(build, c.head_dim, CSA_RATIO, overlap=True, index_keys=False)
            self.indexer = Indexer(build)
        elif kind == "hca":
            self.compressor = Compressor(build, c.head_dim, HCA_RATIO, overlap=False, index_keys=False)

    def forward(self, x_TD: Tensor, step: Step, cache: KVCache, window: RowStore) -> Tensor:
        """[T, D]; writes the step's rows and entries. `window` is this layer's ring."""
        rotation = self._rotation(step)
        rows_NC = self._window_rows(self._latents(x_TD, rotation), step, window)
        self._compress(x_TD, step, cache, write=True)
        return self._attend(x_TD, rotation, rows_NC, step, cache)

    def replay(self, x_ND: Tensor, rows: ReplayRows, cache: KVCache, window: RowStore) -> Tensor:
        """Rebuild this layer's part of a slot from the rows that enter it; [O, D] of the last O of them.

        Entries are read from pages and none is written.
        """
        packed = window.pack(self._latents(x_ND, rows.rotation(compressed=self.kind != "window")))
        if rows.fold is not None:
            self._compress(x_ND[-rows.fold.num_tokens :], rows.fold, cache, write=False)
        if rows.output is None:
            rows.store(window, packed)
            return x_ND[:0]
        rows_NC = window.unpack(rows.with_history(window, packed))
        rows.store(window, packed)
        x_OD = x_ND[-rows.output.num_tokens :]
        return self._attend(x_OD, self._rotation(rows.output), rows_NC, rows.output, cache)

    def _rotation(self, step: Step) -> Rotation:
        return step.main_rotation if self.kind == "window" else step.compressed_rotation

    def _latents(self, x_TD: Tensor, rotation: Rotation) -> Tensor:
        """Window rows [T, C] of the tokens, before they are packed."""
        build, c = self.build, self.build.config
        rows_TC = build.ops.rotate(self.kv_norm(self.wkv(x_TD)), rotation)
        return quant.fp8_round_trip(rows_TC, FP8_BLOCK, c.nope_head_dim) if build.numerics == "official" else rows_TC

    def _window_rows(self, rows_TC: Tensor, step: Step, window: RowStore) -> Tensor:
        """History from the ring and the chunk's own rows [N, C], as stored; then the chunk replaces the ring's."""
        plan = step.window
        packed = window.pack(rows_TC)
        rows = packed.new_empty(plan.num_rows, packed.shape[1])
        rows.index_copy_(0, plan.history_rows, window.storage.index_select(0, plan.history_slot_rows))
        rows.index_copy_(0, plan.chunk_rows_T, packed)
        window.write(plan.store_slot_rows, packed.index_select(0, plan.store_tokens))
        return window.unpack(rows)

    def _compress(self, x_TD: Tensor, step: Step, cache: KVCache, *, write: bool) -> None:
        """Fold the step's tokens into the accumulators; `write` stores the entries that this completes."""
        if self.compressor is None:
            return
        layer = self.layer
        plan = step.csa_compress if self.kind == "csa" else step.hca_compress
        parts = [(self.compressor, cache.accumulators[layer], cache.entries[layer])]
        if self.indexer is not None:
            parts.append((self.indexer.compressor, cache.index_accumulators[layer], cache.index_keys[layer]))
        for compressor, accumulators, store in parts:
            assert accumulators is not None and store is not None
            compressor(x_TD, plan, accumulators, store if write else None)

    def _attend(self, x_TD: Tensor, rotation: Rotation, rows_NC: Tensor, step: Step, cache: KVCache) -> Tensor:
        """[T, D] of the step's tokens over window rows [N, C] and the entries in pages."""
        build, c = self.build, self.build.config
        qr_TQ = self.q_norm(self.wq_a(x_TD))
        q_THC = self.wq_b(qr_TQ).unflatten(1, (self.heads, c.head_dim))
        q_THC = build.ops.rotate(build.ops.rms_norm(q_THC, None, c.rms_norm_eps), rotation)
        entries, selected_TS = None, None
        if self.indexer is not None:
            entries, keys = step.csa_entries, cache.index_keys[self.layer]
            assert keys is not None
            selected_TS = self.indexer(x_TD, qr_TQ, step, keys)
        elif self.kind == "hca":
            entries = step.hca_entries
        store = None if entries is None else cache.entries[self.layer]
        o_THC = build.ops.attention(q_THC, rows_NC, step, self.attn_sink, self.scale, store, entries, selected_TS)
        build.ops.rotate(o_THC, rotation, inverse=True)
        return self._output(o_THC)

    def _output(self, o_THC: Tensor) -> Tensor:
        """Each group of heads through its own rows of wo_a, then all groups through wo_b."""
        build = self.build
        o_TGX = o_THC.reshape(o_THC.shape[0], self.groups, -1)
        # Activations stay unrounded before wo_a in every numerics.
        weight_GOX = self.wo_a.dense_weight().view(self.groups, -1, o_TGX.shape[2])
        u_TGO = build.ops.grouped_linear(o_TGX, weight_GOX)
        return build.group.all_reduce(self.wo_b(u_TGO.flatten(1)))
