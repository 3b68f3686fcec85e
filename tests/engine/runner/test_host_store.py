"""Places in host memory keep what was put into them, on whichever device the cache is."""

from dataclasses import replace

import pytest
import torch

from engine.runner import host_store
from engine.runner.host_store import HostPages, SnapshotArena
from model.kv_cache import KVCache
from model.kv_layout import KVLayout
from model.presets import preset

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NUM_PAGES, NUM_SLOTS = 6, 3


def make_cache(device: str) -> KVCache:
    """A cache full of different bytes."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    layout = KVLayout(config=replace(preset("nano"), sliding_window=16), row_format="fp8", index_format="fp8")
    cache = KVCache(layout, num_pages=NUM_PAGES, num_slots=NUM_SLOTS, device=device, dtype=torch.float32)
    for tensor in (cache._windows, *cache._page_tensors, *cache._accumulator_tensors):
        tensor.view(torch.uint8).random_(0, 256)
    return cache


def slot_bytes(cache: KVCache, slot: int, position: int) -> torch.Tensor:
    row = torch.empty(cache.layout.bytes_per_snapshot, dtype=torch.uint8, device=cache.device)
    cache.pack_slot(slot, position, row)
    return row.cpu()


def page_bytes(cache: KVCache, page: int) -> torch.Tensor:
    row = torch.empty(cache.layout.bytes_per_page, dtype=torch.uint8, device=cache.device)
    cache.pack_page(page, row)
    return row.cpu()


@pytest.mark.parametrize("device", DEVICES)
def test_pages_and_slots_come_back(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after their pages and slots were overwritten right behind the copies, with places in several blocks."""
    cache = make_cache(device)
    monkeypatch.setattr(host_store, "_PINNED_BLOCK_BYTES", 2 * cache.layout.bytes_per_page)
    pages, snapshots = HostPages(cache, 5), SnapshotArena(cache, 4)
    assert pages.allocated_bytes == 5 * cache.layout.bytes_per_page
    assert snapshots.allocated_bytes == 4 * cache.layout.bytes_per_snapshot
    page_before = [page_bytes(cache, page) for page in range(5)]
    slot_before = [slot_bytes(cache, slot, 100 + slot) for slot in range(3)]
    for page in range(5):
        pages.spill(page, 4 - page)
    for slot in range(3):
        snapshots.save(slot, 100 + slot, slot + 1)
    for tensor in (cache._windows, *cache._page_tensors, *cache._accumulator_tensors):
        tensor.view(torch.uint8).random_(0, 256)
    for page in range(5):
        pages.load(4 - page, (page + 2) % NUM_PAGES)
    for slot in range(3):
        snapshots.restore((slot + 1) % 3, slot + 1, 100 + slot)
    assert all(torch.equal(page_bytes(cache, (page + 2) % NUM_PAGES), page_before[page]) for page in range(5))
    assert all(torch.equal(slot_bytes(cache, (slot + 1) % 3, 100 + slot), slot_before[slot]) for slot in range(3))


def test_a_snapshot_knows_its_position() -> None:
    cache = make_cache("cpu")
    snapshots = SnapshotArena(cache, 2)
    snapshots.save(0, 77, 1)
    with pytest.raises(AssertionError, match="snapshot 1 is one of position 77, not 78"):
        snapshots.restore(0, 1, 78)
    with pytest.raises(AssertionError, match="snapshot 0 is one of position -1, not 77"):
        snapshots.restore(0, 0, 77)


def test_no_places_take_no_memory() -> None:
    cache = make_cache("cpu")
    pages, snapshots = HostPages(cache, 0), SnapshotArena(cache, 0)
    assert pages.allocated_bytes == snapshots.allocated_bytes == 0
    with pytest.raises(AssertionError, match="place 0 of 0"):
        pages.spill(0, 0)
