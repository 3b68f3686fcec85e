"""Storage of pages and slots for one rank.

    page  CSA layers  entries [layers, pages * 64, row]     index keys [layers, pages * 64, index row]
          HCA layers  entries [layers, pages * 2, row]
    slot  all layers  window rings [layers, slots * ring, row]; token p stands in row p mod ring
          CSA layers  accumulators [layers, slots, 2, 3, C] and index accumulators [layers, slots, 2, 3, J]
          HCA layers  accumulators [layers, slots, 1, 3, C]

One tensor for each line, so that a page or a slot is packed by a handful of copies; layers see their own part of it.
An accumulator is 1 or 2 softmaxes (entry in progress, overlap of the next entry) of 3 numbers (running maximum, sum of
weights, weighted sum) for each channel, fp32. A row is a float row, or packed bytes (quant.py).
A ring row is read only for positions that the request itself has computed, so a new request needs no clean ring.
"""

from collections.abc import Callable, Iterator

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
    if device.type != "cpu" or count == 0:
        return torch.zeros(count, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(count * dtype.itemsize, dtype=np.uint8)).view(dtype)


class RowStore:
    """Rows of one kind of one layer: packed on write, unpacked on read."""

    def __init__(self, storage: Tensor, pack: Callable[[Tensor], Tensor], unpack: Callable[[Tensor], Tensor]) -> None:
        self.storage = storage
        """[rows, width] in the storage dtype."""
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
        config, kinds = layout.config, layout.config.layer_kinds
        num_csa, num_hca = len(config.layers_of("csa")), len(config.layers_of("hca"))
        self._windows = self._rows(config.num_hidden_layers, num_slots * layout.window_ring)
        csa_entries = self._rows(num_csa, num_pages * layout.csa_rows_per_page)
        hca_entries = self._rows(num_hca, num_pages * layout.hca_rows_per_page)
        index_keys = self._rows(num_csa, num_pages * layout.csa_rows_per_page, index=True)
        csa = self._accumulator(num_csa, 2, config.head_dim)
        csa_index = self._accumulator(num_csa, 2, config.index_head_dim)
        hca = self._accumulator(num_hca, 1, config.head_dim)
        self._page_tensors = (csa_entries, index_keys, hca_entries)
        self._accumulator_tensors = (csa, csa_index, hca)

        self.windows = [self._row_store(storage) for storage in self._windows]
        of_kind = {"csa": iter(zip(csa_entries, csa, strict=True)), "hca": iter(zip(hca_entries, hca, strict=True))}
        of_layer = [next(of_kind[kind]) if kind in of_kind else None for kind in kinds]
        self.entries: list[RowStore | None] = [None if part is None else self._row_store(part[0]) for part in of_layer]
        self.accumulators: list[Tensor | None] = [None if part is None else part[1] for part in of_layer]
        of_index = iter(zip(index_keys, csa_index, strict=True))
        of_csa = [next(of_index) if kind == "csa" else None for kind in kinds]
        self.index_keys: list[RowStore | None] = [
            None if part is None else self._index_store(part[0]) for part in of_csa
        ]
        self.index_accumulators: list[Tensor | None] = [None if part is None else part[1] for part in of_csa]
        self.reset_slots(torch.arange(num_slots, device=self.device))
        assert self.allocated_bytes == layout.bytes_per_page * num_pages + layout.bytes_per_slot * num_slots

    @property
    def allocated_bytes(self) -> int:
        return sum(t.nbytes for t in (self._windows, *self._page_tensors, *self._accumulator_tensors))

    def new_window(self) -> RowStore:
        """A window ring for every slot; the MTP block keeps one of its own."""
        return self._row_store(self._rows(1, self.num_slots * self.layout.window_ring)[0])

    def reset_slots(self, slots: Tensor) -> None:
        """Start of a request in each of `slots`: accumulators empty."""
        for accumulators in self._accumulator_tensors:
            accumulators[:, slots] = 0.0
            accumulators[:, slots, :, MAXIMUM] = float("-inf")

    def copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole pages, all layers and kinds; `sources` and `targets` are page ids [N] without overlap."""
        for pages in self._pages():
            pages.index_copy_(1, targets, pages.index_select(1, sources))

    def pack_page(self, page: int, row: Tensor) -> None:
        """One page, all layers and kinds, into `row`: uint8 [bytes_per_page], contiguous, on any device."""
        pages = [tensor[:, page].view(torch.uint8) for tensor in self._pages()]
        for part, stored in zip(_split(row, pages), pages, strict=True):
            part.copy_(stored)

    def unpack_page(self, page: int, row: Tensor) -> None:
        """Make a page what `pack_page` has packed."""
        pages = [tensor[:, page].view(torch.uint8) for tensor in self._pages()]
        for part, stored in zip(_split(row, pages), pages, strict=True):
            stored.copy_(part)

    def pack_slot(self, slot: int, position: int, row: Tensor) -> None:
        """Snapshot of a slot whose request has computed exactly `position` tokens.

        `row`: uint8 [bytes_per_snapshot], contiguous, on any device. Window rows stand in token order; what a short
        request leaves of their room is zeros, so equal slots make equal bytes.
        """
        kept, *accumulators = self._snapshot_parts(row)
        for target, source in self._kept_windows(slot, position):
            kept[:, target] = self._windows[:, source].view(torch.uint8)
        kept[:, position:] = 0
        for part, tensor in zip(accumulators, self._accumulator_tensors, strict=True):
            part.copy_(tensor[:, slot].view(torch.uint8))

    def unpack_slot(self, slot: int, position: int, row: Tensor) -> None:
        """Make a slot what `pack_slot` has packed at `position`, whoever had it before."""
        kept, *accumulators = self._snapshot_parts(row)
        for source, target in self._kept_windows(slot, position):
            self._windows[:, target].view(torch.uint8).copy_(kept[:, source])
        for part, tensor in zip(accumulators, self._accumulator_tensors, strict=True):
            tensor[:, slot].view(torch.uint8).copy_(part)

    def _kept_windows(self, slot: int, position: int) -> Iterator[tuple[slice, slice]]:
        """(rows of the snapshot, rows of the rings) of the last window before `position`, in at most two spans."""
        ring = self.layout.window_ring
        first = max(0, position - self.layout.snapshot_window_rows)
        at = first
        while at < position:
            count = min(position - at, ring - at % ring)
            row = slot * ring + at % ring
            yield slice(at - first, at - first + count), slice(row, row + count)
            at += count

    def _snapshot_parts(self, row: Tensor) -> list[Tensor]:
        """Views of a snapshot: window rows [layers, W - 1, bytes], then accumulators [layers, parts, 3, bytes]."""
        windows = self._windows[:, : self.layout.snapshot_window_rows]
        accumulators = [tensor[:, 0] for tensor in self._accumulator_tensors]
        return _split(row, [part.view(torch.uint8) for part in (windows, *accumulators)])

    def _pages(self) -> list[Tensor]:
        """[layers, pages, width] of each kind."""
        per_page = [tensor.shape[1] // self.num_pages * tensor.shape[2] for tensor in self._page_tensors]
        return [
            tensor.view(tensor.shape[0], self.num_pages, width)
            for tensor, width in zip(self._page_tensors, per_page, strict=True)
        ]

    def _accumulator(self, layers: int, parts: int, channels: int) -> Tensor:
        return torch.zeros(layers, self.num_slots, parts, 3, channels, dtype=torch.float32, device=self.device)

    def _rows(self, layers: int, num_rows: int, *, index: bool = False) -> Tensor:
        layout = self.layout
        row_bytes = layout.bytes_per_index_row if index else layout.bytes_per_row
        dtype = _FLOATS.get(layout.index_format if index else layout.row_format, torch.uint8)
        width = row_bytes // dtype.itemsize
        return lazy_zeros(layers * num_rows * width, dtype, self.device).view(layers, num_rows, width)

    def _row_store(self, storage: Tensor) -> RowStore:
        layout, dtype = self.layout, self.dtype
        row_format: RowFormat = layout.row_format
        channels, rope_dim = layout.config.head_dim, layout.config.qk_rope_head_dim
        return RowStore(
            storage,
            lambda x: quant.pack_rows(x, row_format, rope_dim),
            lambda s: quant.unpack_rows(s, row_format, channels, rope_dim, dtype),
        )

    def _index_store(self, storage: Tensor) -> RowStore:
        layout, dtype = self.layout, self.dtype
        index_format, channels = layout.index_format, layout.config.index_head_dim
        return RowStore(
            storage,
            lambda x: quant.pack_index_rows(x, index_format),
            lambda s: quant.unpack_index_rows(s, index_format, channels, dtype),
        )


def _split(row: Tensor, parts: list[Tensor]) -> list[Tensor]:
    """Consecutive pieces of `row`, shaped like `parts`."""
    assert row.dtype == torch.uint8 and row.shape == (sum(part.numel() for part in parts),), "a row of another layout"
    pieces = torch.split(row, [part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
