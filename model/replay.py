"""Exact replay: a slot at position p rebuilt from tokens and pages, when no snapshot of it was kept.

A window row of layer l depends on W - 1 rows before it in the layer below, so the rows that are needed form a triangle
(kv-and-scheduling 0.5; `kv_layout.replay_layers` is its arithmetic):

                p - 3(W-1)      p - 2(W-1)      p - (W-1)       p
    layer 0     [ latent rows                                   )
                                [ attention, experts            )
    layer 1                     [ latent rows                   )
                                                [ attention ... )
    layer 2                                     [ latent rows   )

Entries are complete in the pages up to p, and each row sees those of its own past only, as in the first pass. The
accumulators are folded from the start of their group on. A replay is cut into batches where it is longer than a step:
rows of an earlier batch are then read from the ring.

Letters: N rows that enter a layer, O rows that leave it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.batch import ForwardBatch
from model.kv_cache import RowStore
from model.kv_layout import KVLayout, replay_layers
from model.rope import Rope, Rotation
from model.step import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRows:
    """Rows of one batch of a replay in one layer."""

    positions_N: Tensor
    rope: Rope
    store_slot_rows: Tensor
    """Rows of the ring storage that the last rows overwrite, as many as the ring has."""
    fold: Step | None
    """The last rows, those that the accumulators take; None: no row."""
    output: Step | None
    """The last rows, those that leave the layer; None: no row."""
    history_slot_rows: Tensor
    """Rows of the ring storage that the first of them see, from the batches before,"""
    num_unseen: int
    """and rows that enter but are seen by none of them."""

    def rotation(self, *, compressed: bool) -> Rotation:
        return self.rope.rotation(self.positions_N, compressed=compressed)

    def with_history(self, window: RowStore, packed: Tensor) -> Tensor:
        """Window rows of the output step, in the order of its window plan. Call it before `store`."""
        return torch.cat([window.storage.index_select(0, self.history_slot_rows), packed[self.num_unseen :]])

    def store(self, window: RowStore, packed: Tensor) -> None:
        """Put the newest rows into the ring."""
        window.write(self.store_slot_rows, packed[-self.store_slot_rows.shape[0] :])


def replay_steps(batch: ForwardBatch, layout: KVLayout, rope: Rope, position: int) -> Iterator[ReplayRows]:
    """Rows of each layer, from below, as long as the batch has any; see `Transformer.replay`."""
    (start,), (length,) = batch.start_positions, batch.query_lens
    assert start + length <= position, "a replay computes nothing that is not known"
    config, ring = layout.config, layout.window_ring

    def tail(first: int) -> Step | None:
        offset = max(0, first - start)
        return Step(_from(batch, offset), layout, rope) if offset < length else None

    for layer in replay_layers(config, position):
        offset = max(0, layer.start - start)
        if offset >= length:
            return
        positions = batch.positions_T[offset:]
        output = tail(layer.output)
        history = torch.arange(0)
        num_unseen = 0
        if output is not None:
            first_seen = max(0, output.start_positions[0] - (config.sliding_window - 1))
            history = torch.arange(min(first_seen, start + offset), start + offset)
            num_unseen = max(0, first_seen - start - offset)
        yield ReplayRows(
            positions_N=positions,
            rope=rope,
            store_slot_rows=batch.slot_B * ring + positions[-ring:] % ring,
            fold=tail(layer.fold),
            output=output,
            history_slot_rows=batch.slot_B * ring + history.to(positions.device) % ring,
            num_unseen=num_unseen,
        )


def _from(batch: ForwardBatch, offset: int) -> ForwardBatch:
    """The tokens of a batch of one request from `offset` on."""
    (start,), (length,) = batch.start_positions, batch.query_lens
    count = length - offset
    return replace(
        batch,
        token_ids_T=batch.token_ids_T[offset:],
        positions_T=batch.positions_T[offset:],
        request_index_T=batch.request_index_T[offset:],
        query_start_B1=torch.clamp(batch.query_start_B1, max=count),
        query_lens=(count,),
        start_positions=(start + offset,),
    )
