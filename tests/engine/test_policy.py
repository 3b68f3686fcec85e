"""Opinions and their helpers alone: order, goals, reservations, victims, virtual time, shares, quantiles, pace."""

import math
import random
from dataclasses import replace

import pytest

from engine.budget import StepBudget
from engine.config import EngineConfig, EngineConfigError, MachineFacts, SchedulingConfig, resolve
from engine.cost_model import COEFFICIENTS, CostModel, cost_prior
from engine.fairness import FavouredShare, TenantClock
from engine.output_lengths import LEAST_SAMPLES, WINDOW, OutputLengths
from engine.policy import (
    LEAST_CHUNK,
    ServiceClass,
    is_pressed,
    latest_start,
    long_share_binds,
    order_key,
    prefill_seconds,
    service_class,
    slack,
    step_seconds,
    tokens_to_reserve,
)
from engine.stats import DrainMeter
from engine.victims import RunningRequest, choose
from model.presets import preset

CONFIG = SchedulingConfig(interactive_itl_seconds=0.04, long_itl_seconds=0.2)
SHORT, LONG = ServiceClass.INTERACTIVE, ServiceClass.LONG


def costs(row_seconds: float = 1e-4, step_seconds: float = 0.0) -> CostModel:
    """Linear in the rows."""
    model = CostModel(preset("nano"), cost_prior(preset("nano"), "cpu"))
    linear = dict.fromkeys(COEFFICIENTS, 0.0) | {"step": step_seconds}
    model.set_coefficients(linear | {name: row_seconds for name in COEFFICIENTS if name.startswith("row_")})
    return model


def test_priority_then_class_then_tenant_then_work_decides() -> None:
    def key(**changes: float) -> tuple[float, ...]:
        fields = {
            "priority": 0,
            "service": SHORT,
            "tenant_seconds": 1.0,
            "work_seconds": 1.0,
            "arrival": 1.0,
            "order": 1,
        }
        return order_key(**(fields | changes))  # type: ignore[arg-type]

    better = [
        {"priority": -1, "service": LONG, "tenant_seconds": 9.0, "work_seconds": 9.0},
        {"tenant_seconds": 0.5, "work_seconds": 9.0, "arrival": 9.0},
        {"work_seconds": 0.5, "arrival": 9.0},
        {"arrival": 0.5, "order": 9},
        {},
        {"order": 2},
        {"tenant_seconds": 2.0, "work_seconds": 0.1},
        {"service": LONG, "tenant_seconds": 0.0, "work_seconds": 0.0},
        {"priority": 1, "tenant_seconds": 0.0},
    ]
    keys = [key(**changes) for changes in better]
    assert keys == sorted(keys)


def test_the_class_of_a_prompt_and_the_length_of_a_step() -> None:
    assert service_class(262_143, CONFIG) is SHORT and service_class(262_144, CONFIG) is LONG
    assert step_seconds([], False, CONFIG) == step_seconds([], True, CONFIG) == 0.06
    assert step_seconds([], True, replace(CONFIG, interactive_itl_seconds=0.08)) == 0.08
    for pressed, long in ((False, 0.06), (True, 0.2)):
        assert step_seconds([LONG], pressed, CONFIG) == long
        assert step_seconds([LONG, SHORT], pressed, CONFIG) == 0.04
    # A lengthened step keeps the goal even if it takes longer than predicted, and is no shorter than the usual one.
    assert step_seconds([LONG], True, CONFIG, spread=0.1) == pytest.approx(0.2 / 1.3)
    assert (
        step_seconds([LONG], True, CONFIG, spread=1.0) == 0.06
        and step_seconds([SHORT], True, CONFIG, spread=1.0) == 0.04
    )
    assert step_seconds([], True, CONFIG, alone=True, spread=1.0) == pytest.approx(0.18)
    assert is_pressed(0.4, SHORT, CONFIG) and not is_pressed(0.6, SHORT, CONFIG) and is_pressed(0.6, LONG, CONFIG)
    assert prefill_seconds(0.06, 0.02) == pytest.approx(0.04)
    assert prefill_seconds(0.06, 0.5) == pytest.approx(0.006)


