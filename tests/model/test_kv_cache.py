"""Packed slots and pages: what goes into a row comes out of it, to the bit, and nothing else is touched."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.kv_cache import KVCache
from model.kv_layout import KVLayout

FORMATS = [("float32", "float32"), ("bfloat16", "bfloat16"), ("fp8", "fp8"), ("fp8", "fp4")]
NUM_PAGES, NUM_SLOTS = 5, 3


def make_cache(
    tools: Any, rows: Any = "float32", index: Any = "float32", draft_rows: int = 0, **changes: Any
) -> KVCache:
    """A cache full of different bytes."""
    config = tools.nano_config(**{"sliding_window": 16, **changes})
    layout = KVLayout(config=config, row_format=rows, index_format=index, draft_rows=draft_rows)
    cache = KVCache(layout, num_pages=NUM_PAGES, num_slots=NUM_SLOTS, device="cpu", dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    for tensor in tensors(cache):
        tensor.view(torch.uint8).random_(0, 256, generator=generator)
    return cache


def tensors(cache: KVCache) -> list[Tensor]:
    """Every tensor of every layer, as the layers see them."""
    stores = [store.storage for store in (*cache.windows, *cache.entries, *cache.index_keys) if store is not None]
    return [*stores, *(a for a in (*cache.accumulators, *cache.index_accumulators) if a is not None)]


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def snapshot(cache: KVCache, slot: int, position: int) -> Tensor:
    row = torch.full((cache.layout.bytes_per_snapshot,), 77, dtype=torch.uint8)
    cache.pack_slot(slot, position, row)
    return row


@pytest.mark.parametrize(("rows", "index"), FORMATS)
@pytest.mark.parametrize("draft_rows", [0, 7])
def test_a_slot_goes_into_a_row_and_comes_out_elsewhere(tools: Any, rows: str, index: str, draft_rows: int) -> None:
    cache = make_cache(tools, rows, index, draft_rows)
    ring = cache.layout.window_ring
    for position in (0, 1, 2, 14, 15, 16, 17, 31, 32, 40, 1000, (1 << 20) - 1):
        row = snapshot(cache, 1, position)
        before = [raw(tensor) for tensor in tensors(cache)]
        cache.unpack_slot(2, position, row)
        assert torch.equal(snapshot(cache, 2, position), row)
        kept = range(max(0, position - 15), position)
        for old, window in zip(before, cache.windows, strict=False):
            now = raw(window.storage)
            expected = old.clone()
            for token in kept:
                expected[2 * ring + token % ring] = old[ring + token % ring]
            assert torch.equal(now, expected), "exactly the rows of the last window move"
        for old, tensor in zip(before[len(cache.windows) :], tensors(cache)[len(cache.windows) :], strict=True):
            expected = old.clone()
            if old.dim() == 4:  # accumulators
                expected[2] = old[1]
            assert torch.equal(raw(tensor), expected)


def test_equal_slots_make_equal_rows(tools: Any) -> None:
    """Whatever stands in the unused part of a ring, and wherever the ring begins."""
    cache = make_cache(tools)
    for position in (3, 15, 20):
        row = snapshot(cache, 0, position)
        other = make_cache(tools)
        for window in other.windows:
            window.storage.fill_(9.0)
        other.unpack_slot(2, position, row)
        assert torch.equal(snapshot(other, 2, position), row)
    assert not torch.equal(snapshot(cache, 0, 20), snapshot(cache, 0, 21))


@pytest.mark.parametrize(("rows", "index"), FORMATS)
def test_a_page_goes_into_a_row_and_comes_out_elsewhere(tools: Any, rows: str, index: str) -> None:
    cache = make_cache(tools, rows, index)
    row = torch.full((cache.layout.bytes_per_page,), 77, dtype=torch.uint8)
    before = [raw(tensor) for tensor in tensors(cache)]
    cache.pack_page(1, row)
    cache.unpack_page(4, row)
    again = torch.zeros_like(row)
    cache.pack_page(4, again)
    assert torch.equal(again, row)
    windows = len(cache.windows)
    for number, (old, tensor) in enumerate(zip(before, tensors(cache), strict=True)):
        expected = old.clone()
        if number >= windows and old.dim() == 2:  # entries and index keys
            per_page = old.shape[0] // NUM_PAGES
            expected[4 * per_page :] = old[per_page : 2 * per_page]
        assert torch.equal(raw(tensor), expected)


@pytest.mark.parametrize("ratios", [(0, 0), (4,), (128, 128, 0)])
def test_models_without_some_kind_of_layer(tools: Any, ratios: tuple[int, ...]) -> None:
    cache = make_cache(tools, num_hidden_layers=len(ratios), compress_ratios=ratios)
    row = snapshot(cache, 0, 40)
    cache.unpack_slot(1, 40, row)
    assert torch.equal(snapshot(cache, 1, 40), row)
    page = torch.zeros(cache.layout.bytes_per_page, dtype=torch.uint8)
    cache.pack_page(0, page)
    cache.copy_pages(torch.tensor([0]), torch.tensor([3]))
    copied = torch.ones_like(page)
    cache.pack_page(3, copied)
    assert torch.equal(copied, page)


def test_a_row_of_another_layout_is_refused(tools: Any) -> None:
    cache = make_cache(tools)
    with pytest.raises(AssertionError, match="another layout"):
        cache.pack_slot(0, 5, torch.empty(cache.layout.bytes_per_snapshot - 1, dtype=torch.uint8))
