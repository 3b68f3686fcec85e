"""On small random models, deterministic: an answer from cached memory is the cold one, log probabilities to the bit."""

import random
from typing import Any

import pytest
from runner.core_lab import Engine, assert_same, cold


@pytest.mark.parametrize("length", [130, 255, 256, 257, 301, 383, 511, 514])
def test_a_follow_up_goes_on_at_the_exact_token(short_lab: Any, length: int) -> None:
    engine = Engine(short_lab)
    first = short_lab.prompt(length, seed=length)
    answer = engine.ask(first, 9)
    assert_same(answer, cold(short_lab, first, 9))
    later = [*first, *answer.tokens, *short_lab.prompt(37, seed=1)]
    again = engine.ask(later, 6)
    # The last token of an answer is sampled and never computed.
    assert again.cached_tokens == length + 8
    assert_same(again, cold(short_lab, later, 6))


def test_a_dropped_turn_goes_on_where_it_opened(short_lab: Any) -> None:
    engine = Engine(short_lab)
    first = short_lab.prompt(403, seed=5)
    engine.ask(first, 7, anchors=(390,))
    other = [*first[:390], *short_lab.prompt(30, seed=6)]
    again = engine.ask(other, 6)
    assert again.cached_tokens == 390
    assert_same(again, cold(short_lab, other, 6))


@pytest.mark.parametrize("page", [2, 3])
def test_a_replay_rebuilds_what_no_snapshot_holds(short_lab: Any, page: int) -> None:
    engine = Engine(short_lab, host_cache_bytes=0)
    first = short_lab.prompt(900, seed=8)
    engine.ask(first, 3)
    other = [*first[: 256 * page + 20], *short_lab.prompt(200, seed=9)]
    again = engine.ask(other, 6)
    assert_same(again, cold(short_lab, other, 6))
    assert again.cached_tokens == 256 * page


def test_the_second_that_leaves_a_prompt_is_replayed_and_the_third_restored(short_lab: Any) -> None:
    engine = Engine(short_lab)
    shared = short_lab.prompt(1100, seed=20)
    engine.ask([*shared, *short_lab.prompt(200, seed=21)], 3)
    for seed, way in ((22, "replays"), (23, "slot_restores")):
        prompt = [*shared, *short_lab.prompt(60, seed=seed)]
        num_plans = len(engine.executor.plans)
        again = engine.ask(prompt, 6)
        assert_same(again, cold(short_lab, prompt, 6))
        assert again.cached_tokens == 1024
        assert sum(len(getattr(plan, way)) for plan in engine.executor.plans[num_plans:]) == 1


def test_a_long_prompt_leaves_snapshots_on_its_way(short_lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 32K tokens; here every 512."""
    monkeypatch.setattr("engine.step_builder.PERIODIC_SNAPSHOT_TOKENS", 512)
    engine = Engine(short_lab)
    first = short_lab.prompt(1700, seed=24)
    engine.ask(first, 3)
    kept = {(snapshot.kind, snapshot.position) for snapshot in engine.core.scheduler.kv.snapshots}
    assert kept == {("periodic", 512), ("periodic", 1024), ("periodic", 1536), ("turn_end", 1702)}
    other = [*first[:1030], *short_lab.prompt(100, seed=25)]
    again = engine.ask(other, 6)
    assert again.cached_tokens == 1024
    assert [restore.position for restore in engine.orders("slot_restores")] == [1024]
    assert_same(again, cold(short_lab, other, 6))


@pytest.mark.parametrize("seed", range(4))
def test_pressure_changes_no_answer(short_lab: Any, seed: int) -> None:
    """Few pages and slots, shared prefixes, requests that come while others run. Everything is reserved in whole."""
    chance = random.Random(seed)
    layout = Engine(short_lab).core.executor.config.layout(short_lab.models[True].config)
    slots = 3
    engine = Engine(
        short_lab,
        max_num_seqs=slots,
        max_num_batched_tokens=chance.choice([64, 160]),
        kv_cache_bytes=slots * layout.bytes_per_slot + 9 * layout.bytes_per_page,
        host_cache_bytes=chance.choice([0, 1, 4]) * (4 * layout.bytes_per_snapshot + 6 * layout.bytes_per_page),
    )
    prompts: dict[str, tuple[list[int], int]] = {}
    stems = [short_lab.prompt(chance.randrange(200, 900), seed=100 + i) for i in range(3)]
    for i in range(14):
        stem = chance.choice(stems)
        prompt = [*stem[: chance.randrange(1, len(stem))], *short_lab.prompt(chance.randrange(1, 60), seed=200 + i)]
        answer = chance.randrange(2, 40)
        prompts[f"p{i}"] = (prompt, answer)
        engine.submit(f"p{i}", prompt, answer, anchors=(len(prompt) // 2,) if len(prompt) > 1 else ())
        for _ in range(chance.randrange(0, 12)):
            engine.step()
    engine.run()
    for name, (prompt, answer) in prompts.items():
        assert_same(engine.answers[name], cold(short_lab, prompt, answer))
    stats = engine.stats
    assert stats.num_free_pages == engine.core.executor.config.num_pages
    assert stats.num_free_slots == slots
    if engine.core.executor.config.num_snapshots:
        assert any(answer.cached_tokens for answer in engine.answers.values())


def test_nanos_layers_and_window_resume_as_well(lab: Any) -> None:
    """Six layers and a window of 128: a snapshot in the first follow-up, a replay of 762 rows in the second."""
    first = lab.prompt(1100, seed=3)
    expected = cold(lab, first, 5)
    for flags in ({}, {"host_cache_bytes": 0}):
        engine = Engine(lab, **flags)
        answer = engine.ask(first, 5)
        assert_same(answer, expected)
        later = [*first, *answer.tokens, *lab.prompt(30, seed=4)]
        again = engine.ask(later, 5)
        assert again.cached_tokens == (1024 if flags else 1104)
        assert_same(again, cold(lab, later, 5))


@pytest.mark.parametrize(("seed", "hibernates"), [(0, True), (1, True), (2, False)])
def test_a_preempted_answer_is_the_undisturbed_one(short_lab: Any, seed: int, hibernates: bool) -> None:
    """Memory is promised for less than the answers turn out to need. With host memory the preempted hibernate, and go
    on where they were; without it their pages may be gone and are computed again.
    """
    layout = Engine(short_lab).core.executor.config.layout(short_lab.models[True].config)
    engine = Engine(
        short_lab,
        output_quantile=0.1,
        max_num_seqs=4,
        kv_cache_bytes=4 * layout.bytes_per_slot + 6 * layout.bytes_per_page,
        host_cache_bytes=16 * (layout.bytes_per_snapshot + layout.bytes_per_page) if hibernates else 0,
    )
    # So many answers of one token that the quantile believes them; the next ones outgrow their only page.
    for i in range(20):
        engine.submit(f"short{i}", short_lab.prompt(8, seed=500 + i), 1)
    engine.run()
    prompts = {f"long{i}": short_lab.prompt(226 + 7 * i, seed=1000 * seed + i) for i in range(4)}
    for name, prompt in prompts.items():
        engine.submit(name, prompt, 70)
    engine.run()
    for name, prompt in prompts.items():
        assert_same(engine.answers[name], cold(short_lab, prompt, 70))
    stats = engine.stats
    assert stats.num_preemptions > 0
    if hibernates:
        assert stats.num_hibernations > 0 and stats.num_wakes > 0
    assert stats.num_free_pages == engine.core.executor.config.num_pages
    assert stats.num_free_slots == 4