def test_a_prompt_begun_at_its_latest_start_has_no_slack() -> None:
    at = latest_start(10.0, SHORT, 2.0, CONFIG)
    assert at == 10.0 + 1.0 + 4.0
    assert slack(at, 10.0, SHORT, 2.0, 2.0, CONFIG) == pytest.approx(0.0)
    assert slack(at, 10.0, SHORT, 2.0, 0.5, CONFIG) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("known", "prompt", "most", "expected", "preempted", "reserved"),
    [
        (100, 100, 50, None, False, 150),
        (100, 100, 50_000, None, False, 10_000),
        (100, 100, 500, 20, False, 120),
        (100, 100, 10, 20, False, 110),
        (140, 100, 500, 20, False, 141),
        (100, 100, 500, 0, False, 101),
        (140, 100, 5000, 20, True, 140 + 1024),
        (2140, 100, 5000, 20, True, 100 + 2 * 2040),
        (2140, 100, 5000, 4500, True, 4600),
        (2140, 100, 3000, 20, True, 3100),
        (2140, 100, 50_000, None, True, 10_000),
    ],
)
def test_reservation(known: int, prompt: int, most: int, expected: int | None, preempted: bool, reserved: int) -> None:
    found = tokens_to_reserve(
        num_tokens=known,
        num_prompt_tokens=prompt,
        max_tokens=most,
        expected_output=expected,
        least_ahead=1024 if preempted else 0,
        max_model_len=10_000,
    )
    assert found == reserved


def test_the_first_long_request_is_let_in_whatever_its_size() -> None:
    assert not long_share_binds(long_pages=0, pages_wanted=100, num_pages=100, config=CONFIG)
    assert not long_share_binds(long_pages=30, pages_wanted=40, num_pages=100, config=CONFIG)
    assert long_share_binds(long_pages=30, pages_wanted=41, num_pages=100, config=CONFIG)


def test_flags_of_time_are_resolved_and_checked() -> None:
    def resolved(device: str, **flags: float) -> SchedulingConfig:
        facts = MachineFacts(device=device, has_bf16=True, free_bytes=1 << 40, num_cores=4)  # type: ignore[arg-type]
        return resolve(EngineConfig(model_dir="", **flags), preset("nano"), facts).scheduling  # type: ignore[arg-type]

    assert resolved("cuda").step_seconds == 0.06 and resolved("cuda").itl_seconds(SHORT) == 0.075
    assert resolved("cpu").step_seconds == 0.2
    own = resolved("cpu", step_seconds=0.5, interactive_itl_seconds=0.1)
    assert (own.step_seconds, own.itl_seconds(SHORT), own.itl_seconds(LONG)) == (0.5, 0.1, 0.625)
    for flags in (
        {"step_seconds": 0.0},
        {"long_itl_seconds": -1.0},
        {"long_ttft_seconds": math.inf},
        {"interactive_ttft_seconds": math.nan},
        {"long_prefill_share": 1.0},
        {"long_page_share": 0.0},
        {"long_prompt_tokens": 0},
    ):
        with pytest.raises(EngineConfigError, match=next(iter(flags))):
            resolved("cpu", **flags)


def budget(rows: int, seconds: float, **prior: float) -> StepBudget:
    made = StepBudget(costs(**prior), rows)
    made.open_prefill(seconds)
    return made


def test_chunks_are_aligned_whole_or_worth_it() -> None:
    assert budget(1000, 1.0).rows_for(0, 5) == 5
    assert budget(1000, 1.0).rows_for(100, 2000) == 924, "1000 rows would end at 1100"
    assert budget(1000, 0.05015).rows_for(100, 2000) == 412, "501 rows by time"
    assert budget(1000, 0.01015).rows_for(0, 2000) == 101, "no multiple of 128 is within reach"
    second = budget(1000, 0.02015)
    second.take(0, 190)
    assert second.rows_for(0, 2000) == 0 and second.rows_for(0, 9) == 9
    assert second.rows_for(120, 2000) == 8, "an aligned end is worth few rows"
    kept = budget(1000, 0.1)
    assert kept.rows_for(0, 2000, seconds_kept=0.05, rows_kept=0) == 384
    assert kept.rows_for(0, 2000, seconds_kept=0.0, rows_kept=800) == 128
    assert kept.rows_for(0, 2000, seconds_kept=0.1) == kept.rows_for(0, 2000, rows_kept=1000) == 0


