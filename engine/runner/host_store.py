"""Host memory of the KV cache: packed slots (snapshots) and spilled pages, in places of fixed size.

Which place holds what is the KV manager's business; here are bytes and the way they take.

    CPU    straight between the cache and the place
    CUDA   through one staging row on the device and pinned memory. All copies are queued on the stream that computes,
           so a ring or a page is overwritten only after its copy, and a place is read only after it was filled.
"""

import numpy as np
import torch
from torch import Tensor

from model.kv_cache import KVCache, lazy_zeros

_PINNED_BLOCK_BYTES = 1 << 28
"""torch rounds a pinned block up to a power of two, so places come in blocks of about one."""


class _Places:
    """`num_places` rows of `row_bytes` bytes in host memory."""

    def __init__(self, num_places: int, row_bytes: int, device: torch.device) -> None:
        self.num_places = num_places
        self.allocated_bytes = num_places * row_bytes
        self.staging = torch.empty(row_bytes, dtype=torch.uint8, device=device) if device.type == "cuda" else None
        """On the device; None on a CPU, where a place is packed directly."""
        self.staging_bytes = 0 if self.staging is None else row_bytes
        self._block_rows = max(1, _PINNED_BLOCK_BYTES // row_bytes if device.type == "cuda" else num_places)
        counts = [min(self._block_rows, num_places - n) for n in range(0, num_places, self._block_rows)]
        self._blocks = [_host_rows(count, row_bytes, pinned=self.staging is not None) for count in counts]

    def place(self, index: int) -> Tensor:
        """uint8 [row_bytes]."""
        assert 0 <= index < self.num_places, f"place {index} of {self.num_places}"
        return self._blocks[index // self._block_rows][index % self._block_rows]

    def send(self, index: int) -> None:
        """Staging row to a place."""
        if self.staging is not None:
            self.place(index).copy_(self.staging, non_blocking=True)

    def fetch(self, index: int) -> Tensor:
        """A place as a row that the device may read until the next `fetch`."""
        if self.staging is None:
            return self.place(index)
        return self.staging.copy_(self.place(index), non_blocking=True)

    def target(self, index: int) -> Tensor:
        """The row to pack into before `send`."""
        return self.place(index) if self.staging is None else self.staging


class HostPages:
    """Spilled pages."""

    def __init__(self, cache: KVCache, num_host_pages: int) -> None:
        self._cache = cache
        self._places = _Places(num_host_pages, cache.layout.bytes_per_page, cache.device)

    @property
    def allocated_bytes(self) -> int:
        """Of host memory."""
        return self._places.allocated_bytes

    @property
    def staging_bytes(self) -> int:
        """Of the device's memory."""
        return self._places.staging_bytes

    def spill(self, page: int, host_page: int) -> None:
        """Copy a page to a host page."""
        self._cache.pack_page(page, self._places.target(host_page))
        self._places.send(host_page)

    def load(self, host_page: int, page: int) -> None:
        """Copy a host page to a page."""
        self._cache.unpack_page(page, self._places.fetch(host_page))


class SnapshotArena:
    """Packed slots, each at one position."""

    def __init__(self, cache: KVCache, num_snapshots: int) -> None:
        self._cache = cache
        self._places = _Places(num_snapshots, cache.layout.bytes_per_snapshot, cache.device)
        self._positions = np.full(num_snapshots, -1, dtype=np.int64)

    @property
    def allocated_bytes(self) -> int:
        """Of host memory."""
        return self._places.allocated_bytes

    @property
    def staging_bytes(self) -> int:
        """Of the device's memory."""
        return self._places.staging_bytes

    def save(self, slot: int, position: int, snapshot: int) -> None:
        """Keep a slot whose request has computed exactly `position` tokens."""
        self._cache.pack_slot(slot, position, self._places.target(snapshot))
        self._places.send(snapshot)
        self._positions[snapshot] = position

    def restore(self, slot: int, snapshot: int, position: int) -> None:
        """Make a slot what was kept; `position` is that of `save`."""
        assert self._positions[snapshot] == position, (
            f"snapshot {snapshot} is one of position {self._positions[snapshot]}, not {position}"
        )
        self._cache.unpack_slot(slot, position, self._places.fetch(snapshot))


def _host_rows(count: int, row_bytes: int, *, pinned: bool) -> Tensor:
    if pinned:
        return torch.empty((count, row_bytes), dtype=torch.uint8, pin_memory=True)
    return lazy_zeros(count * row_bytes, torch.uint8, torch.device("cpu")).view(count, row_bytes)
