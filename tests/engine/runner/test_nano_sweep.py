"""The whole sweep on `nano` that `test_nano_equality` takes a part of: minutes."""

import random
from dataclasses import replace
from typing import Any

import pytest
from runner.core_lab import Engine
from runner.long_run import COUNT, EVERY, FIRST, LANES, LAST, WHOLE, LongRun, engine_for

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


def test_a_replay_and_the_rest_of_the_prompt_at_every_residue(nano_lab: Any, nano_run: LongRun) -> None:
    engine = engine_for(nano_lab, places={"num_snapshots": 0, "num_host_pages": 0})
    engine.ask(nano_run.tokens[:LAST], 1)
    for start in range(FIRST + 1, LAST + 1, LANES):
        for length in range(start, start + LANES):
            engine.submit(f"{length}", nano_run.tokens[:length], 2)
        engine.run()
        for length in range(start, start + LANES):
            assert engine.answers[f"{length}"].cached_tokens == FIRST
            nano_run.check(engine.answers[f"{length}"], length)
    assert [replay.position for replay in engine.orders("replays")] == [FIRST] * COUNT


def test_a_snapshot_inside_a_prompt_at_every_residue(nano_lab: Any, nano_run: LongRun) -> None:
    """Four tokens from each; no two of these snapshots stand at one position."""
    engine = engine_for(nano_lab)
    engine.ask(nano_run.tokens[:LAST], 2, anchors=tuple(range(FIRST, LAST)))
    for start in range(FIRST, LAST, LANES):
        for position in range(start, start + LANES):
            engine.submit(f"{position}", nano_run.tokens[: position + 1], 4 if position < LAST - 4 else 1)
        engine.run()
        for position in range(start, start + LANES):
            assert engine.answers[f"{position}"].cached_tokens == position
            nano_run.check(engine.answers[f"{position}"], position + 1)
    assert {restore.position for restore in engine.orders("slot_restores")} == EVERY


@pytest.mark.parametrize("size", [2, 3, 5, 17, 64, 100, 127, 128, 129, 255, 256, 257, 513, 1023, 1279])
def test_every_size_of_chunks(nano_lab: Any, nano_run: LongRun, size: int) -> None:
    engine = Engine(nano_lab, page_order=size, top=WHOLE, enable_prefix_cache=False, max_num_batched_tokens=size + 8)
    scheduler = engine.core.scheduler
    scheduler.config = replace(scheduler.config, max_num_batched_tokens=size)
    # With few rows a step the last page is enough.
    begin = FIRST + 192 if size < 17 else LAST - 2
    nano_run.check(engine.ask(nano_run.tokens[:begin], 2), begin)


@pytest.mark.parametrize("seed", range(6))
def test_random_lives(nano_lab: Any, nano_run: LongRun, seed: int) -> None:
    """Beginnings of the run, some cut short or led astray, in random steps, preempted, under pressure."""
    rng = random.Random(seed)
    places = {"num_pages": rng.choice((12, 20, 40)), "max_num_seqs": rng.choice((2, 3, 4))}
    places |= {"num_host_pages": rng.choice((0, 10, 60)), "num_snapshots": rng.choice((0, 3, 60))}
    engine = engine_for(nano_lab, output_quantile=rng.choice((0.3, 1.0)), places=places)
    scheduler, lengths = engine.core.scheduler, {}
    for number in range(14):
        length = rng.choice((rng.randrange(FIRST, LAST), rng.randrange(FIRST + 1, LAST), FIRST, LAST - 40))
        count = rng.choice((1, 3, 20, 40))
        prompt = nano_run.tokens[:length]
        if rng.random() < 0.25:
            kept = rng.randrange(1, length)
            engine.submit(f"astray{number}", [*prompt[:kept], *nano_lab.prompt(rng.randrange(1, 60), seed=number)], 3)
        anchors = (rng.randrange(1, length),) if rng.random() < 0.5 else ()
        engine.submit(f"{number}", prompt, count, anchors)
        lengths[f"{number}"] = length
        for _ in range(rng.randrange(20)):
            rows = rng.choice((33, 64, 200, 1000))
            scheduler.config = replace(scheduler.config, max_num_batched_tokens=rows)
            engine.step()
            if rng.random() < 0.06:
                engine.preempt_all()
    scheduler.config = replace(scheduler.config, max_num_batched_tokens=1000)
    engine.run()
    for name, length in lengths.items():
        nano_run.check(engine.answers[name], length)
    stats = engine.stats
    assert stats.num_preemptions > 0
    assert stats.num_free_pages == places["num_pages"] and stats.num_free_slots == places["max_num_seqs"]
