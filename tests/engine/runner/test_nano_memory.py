"""Bytes on `nano`, measured: pools have the bytes of the sizing function, and no step takes more than the workspace.

Measured are torch's CPU allocator (every tensor, temporaries inside operators included) and, for pools, host places and
what the runner keeps of a request, Python's and numpy's. Libraries' own threads and code are in neither.
"""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from runner.allocations import allocations
from runner.core_lab import Engine

from engine.config import workspace_bytes
from engine.messages import SamplingParams
from engine.plan import NewRequest, ScheduledTokens, SlotRestore, SlotSnapshot, StepPlan
from engine.runner.executor import ModelExecutor
from engine.runner.host_store import HostPages, SnapshotArena
from model.kv_cache import KVCache
from model.kv_layout import PAGE_TOKENS, KVLayout
from model.presets import preset

ROWS = 256
MILLION = 1 << 20
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, seed=1, logprobs=5)
PYTHON_BYTES = 100_000
"""Most that objects around the bytes may take."""


def workspace(executor: ModelExecutor) -> int:
    config = executor.config
    return workspace_bytes(
        executor.model,
        dtype=config.dtype,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
    )


def python_bytes(run: Callable[[], object]) -> tuple[int, int]:
    """As `allocations`, of Python's and numpy's memory. What `run` returns is held."""
    tracemalloc.start()
    kept = run()
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return most, held


@pytest.mark.parametrize(("rows", "index"), [("float32", "float32"), ("fp8", "fp8"), ("fp8", "fp4")])
@pytest.mark.parametrize("drafts", [0, 7])
def test_pools_have_the_bytes_of_the_sizing_function(rows: Any, index: Any, drafts: int) -> None:
    layout = KVLayout(config=preset("nano"), row_format=rows, index_format=index, draft_rows=drafts)
    made: list[Any] = []

    def make() -> None:
        cache = KVCache(layout, num_pages=40, num_slots=5, device="cpu", dtype=torch.float32)
        made.extend((cache, HostPages(cache, 7), SnapshotArena(cache, 6)))

    _, by_torch = allocations(make)
    made.clear()
    _, by_python = python_bytes(make)
    planned = 47 * layout.bytes_per_page + 5 * layout.bytes_per_slot + 6 * layout.bytes_per_snapshot
    assert 0 <= by_torch + by_python - planned <= PYTHON_BYTES


class Far:
    """An executor whose requests begin anywhere: the slot is restored, and pages nobody has written are zeros."""

    def __init__(self, lab: Any, *, deterministic: bool = False, num_tokens: int) -> None:
        self.config = replace(
            lab.resolved(max_num_batched_tokens=ROWS),
            num_pages=-(-num_tokens // PAGE_TOKENS),
            max_model_len=num_tokens,
            num_snapshots=2,
        )
        self.executor = ModelExecutor(self.config, lab.models[deterministic])
        self.step_id = 0

    def step(self, start: int, rows: int, *, count: int = 1) -> None:
        """`rows` tokens behind `start` others of each of `count` requests; the last token samples, slots are kept."""
        runner = self.executor._runner
        assert runner is not None
        self.step_id += 1
        num_tokens = start + rows
        names = [f"far{self.step_id}-{slot}" for slot in range(count)]
        ids = np.random.default_rng(start).integers(2, 300, num_tokens).astype(np.int32)
        # Zeros, as if they had been saved there.
        runner.snapshots._positions[0] = start
        new = tuple(
            NewRequest(
                request_id=name,
                slot=slot,
                token_ids=ids,
                num_prompt_tokens=num_tokens,
                sampling=GREEDY,
                num_computed_tokens=start,
            )
            for slot, name in enumerate(names)
        )
        pages = tuple(range(-(-num_tokens // PAGE_TOKENS)))
        scheduled = tuple(
            ScheduledTokens(request_id=name, start=start, num_tokens=rows, new_page_ids=pages, samples=True)
            for name in names
        )
        plan = StepPlan(
            step_id=self.step_id,
            new=new,
            scheduled=scheduled,
            slot_restores=tuple(SlotRestore(slot, 0, start) for slot in range(count)) if start else (),
            slot_snapshots=(SlotSnapshot(0, num_tokens, 1),),
        )
        assert len(self.executor.execute(plan).token_ids) == count
        self.executor.execute(StepPlan(step_id=self.step_id, finished=tuple(names)))


@pytest.mark.parametrize(
    ("start", "rows", "deterministic"),
    [(0, ROWS, False), (5000, ROWS, False), (65_536, ROWS, False), (MILLION - 2, 1, False), (5000, ROWS, True)],
)
def test_a_step_takes_no_more_than_the_workspace(nano_lab: Any, start: int, rows: int, deterministic: bool) -> None:
    far = Far(nano_lab, deterministic=deterministic, num_tokens=MILLION)
    far.step(0, 2)
    most, held = allocations(lambda: far.step(start, rows))
    assert most <= workspace(far.executor)
    assert held == 0


def test_no_step_of_a_life_takes_more_than_the_workspace(nano_lab: Any) -> None:
    """Prompts in chunks, answers, copies, restores, replays, snapshots, spills and loads."""
    places = {"num_pages": 9, "max_num_seqs": 3, "num_host_pages": 8, "num_snapshots": 4}
    engine = Engine(nano_lab, deterministic=False, places=places, max_num_batched_tokens=ROWS)
    first = nano_lab.prompt(1500, seed=1)
    engine.ask(nano_lab.prompt(300, seed=9), 2)
    measured: list[tuple[int, int]] = []

    def ask(prompt: list[int], answer: int) -> None:
        engine.submit(f"{len(engine.answers)}", prompt, answer, (len(prompt) - 5,))
        while engine.has_work:
            measured.append(allocations(engine.step))

    ask(first, 4)
    ask([*first, *nano_lab.prompt(30, seed=2)], 2)
    ask([*first[:1300], *nano_lab.prompt(30, seed=3)], 2)
    engine.take_all_pages()
    ask([*first, *nano_lab.prompt(20, seed=4)], 2)
    for kind in ("page_copies", "page_spills", "page_loads", "slot_restores", "replays", "slot_snapshots"):
        assert engine.orders(kind), kind
    assert max(most for most, _ in measured) <= workspace(engine.executor)
    assert {held for _, held in measured} == {0}


def test_a_request_takes_little_beside_its_history(nano_lab: Any) -> None:
    """At most 100 MB at a million tokens: a slot (15 MB with 7 drafts, for Pro), and what the runner keeps of it."""
    far = Far(nano_lab, num_tokens=MILLION)
    most, tables = python_bytes(lambda: far.step(MILLION - 8, 7))
    assert most <= 100e6 - 15e6
    assert tables <= 4 * far.config.max_num_seqs * far.config.num_pages + PYTHON_BYTES
    _, held = python_bytes(lambda: far.step(MILLION - 8, 7))
    assert held <= PYTHON_BYTES


@pytest.mark.long
def test_a_step_at_a_million_tokens_takes_no_more_than_the_workspace(nano_lab: Any) -> None:
    far = Far(nano_lab, num_tokens=MILLION)
    far.step(0, 2)
    most, held = allocations(lambda: far.step(MILLION - ROWS, ROWS))
    assert most <= workspace(far.executor)
    assert held == 0


@pytest.mark.long
def test_eight_answers_at_a_million_tokens_take_no_more_than_the_workspace(nano_lab: Any) -> None:
    far = Far(nano_lab, num_tokens=MILLION)
    far.step(0, 2)
    most, held = allocations(lambda: far.step(MILLION - 2, 1, count=8))
    assert most <= workspace(far.executor)
    assert held == 0
