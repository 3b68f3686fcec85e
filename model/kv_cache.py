"""Storage of pages and slots for one rank.

    page  CSA layer  entries [pages * 64, row]      index keys [pages * 64, index row]
          HCA layer  entries [pages * 2, row]
    slot  every layer window ring [slots * ring, row]; token p stands in row p mod ring
          CSA layer  accumulators [slots, 2, 3, C] and index accumulators [slots, 2, 3, J]
          HCA layer  accumulators [slots, 1, 3, C]

The second dim of an accumulator is (entry in progress, overlap of the next entry); the third is (running maximum,
sum of weights, weighted sum), one softmax for each channel, fp32. A row is a float row, or packed bytes (quant.py).
A ring row is read only for positions that the request itself has computed, so a new request needs no clean ring.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from model.kv_layout import KVLayout, RowFormat
from model.ops.reference import quant

_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAXIMUM, WEIGHT_SUM, WEIGHTED_SUM = 0, 1, 2


def lazy_zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros [count]. On a CPU a page of memory is taken when it is first written, so a large cache costs no start-up
    time (torch.zeros writes every byte)."""
    if device.type != "cpu":
        return torch.zeros(count, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(count * dtype.itemsize, dtype=np.uint8)).view(dtype)


class RowStore:
    """Rows of one kind of one layer: packed on write, unpacked on read."""

    def __init__(
        self,
        num_rows: int,
        row_bytes: int,
        storage_dtype: torch.dtype,
        device: torch.device,
        pack: Callable[[Tensor], Tensor],
        unpack: Callable[[Tensor], Tensor],
    ) -> None:
        width = row_bytes // storage_dtype.itemsize
        self.storage = lazy_zeros(num_rows * width, storage_dtype, device).view(num_rows, width)
        self.pack = pack
        """[N, C] floats -> [N, width] in the storage dtype."""
        self.unpack = unpack
        """[N, width] -> [N, C] in the model's dtype."""

    def read(self, rows: Tensor) -> Tensor:
        """Rows [*] -> [*, C] in the model's dtype."""
        found = self.unpack(self.storage.index_select(0, rows.reshape(-1)))
        return found.view(*rows.shape, found.shape[1])

    def write(self, rows_N: Tensor, packed: Tensor) -> None:
        self.storage.index_copy_(0, rows_N, packed)


class KVCache:
    """Pages and slots of every layer; allocates exactly what the layout says."""

    def __init__(
        self,
        layout: KVLayout,
        *,
        num_pages: int,
        num_slots: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        """`dtype` is the model's: rows are unpacked to it."""
        self.layout = layout
        self.num_pages = num_pages
        self.num_slots = num_slots
        self.device = torch.device(device)
        self.dtype = dtype
        config = layout.config
        rows_of = {"csa": layout.csa_rows_per_page, "hca": layout.hca_rows_per_page}
        self.windows = [self.new_window() for _ in range(config.num_hidden_layers)]
        self.entries: list[RowStore | None] = [
            self._row_store(num_pages * rows_of[kind]) if kind in rows_of else None for kind in config.layer_kinds
        ]
        self.index_keys: list[RowStore | None] = [
            self._index_store(num_pages * layout.csa_rows_per_page) if kind == "csa" else None
            for kind in config.layer_kinds
        ]
        parts = {"csa": 2, "hca": 1}
        self.accumulators: list[Tensor | None] = [
            self._accumulators(parts[kind], config.head_dim) if kind in parts else None for kind in config.layer_kinds
        ]
        self.index_accumulators: list[Tensor | None] = [
            self._accumulators(2, config.index_head_dim) if kind == "csa" else None for kind in config.layer_kinds
        ]
        self.reset_slots(torch.arange(num_slots, device=self.device))
        assert self.allocated_bytes == layout.bytes_per_page * num_pages + layout.bytes_per_slot * num_slots

    @property
    def allocated_bytes(self) -> int:
        return sum(t.nbytes for t in (*self._page_tensors(), *self._slot_tensors()))

    def new_window(self) -> RowStore:
        """A window ring for every slot; the MTP block keeps one of its own."""
        return self._row_store(self.num_slots * self.layout.window_ring)

    def reset_slots(self, slots: Tensor) -> None:
        """Start of a request in each of `slots`: accumulators empty."""
        for accumulator in (*self.accumulators, *self.index_accumulators):
            if accumulator is not None:
                accumulator[slots] = 0.0
                accumulator[slots, :, MAXIMUM] = float("-inf")

    def copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole pages, all layers and kinds; `sources` and `targets` are page ids [N] without overlap."""
        for storage in self._page_tensors():
            pages = storage.view(self.num_pages, -1)
            pages.index_copy_(0, targets, pages.index_select(0, sources))

    def _page_tensors(self) -> list[Tensor]:
        return [store.storage for store in (*self.entries, *self.index_keys) if store is not None]

    def _slot_tensors(self) -> list[Tensor]:
        accumulators = [a for a in (*self.accumulators, *self.index_accumulators) if a is not None]
        return [*(window.storage for window in self.windows), *accumulators]

    def _accumulators(self, parts: int, channels: int) -> Tensor:
        return torch.zeros(self.num_slots, parts, 3, channels, dtype=torch.float32, device=self.device)

    def _row_store(self, num_rows: int) -> RowStore:
        layout, dtype = self.layout, self.dtype
        row_format: RowFormat = layout.row_format
        channels, rope_dim = layout.config.head_dim, layout.config.qk_rope_head_dim
        return RowStore(
            num_rows,
            layout.bytes_per_row,
            _FLOATS.get(row_format, torch.uint8),
            self.device,
            lambda x: quant.pack_rows(x, row_format, rope_dim),
            lambda s: quant.unpack_rows(s, row_format, channels, rope_dim, dtype),
        )

    def _index_store(self, num_rows: int) -> RowStore:
        layout, dtype = self.layout, self.dtype
        index_format, channels = layout.index_format, layout.config.index_head_dim
        return RowStore(
            num_rows,
            layout.bytes_per_index_row,
            _FLOATS.get(index_format, torch.uint8),
            self.device,
            lambda x: quant.pack_index_rows(x, index_format),
            lambda s: quant.unpack_index_rows(s, index_format, channels, dtype),
        )
