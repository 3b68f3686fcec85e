"""A replayed slot is the slot of the first pass, to the bit, whatever the position; with one row fewer it is not."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import CSA_RATIO, HCA_RATIO, ModelConfig
from model.kv_cache import KVCache
from model.kv_layout import PAGE_TOKENS, KVLayout, replay_layers, replay_rows
from model.presets import preset

LENGTH = 2 * PAGE_TOKENS + 4


def tiny_config(tools: Any, ratios: tuple[int, ...] = (4, 128, 4), **changes: Any) -> ModelConfig:
    """Short windows, so that a triangle is a few dozen rows, and little arithmetic."""
    small = {"vocab_size": 64, "hidden_size": 32, "head_dim": 32, "qk_rope_head_dim": 8, "num_attention_heads": 2}
    small |= {"q_lora_rank": 16, "o_groups": 1, "o_lora_rank": 16, "index_n_heads": 8, "index_head_dim": 32}
    small |= {"index_topk": 24, "n_routed_experts": 4, "moe_intermediate_size": 16, "num_hash_layers": 1}
    small |= {"num_hidden_layers": len(ratios), "compress_ratios": ratios, "sliding_window": 16}
    return tools.nano_config(**(small | changes))


def snapshot(cache: Any, slot: int, position: int) -> Tensor:
    row = torch.empty(cache.layout.bytes_per_snapshot, dtype=torch.uint8)
    cache.pack_slot(slot, position, row)
    return row


def replay(
    driver: Any,
    pages: list[int],
    tokens: list[int],
    position: int,
    *,
    most: int = 10**6,
    rows: int = 0,
    stale: float = float("nan"),
) -> int:
    """A slot rebuilt at `position` over rows of `stale`; `rows` tokens are read, all that are needed unless said."""
    sequence = driver.start()
    ring = driver.layout.window_ring
    for window in driver.cache.windows:
        rows_of_slot = window.storage[sequence.slot * ring : (sequence.slot + 1) * ring]
        rows_of_slot.fill_(stale if rows_of_slot.is_floating_point() else 255)
    first = position - (rows or replay_rows(driver.model.config, position))
    for start in range(first, position, most):
        sequence.computed, sequence.pages = start, pages
        batch = driver.batch([(sequence, tokens[start : min(start + most, position)])])
        driver.model.replay(batch, driver.cache, position)
    driver.free_slots.insert(0, sequence.slot)
    return sequence.slot


@pytest.fixture(scope="module")
def cold(tools: Any) -> Any:
    """A request computed token by token after its first page, with a snapshot at every position."""
    model = tools.random_model(tiny_config(tools), seed=3, deterministic=True)
    tokens = tools.random_tokens(model.config, LENGTH, seed=4)
    driver = tools.Driver(model, page_order=[2, 5, 1])
    sequence = driver.start()
    snapshots = {}
    edges = [*range(0, PAGE_TOKENS, 64), *range(PAGE_TOKENS, LENGTH + 1)]
    for start, stop in itertools.pairwise(edges):
        driver.step([(sequence, tokens[start:stop])], every_row=False)
        snapshots[stop] = snapshot(driver.cache, sequence.slot, stop)
    return driver, sequence, tokens, snapshots


def test_a_replay_is_the_first_pass_at_every_residue(cold: Any) -> None:
    """All residues mod 4, 128 and 256, in one batch or cut into several."""
    driver, sequence, tokens, snapshots = cold
    before = [store.storage.clone() for store in (*driver.cache.entries, *driver.cache.index_keys) if store is not None]
    positions = [p for p in snapshots if p >= PAGE_TOKENS]
    assert {p % PAGE_TOKENS for p in positions} == set(range(PAGE_TOKENS))
    for position in positions:
        most = 10**6 if position % 3 else (1, 5, 17, 48, 90)[position % 5] if position % 8 == 0 else 64
        slot = replay(driver, sequence.pages, tokens, position, most=most)
        assert slot != sequence.slot
        assert torch.equal(snapshot(driver.cache, slot, position), snapshots[position]), position
    after = [store.storage for store in (*driver.cache.entries, *driver.cache.index_keys) if store is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), "a replay wrote into pages"


@pytest.mark.parametrize("position", [1, 3, 4, 5, 15, 16, 17, 31, 100, 127, 128, 129])
def test_short_prefixes_are_replayed_from_their_first_token(tools: Any, cold: Any, position: int) -> None:
    _, _, tokens, _ = cold
    driver = tools.Driver(cold[0].model, page_order=[3, 4])
    sequence, _ = driver.prompt(tokens[:position])
    slot = replay(driver, sequence.pages, tokens, position)
    assert torch.equal(snapshot(driver.cache, slot, position), snapshot(driver.cache, sequence.slot, position))


@pytest.mark.parametrize(
    ("ratios", "window", "position", "rows"),
    [
        ((0, 0, 0), 16, 256, 45),
        ((0, 0, 0, 0), 128, 300, 300),
        ((4, 0, 4), 16, 303, 45),
        ((128, 4), 16, 383, 127),  # the group in progress is longer than the triangle
        ((4, 128), 16, 383, 142),
        ((4, 128), 16, 384, 30),  # between groups nothing is pending
    ],
)
def test_one_row_fewer_is_not_enough(
    tools: Any, ratios: tuple[int, ...], window: int, position: int, rows: int
) -> None:
    config = tiny_config(tools, ratios, sliding_window=window, num_hash_layers=0)
    net = tools.random_model(config, seed=5, deterministic=True)
    tokens = tools.random_tokens(config, position + 1, seed=6)
    driver = tools.Driver(net, page_order=[4, 2])
    sequence, _ = driver.prompt(tokens[:position], chunk=100)
    expected = snapshot(driver.cache, sequence.slot, position)
    pages, needed = list(sequence.pages), replay_rows(config, position)
    assert needed == rows
    slot = replay(driver, pages, tokens, position)
    assert torch.equal(snapshot(driver.cache, slot, position), expected)
    if needed < position:
        slot = replay(driver, pages, tokens, position, rows=needed - 1, stale=0.5)
        assert not torch.equal(snapshot(driver.cache, slot, position), expected)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_replayed_request_goes_on_like_the_first(tools: Any, deterministic: bool) -> None:
    """Window 128, six layers, as in the model itself; fast ops agree within rounding."""
    net = tools.random_model(tools.nano_config(), seed=9, deterministic=deterministic)
    tokens = tools.random_tokens(net.config, 840, seed=10)
    driver = tools.Driver(net)
    sequence, logits = driver.prompt(tokens[:805], chunk=300)
    resumed = driver.start()
    resumed.computed, resumed.pages = 805 - replay_rows(net.config, 805), list(sequence.pages)
    driver.model.replay(driver.batch([(resumed, tokens[resumed.computed : 805])]), driver.cache, 805)
    expected = driver.step([(sequence, tokens[805:])])
    ours = driver.step([(resumed, tokens[805:])])
    tolerance = 0.0 if deterministic else 1e-5 * float(logits.abs().max())
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("numerics", ["plain", "official"])
@pytest.mark.parametrize("draft_rows", [0, 7])
def test_stored_formats_are_replayed_to_the_bit(tools: Any, numerics: str, draft_rows: int) -> None:
    """FP8 rows, rounded index keys, bfloat16 arithmetic, and rings that are longer than the window."""
    net = tools.random_model(tiny_config(tools), seed=11, deterministic=True, dtype=torch.bfloat16, numerics=numerics)
    tokens = tools.random_tokens(net.config, 420, seed=12)
    driver = tools.Driver(net)
    driver.layout = KVLayout(
        config=net.config,
        row_format="fp8",
        index_format="fp4" if numerics == "official" else "fp8",
        draft_rows=draft_rows,
    )
    driver.cache = KVCache(driver.layout, num_pages=4, num_slots=2, device="cpu", dtype=torch.bfloat16)
    sequence = driver.start()
    done = 0
    for position in (130, 259, 301, 384, 402):
        driver.step([(sequence, tokens[done:position])], every_row=False)
        done = position
        expected = snapshot(driver.cache, sequence.slot, position)
        slot = replay(driver, list(sequence.pages), tokens, position, most=50)
        assert torch.equal(snapshot(driver.cache, slot, position), expected), position


@pytest.mark.parametrize(("name", "rows", "equivalents"), [("flash", 5461, 2667), ("pro", 7747, 3810)])
def test_triangle_of_the_official_models(name: str, rows: int, equivalents: int) -> None:
    """The published arithmetic: L (W - 1) rows enter, and about half of them times L are computed."""
    config = preset(name)
    for position in (1 << 20, (1 << 20) - 1, 777_777):
        assert replay_rows(config, position) == rows
        layers = replay_layers(config, position)
        assert sum(position - layer.output for layer in layers) / len(layers) == equivalents
    assert replay_rows(config, 1000) == 1000 and replay_rows(config, 0) == 0


def test_layers_of_a_replay_fit_together(tools: Any) -> None:
    for window in (2, 16, 128, 200):
        config = tiny_config(tools, (128, 4, 0, 4, 128), sliding_window=window)
        for position in (*range(0, 300, 7), 4096, 4223):
            layers = replay_layers(config, position)
            for below, above in itertools.pairwise(layers):
                assert below.output == above.start
            assert layers[-1].output == position
            for kind, layer in zip(config.layer_kinds, layers, strict=True):
                assert 0 <= layer.start <= max(0, position - (window - 1))
                assert layer.start <= max(0, layer.output - (window - 1)) or layer.output == position
                assert layer.start <= layer.fold
                if kind == "csa":
                    assert layer.fold == max(0, position // CSA_RATIO * CSA_RATIO - CSA_RATIO)
                if kind == "hca":
                    assert layer.fold == position // HCA_RATIO * HCA_RATIO
