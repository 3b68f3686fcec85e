"""On `nano` in fp32, deterministic: however a request came to a position, it goes on as the cold run did, to the bit of
every logit, at every residue mod 4, 128 and 256.
"""

import random
from dataclasses import replace
from typing import Any

import pytest
from runner.core_lab import Engine
from runner.long_run import COUNT, FIRST, LANES, WHOLE, LongRun, decoded, engine_for, in_one_piece

from engine.runner.host_store import HostPages, SnapshotArena
from model.kv_cache import KVCache
from model.kv_layout import PAGE_TOKENS

LAST = FIRST + COUNT
EVERY = set(range(FIRST, LAST))
STARTS = range(FIRST, LAST, COUNT // LANES)


@pytest.fixture(scope="module")
def fast_run(nano_lab: Any) -> LongRun:
    return decoded(nano_lab)


@pytest.fixture(scope="module")
def run(nano_lab: Any, fast_run: LongRun) -> LongRun:
    return in_one_piece(nano_lab, fast_run.tokens)


def restored(engine: Engine) -> set[int]:
    return {restore.position for plan in engine.executor.plans for restore in plan.slot_restores}


def staircase(engine: Engine, run: LongRun, *, rounds: int = COUNT // LANES, tolerance: float = 0.0) -> None:
    """Sixteen conversations, each turn one token longer than the last: all of them go on where the last one ended."""
    first = engine.ask(run.tokens[:LAST], 2, anchors=tuple(STARTS))
    run.check(first, LAST, tolerance=tolerance)
    for turn in range(rounds):
        lengths = [start + turn + 1 for start in STARTS]
        for length in lengths:
            engine.submit(f"{length}", run.tokens[:length], 1)
        engine.run()
        for length in lengths:
            answer = engine.answers[f"{length}"]
            assert answer.cached_tokens == length - 1
            run.check(answer, length, tolerance=tolerance)


def take_all_pages(engine: Engine) -> None:
    """Somebody else has all pages of the device for a moment: what is cached goes to host memory."""
    kv, num_tokens = engine.core.scheduler.kv, engine.executor.config.num_pages * PAGE_TOKENS
    admitted = kv.admit("stranger", num_tokens)
    assert isinstance(admitted, tuple), "somebody holds pages on the device"
    kv.extend(admitted[0], num_tokens)
    kv.release(admitted[0])


def send_home(engine: Engine) -> None:
    """Preempt whoever runs, and let somebody else have all pages of the device for a moment."""
    scheduler, now = engine.core.scheduler, 0.0
    if not scheduler.num_running:
        return
    scheduler._preempt(LANES * engine.executor.config.num_pages, now)
    assert not scheduler.num_running
    # Slots are kept until the next plan has saved them; then everything goes to host memory.
    engine.step()
    if scheduler.num_running or not scheduler.num_waiting:
        return
    take_all_pages(engine)


def test_a_turn_goes_on_wherever_the_last_one_ended(nano_lab: Any, run: LongRun) -> None:
    """Shared pages, a copy of the last one and a snapshot, at every position."""
    engine = engine_for(nano_lab)
    staircase(engine, run)
    assert restored(engine) == EVERY
    copies = sum(len(plan.page_copies) for plan in engine.executor.plans)
    assert copies == COUNT - 1, "all but the one at the end of a page copy it"


def test_preempted_after_every_token(nano_lab: Any, run: LongRun) -> None:
    """Sixteen answers of sixteen tokens hibernate at every position; their pages go to host memory and come back."""
    engine = engine_for(nano_lab, output_quantile=0.5, places={"max_num_seqs": LANES})
    engine.ask(run.tokens[:LAST], 1, anchors=tuple(STARTS))
    length = COUNT // LANES
    for start in STARTS:
        engine.submit(f"{start}", run.tokens[: start + 1], length)
    while engine.has_work:
        engine.step()
        send_home(engine)
    for start in STARTS:
        run.check(engine.answers[f"{start}"], start + 1)
    assert restored(engine) == EVERY
    stats, plans = engine.stats, engine.executor.plans
    assert stats.num_hibernations == stats.num_wakes == LANES * (length - 1)
    assert stats.num_recomputed_tokens == 0
    assert sum(len(plan.page_spills) for plan in plans) >= LANES * (length - 1)
    assert stats.num_free_pages == engine.executor.config.num_pages and stats.num_free_slots == LANES


def test_a_replay_goes_on_like_the_first_pass(nano_lab: Any, run: LongRun) -> None:
    engine = engine_for(nano_lab, places={"num_snapshots": 0, "num_host_pages": 0})
    engine.ask(run.tokens[:LAST], 1)
    for residue in (0, 3, 127, 128, 255):
        engine.submit(f"{residue}", run.tokens[: FIRST + residue + 1], 3)
    engine.run()
    for residue in (0, 3, 127, 128, 255):
        run.check(engine.answers[f"{residue}"], FIRST + residue + 1)
    replays = [replay.position for plan in engine.executor.plans for replay in plan.replays]
    assert replays == [FIRST] * 5


@pytest.mark.parametrize("seed", range(2))
def test_chunks_of_any_size_in_any_order_of_pages(nano_lab: Any, run: LongRun, seed: int) -> None:
    rng = random.Random(seed)
    engine = Engine(nano_lab, page_order=seed, top=WHOLE, enable_prefix_cache=False)
    answer = engine.submit("long", run.tokens[: LAST - 3], 4)
    scheduler, sizes = engine.core.scheduler, set()
    while engine.has_work:
        rows = rng.choice((1, 2, 3, 5, 31, 64, 127, 128, 129, 300))
        scheduler.config = replace(scheduler.config, max_num_batched_tokens=rows)
        engine.step()
        sizes |= {row.num_tokens for row in engine.executor.plans[-1].scheduled}
    run.check(answer, LAST - 3)
    assert len(sizes) >= 4


def test_with_the_fast_operations_logits_are_near(nano_lab: Any, fast_run: LongRun) -> None:
    """Sums in another order: within 1e-5 of the largest logit (measured 1.2e-6)."""
    engine = engine_for(nano_lab, deterministic=False)
    staircase(engine, fast_run, tolerance=1e-5)
    assert restored(engine) == EVERY


BREAKS: list[tuple[type, str, bool]] = [
    (SnapshotArena, "restore", False),
    (KVCache, "copy_pages", False),
    (HostPages, "load", True),
]


@pytest.mark.parametrize(("owner", "name", "spilled"), BREAKS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_lost_copy_would_be_seen(
    nano_lab: Any, run: LongRun, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, spilled: bool
) -> None:
    engine = engine_for(nano_lab)
    answer = engine.ask(run.tokens[: FIRST + 130], 3, anchors=(FIRST + 129,))
    run.check(answer, FIRST + 130)
    if spilled:
        take_all_pages(engine)
    monkeypatch.setattr(owner, name, lambda *_: None)
    with pytest.raises(AssertionError):
        run.check(engine.ask(run.tokens[: FIRST + 130], 3), FIRST + 130)