def test_the_first_chunk_is_there_even_if_the_model_despairs() -> None:
    hopeless = budget(1000, 0.06, row_seconds=1e6, step_seconds=1e6)
    assert hopeless.rows_for(7, 2000) == LEAST_CHUNK and hopeless.rows_for(7, 3) == 3
    hopeless.take(7, LEAST_CHUNK)
    assert hopeless.rows_for(7, 2000) == 0


@pytest.mark.parametrize("seed", range(20))
def test_a_budget_is_never_exceeded(seed: int) -> None:
    rng = random.Random(seed)
    rows, seconds = rng.randrange(1, 4000), rng.uniform(0.01, 0.4)
    made = StepBudget(costs(rng.choice([1e-5, 1e-4]), rng.choice([0.0, 5e-3])), rows)
    num_decodes = rng.randrange(0, min(rows, 50) + 1)
    began = made.add_decodes(num_decodes, num_decodes * 1000)
    made.open_prefill(seconds)
    for i in range(20):
        start, wanted = rng.randrange(5000), rng.randrange(1, 3000)
        granted = made.rows_for(start, wanted)
        assert 0 <= granted <= min(wanted, made.rows_left)
        if granted:
            made.take(start, granted)
            aligned = (start + granted) % 128 == 0
            assert granted == wanted or aligned or granted >= LEAST_CHUNK or i == 0
            if made.features.num_prefill_rows > LEAST_CHUNK:
                assert made.predicted_seconds <= began + seconds + 1e-12
    assert made.features.num_rows + made.rows_left == rows


def victim(request_id: str, *, priority: int = 0, service: ServiceClass = SHORT, pages: int = 4, seconds: float = 1.0):
    return RunningRequest(
        request_id=request_id,
        priority=priority,
        service=service,
        pages_freed=pages,
        restore_seconds=seconds,
        order=int(request_id),
    )


def test_victims_go_by_priority_then_cost_of_a_page_and_spare_the_last_of_a_class() -> None:
    running = [
        victim("1", priority=-1, seconds=0.0),
        victim("2", seconds=4.0),
        victim("3", seconds=2.0, pages=1),
        victim("4", priority=3, seconds=9.0),
        victim("5", seconds=4.0),
        victim("6", priority=9, service=LONG, seconds=0.0),
        victim("7", priority=9, pages=0),
    ]
    assert choose(running, 1) == ["4"]
    assert choose(running, 5) == ["4", "5"]
    assert choose(running, 13) == ["4", "5", "2", "3"]
    assert choose(running, 18) == ["4", "5", "2", "3", "1", "6"], "the long one last: it is the only one of its class"
    assert choose(running, 0) == []
    assert choose([victim("1"), victim("2", service=LONG)], 1) == ["2"], "somebody has to go"


def test_who_has_come_back_is_taken_for_a_higher_priority_only() -> None:
    running = [victim("1", seconds=4.0), replace(victim("2", seconds=1.0), is_settled=True)]
    assert choose(running, 1, priority=0) == ["1"]
    assert choose(running, 1, priority=-1) == ["2"]
    assert choose(running, 99, priority=0) == ["1"], "its pages are its own until it has outgrown them"


@pytest.mark.parametrize("seed", range(20))
def test_victims_free_enough_and_none_goes_for_nothing(seed: int) -> None:
    rng = random.Random(seed)
    running = [
        victim(
            str(i),
            priority=rng.randrange(3),
            service=rng.choice([SHORT, LONG]),
            pages=rng.randrange(6),
            seconds=rng.random(),
        )
        for i in range(rng.randrange(1, 12))
    ]
    pages = {r.request_id: r.pages_freed for r in running}
    needed = rng.randrange(1, 20)
    chosen = choose(running, needed)
    assert len(set(chosen)) == len(chosen)
    assert sum(pages[i] for i in chosen) >= min(needed, sum(pages.values()))
    assert sum(pages[i] for i in chosen[:-1]) < needed
    left = [r for r in running if r.request_id not in chosen]
    if {r.service for r in running} != {r.service for r in left}:
        for service in {r.service for r in left}:
            holders = [r for r in left if r.service is service and r.pages_freed]
            assert len(holders) <= 1, "a class was emptied although another one could give"


