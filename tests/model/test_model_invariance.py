"""Chunked = whole, batched = alone, page order irrelevant: to the bit in deterministic mode.

In the other mode sums are taken in another order: 1e-5 of the largest logit, and the same greedy token.
"""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

LENGTH = 300


@pytest.fixture(scope="module", params=[True, False], ids=["deterministic", "fast"])
def whole(request: pytest.FixtureRequest, tools: Any) -> tuple[Any, list[int], torch.Tensor, Any]:
    """A model, a prompt, its logits computed in one piece and alone, and what "equal" means."""
    model = tools.random_model(tools.nano_config(), seed=21, deterministic=request.param)
    tokens = tools.random_tokens(model.config, LENGTH, seed=22)
    _, logits = tools.Driver(model).prompt(tokens)

    def same(ours: torch.Tensor, expected: torch.Tensor) -> None:
        tolerance = 0.0 if request.param else 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)
        assert ours.argmax(-1).tolist() == expected.argmax(-1).tolist()

    return model, tokens, logits, same


@settings(max_examples=12, deadline=None, derandomize=True)
@given(cuts=st.sets(st.integers(1, LENGTH - 1), max_size=12))
def test_chunked_is_whole(tools: Any, whole: Any, cuts: set[int]) -> None:
    model, tokens, logits, same = whole
    driver = tools.Driver(model)
    sequence = driver.start()
    edges = [0, *sorted(cuts), LENGTH]
    parts = [driver.step([(sequence, tokens[a:b])]) for a, b in itertools.pairwise(edges)]
    same(torch.cat(parts), logits)


def test_batched_is_alone(tools: Any, whole: Any) -> None:
    model, tokens, logits, same = whole
    driver = tools.Driver(model)
    others = [driver.start() for _ in range(3)]
    for other, length in zip(others, (1, 140, 77), strict=True):
        driver.step([(other, tools.random_tokens(model.config, length, seed=length))])
    sequence = driver.start()
    parts = []
    for at, end in ((0, 129), (129, 130), (130, 257), (257, LENGTH)):
        noise = [
            (o, tools.random_tokens(model.config, n, seed=end + n)) for o, n in zip(others, (1, 1, 9), strict=True)
        ]
        chunks = [*noise[:2], (sequence, tokens[at:end]), noise[2]]
        rows = driver.step(chunks)
        parts.append(rows[2 : 2 + end - at])
    same(torch.cat(parts), logits)


def test_page_order_does_not_matter(tools: Any, whole: Any) -> None:
    model, tokens, logits, same = whole
    driver = tools.Driver(model, page_order=[9, 3, 14, 1])
    same(driver.prompt(tokens, chunk=200)[1], logits)


def test_copied_pages_serve_as_well(tools: Any, whole: Any) -> None:
    model, tokens, logits, same = whole
    driver = tools.Driver(model, page_order=[5, 6])
    sequence, _ = driver.prompt(tokens[:290])
    driver.cache.copy_pages(torch.tensor([5, 6]), torch.tensor([2, 11]))
    sequence.pages = [2, 11]
    same(driver.step([(sequence, tokens[290:])]), logits[290:])


def test_greedy_tokens_in_a_batch(tools: Any, whole: Any) -> None:
    model, tokens, _, _ = whole
    prompts = [tokens[:n] for n in (3, 60, 127, 200)]
    alone = []
    for prompt in prompts:
        driver = tools.Driver(model)
        sequence, logits = driver.prompt(prompt)
        alone.append(driver.greedy(sequence, logits[-1], 12)[0])
    driver = tools.Driver(model)
    started = [driver.start() for _ in prompts]
    logits = driver.step(list(zip(started, prompts, strict=True)), every_row=False)
    together: list[list[int]] = [[] for _ in prompts]
    for _ in range(12):
        for row, token in enumerate(logits.argmax(-1).tolist()):
            together[row].append(token)
        logits = driver.step([(s, [t[-1]]) for s, t in zip(started, together, strict=True)])
    assert together == alone


def test_stale_memory_is_never_read(tools: Any, whole: Any) -> None:
    """Rings and pages full of NaN change nothing: a request reads only what it has written."""
    model, tokens, logits, same = whole
    driver = tools.Driver(model)
    for store in (*driver.cache.windows, *driver.cache.entries, *driver.cache.index_keys):
        if store is not None:
            store.storage.fill_(float("nan"))
    parts = [driver.prompt(tokens[:n], chunk=70)[1] for n in (2, 130, LENGTH)]
    same(parts[2], logits)
    assert all(bool(part.isfinite().all()) for part in parts)


def test_a_slot_is_reusable_after_reset(tools: Any, whole: Any) -> None:
    model, tokens, logits, same = whole
    driver = tools.Driver(model, num_slots=1)
    first, _ = driver.prompt(tools.random_tokens(model.config, 91, seed=1))
    driver.free_slots.append(first.slot)
    same(driver.prompt(tokens, chunk=100)[1], logits)


def test_both_modes_agree(tools: Any) -> None:
    config = tools.nano_config()
    tokens = tools.random_tokens(config, 200, seed=9)
    rows = [tools.Driver(tools.random_model(config, deterministic=d)).prompt(tokens)[1] for d in (True, False)]
    torch.testing.assert_close(rows[0], rows[1], rtol=0, atol=1e-5 * float(rows[0].abs().max()))


def test_small_workspaces_change_nothing(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast ops in many small tiles and blocks: what a long context makes of them."""
    from model.ops.cpu import attention, hyper, index, norm, topk

    model = tools.random_model(tools.nano_config(), seed=23)
    tokens = tools.random_tokens(model.config, 420, seed=24)
    others = [tools.random_tokens(model.config, n, seed=n) for n in (300, 90)]

    def run() -> torch.Tensor:
        driver = tools.Driver(model)
        sequence, logits = driver.prompt(tokens[:400], chunk=170)
        neighbours = [driver.prompt(other)[0] for other in others]
        rows = [logits]
        for token in tokens[400:]:
            rows.append(driver.step([(sequence, [token]), *((n, [token]) for n in neighbours)])[:1])
        return torch.cat(rows)

    expected = run()
    for module, name, value in (
        (attention, "WORKSPACE_ROWS", 400),
        (attention, "SCORES", 1000),
        (index, "ENTRY_BLOCK", 24),
        (index, "LEAST_KEYS", 5),
        (index, "PRODUCTS", 1000),
        (index, "KEYS", 30),
        (topk, "GROUP", 3),
        (hyper, "_TILE_ELEMENTS", 1000),
        (norm, "_TILE_ELEMENTS", 500),
    ):
        monkeypatch.setattr(module, name, value)
    torch.testing.assert_close(run(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
