"""On `nano` in fp32, deterministic: however a request came to a position, it goes on as the cold run did, to the bit of
every logit, at every residue mod 4, 128 and 256.
"""

import random
from dataclasses import replace
from typing import Any

import pytest
from runner.core_lab import Engine
from runner.long_run import COUNT, EVERY, FIRST, LANES, LAST, STARTS, WHOLE, LongRun, engine_for

from engine.runner.host_store import HostPages, SnapshotArena
from model.kv_cache import KVCache


def staircase(engine: Engine, run: LongRun, *, tolerance: float = 0.0) -> None:
    """Sixteen conversations, each turn one token longer than the last: all of them go on where the last one ended."""
    first = engine.ask(run.tokens[:LAST], 2, anchors=tuple(STARTS))
    run.check(first, LAST, tolerance=tolerance)
    for turn in range(COUNT // LANES):
        lengths = [start + turn + 1 for start in STARTS]
        for length in lengths:
            engine.submit(f"{length}", run.tokens[:length], 1)
        engine.run()
        for length in lengths:
            answer = engine.answers[f"{length}"]
            assert answer.cached_tokens == length - 1
            run.check(answer, length, tolerance=tolerance)
    assert {restore.position for restore in engine.orders("slot_restores")} == EVERY


def test_a_turn_goes_on_wherever_the_last_one_ended(nano_lab: Any, nano_run: LongRun) -> None:
    """Shared pages, a copy of the last one and a snapshot, at every position."""
    engine = engine_for(nano_lab)
    staircase(engine, nano_run)
    assert len(engine.orders("page_copies")) == COUNT - 1, "all but the one at the end of a page copy it"


def test_preempted_after_every_token(nano_lab: Any, nano_run: LongRun) -> None:
    """Sixteen answers of sixteen tokens hibernate at every position; their pages go to host memory and come back."""
    engine = engine_for(nano_lab, output_quantile=0.5, places={"max_num_seqs": LANES})
    engine.ask(nano_run.tokens[:LAST], 1, anchors=tuple(STARTS))
    length = COUNT // LANES
    for start in STARTS:
        engine.submit(f"{start}", nano_run.tokens[: start + 1], length)
    while engine.has_work:
        engine.step()
        engine.preempt_all()
        # Slots are kept until the next plan has saved them; then everything goes to host memory.
        engine.step()
        engine.take_all_pages()
    for start in STARTS:
        nano_run.check(engine.answers[f"{start}"], start + 1)
    assert {restore.position for restore in engine.orders("slot_restores")} == EVERY
    stats = engine.stats
    assert stats.num_hibernations == stats.num_wakes == LANES * (length - 1)
    assert stats.num_recomputed_tokens == 0
    assert len(engine.orders("page_spills")) >= LANES * (length - 1)
    assert stats.num_free_pages == engine.executor.config.num_pages and stats.num_free_slots == LANES


def test_a_replay_goes_on_like_the_first_pass(nano_lab: Any, nano_run: LongRun) -> None:
    engine = engine_for(nano_lab, places={"num_snapshots": 0, "num_host_pages": 0})
    engine.ask(nano_run.tokens[:LAST], 1)
    for residue in (0, 3, 127, 128, 255):
        engine.submit(f"{residue}", nano_run.tokens[: FIRST + residue + 1], 3)
    engine.run()
    for residue in (0, 3, 127, 128, 255):
        nano_run.check(engine.answers[f"{residue}"], FIRST + residue + 1)
    assert [replay.position for replay in engine.orders("replays")] == [FIRST] * 5


@pytest.mark.parametrize("seed", range(2))
def test_chunks_of_any_size_in_any_order_of_pages(nano_lab: Any, nano_run: LongRun, seed: int) -> None:
    rng = random.Random(seed)
    engine = Engine(nano_lab, page_order=seed, top=WHOLE, enable_prefix_cache=False)
    answer = engine.submit("long", nano_run.tokens[: LAST - 3], 4)
    scheduler, sizes = engine.core.scheduler, set()
    while engine.has_work:
        rows = rng.choice((1, 2, 3, 5, 31, 64, 127, 128, 129, 300))
        scheduler.config = replace(scheduler.config, max_num_batched_tokens=rows)
        engine.step()
        sizes |= {row.num_tokens for row in engine.executor.plans[-1].scheduled}
    nano_run.check(answer, LAST - 3)
    assert len(sizes) >= 4


def test_with_the_fast_operations_logits_are_near(nano_lab: Any, nano_fast_run: LongRun) -> None:
    """Sums in another order: within 1e-5 of the largest logit (measured 1.2e-6)."""
    engine = engine_for(nano_lab, deterministic=False)
    staircase(engine, nano_fast_run, tolerance=1e-5)


BREAKS: list[tuple[type, str, bool]] = [
    (SnapshotArena, "restore", False),
    (KVCache, "copy_pages", False),
    (HostPages, "load", True),
]


@pytest.mark.parametrize(("owner", "name", "spilled"), BREAKS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_lost_copy_would_be_seen(
    nano_lab: Any, nano_run: LongRun, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, spilled: bool
) -> None:
    engine = engine_for(nano_lab)
    answer = engine.ask(nano_run.tokens[: FIRST + 130], 3, anchors=(FIRST + 129,))
    nano_run.check(answer, FIRST + 130)
    if spilled:
        engine.take_all_pages()
    monkeypatch.setattr(owner, name, lambda *_: None)
    with pytest.raises(AssertionError, match=r"logits before|error"):
        nano_run.check(engine.ask(nano_run.tokens[: FIRST + 130], 3), FIRST + 130)