def test_a_tenant_that_stays_away_saves_nothing_and_sheds_nothing() -> None:
    clock = TenantClock()
    clock.enter("busy")
    clock.charge("busy", 100.0)
    clock.enter("new")
    assert clock["new"] == 100.0
    clock.charge("new", 5.0)
    clock.leave("new")
    clock.charge("busy", 1.0)
    clock.enter("new")
    assert clock["new"] == 105.0, "its lead over the others stays"
    clock.charge("busy", 50.0)
    clock.leave("new")
    clock.enter("new")
    assert clock["new"] == 151.0
    clock.leave("busy")
    clock.leave("new")
    clock.enter("third")
    assert clock["third"] == 151.0
    clock.check({"third": 1})


@pytest.mark.parametrize("seed", range(5))
def test_least_served_first_keeps_the_lag_within_one_quantum(seed: int) -> None:
    rng = random.Random(seed)
    clock = TenantClock()
    tenants = [f"t{i}" for i in range(7)]
    for tenant in tenants:
        clock.enter(tenant)
    largest = 0.0
    for _ in range(2000):
        chosen = min(tenants, key=clock.__getitem__)
        quantum = rng.uniform(0.001, 0.06)
        largest = max(largest, quantum)
        clock.charge(chosen, quantum)
        served = [clock[t] for t in tenants]
        assert max(served) - min(served) <= largest


def test_idle_tenants_are_forgotten_when_there_are_many() -> None:
    clock = TenantClock()
    clock.enter("present")
    for i in range(6000):
        clock.enter(str(i))
        clock.leave(str(i))
    assert len(clock._seconds) <= 4098


def test_the_share_is_paid_over_a_few_steps() -> None:
    share = FavouredShare(0.25)
    got = spent = 0.0
    for _ in range(100):
        kept = share.allowance(0.05)
        bought = 0.03 if kept >= 0.03 else 0.0
        share.settle(favoured_seconds=bought, all_seconds=0.05)
        got, spent = got + bought, spent + 0.05
        assert got >= 0.25 * spent - 0.03
    assert got <= 0.25 * spent + 0.03
    for _ in range(100):
        share.settle(favoured_seconds=0.05, all_seconds=0.05)
    assert share.allowance(0.04) == pytest.approx(0.01), "what it got for nothing is not held against it"


@pytest.mark.parametrize("seed", range(5))
def test_quantiles_are_those_of_the_newest_answers(seed: int) -> None:
    rng = random.Random(seed)
    outputs = OutputLengths()
    seen: list[int] = []
    for i in range(3 * WINDOW):
        length = rng.randrange(1, 50) + (1000 if i > WINDOW else 0)
        seen.append(length)
        outputs.observe(SHORT, "a", length)
        found = outputs.quantile(SHORT, "a", 0.9)
        if len(seen) < LEAST_SAMPLES:
            assert found is None
        else:
            newest = sorted(seen[-WINDOW:])
            assert found == newest[min(len(newest) - 1, int(0.9 * len(newest)))]
    assert outputs.quantile(SHORT, "stranger", 0.9) == outputs.quantile(SHORT, "a", 0.9)
    assert outputs.quantile(LONG, "a", 0.9) is None


def test_an_overrun_quantile_is_rare() -> None:
    rng = random.Random(1)
    outputs = OutputLengths()
    over = 0
    for i in range(2000):
        length = int(rng.lognormvariate(5.0, 1.0)) + 1
        quantile = outputs.quantile(SHORT, "a", 0.9)
        over += quantile is not None and length > quantile
        outputs.observe(SHORT, "a" if i % 2 else "b", length)
    assert 0.07 * 2000 < over < 0.14 * 2000


def test_the_pace_of_the_queue_is_measured() -> None:
    meter = DrainMeter()
    now, backlog = 0.0, 100.0
    for _ in range(1000):
        meter.note(now, backlog, 0.03)  # a step of 0.06 s does 0.03 s of prompt work
        now, backlog = now + 0.06, backlog - 0.03
    assert meter.drain_seconds == pytest.approx(2.0 * meter.backlog_seconds, rel=0.01)
    meter.note(now, 0.0, 0.0)
    assert meter.backlog_seconds == meter.drain_seconds == 0.0
    pace = meter.pace
    meter.note(now + 3600.0, 1.0, 0.0)
    assert meter.pace == pace, "an idle hour is no slow hour"
