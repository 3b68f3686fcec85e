"""Requests that begin alike and come together: the first computes the prefix, the others wait, and never for long."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.config import ResolvedConfig, SchedulingConfig
from engine.core import EngineCore
from engine.messages import AbortRequest, AddRequest, SamplingParams, StepOutputs, pack_ids
from engine.plan import StepPlan, StepResult
from engine.policy import STANDSTILL_SECONDS
from engine.prefix_waits import num_shared_pages
from engine.request import Request, RequestStatus
from engine.runner.sim_executor import CostModel, SimExecutor
from engine.scheduler import Scheduler
from engine.simulation.clock import keyed_message, simulate
from engine.simulation.generators import fan_out
from engine.simulation.hardware import Machine, gpu, simulated_config
from engine.simulation.report import Goals, summarize
from model.presets import preset

MakeConfig = Callable[..., ResolvedConfig]

PREFIX = np.random.default_rng(0).integers(2, 2048, 5000).astype(np.int32)
GOALS = SchedulingConfig(step_seconds=0.06, interactive_itl_seconds=0.06, long_itl_seconds=0.06)


class Watched(SimExecutor):
    """Counts the prompt rows of each request."""

    def execute(self, plan: StepPlan) -> StepResult:
        for rows in plan.scheduled:
            if rows.num_tokens > 1:
                self.rows[rows.request_id] = self.rows.get(rows.request_id, 0) + rows.num_tokens
        return super().execute(plan)

    rows: dict[str, int]


class Engine:
    """A core whose clock advances by what its steps take."""

    def __init__(self, config: ResolvedConfig) -> None:
        self.now = 0.0
        cost = CostModel(base_seconds=0.004, row_seconds=5e-5, context_seconds=2e-9)
        self.executor = Watched(config, preset("nano"), cost=cost)
        self.executor.rows = {}
        self.core = EngineCore(self.executor, clock=lambda: self.now, draw_seed=lambda: 5)
        self.scheduler = self.core.scheduler
        self.cached: dict[str, int] = {}
        self.misses: dict[str, str | None] = {}
        self.finish: dict[str, str] = {}

    def send(self, request_id: str, prompt: np.ndarray, **fields: Any) -> None:
        sampling = SamplingParams(max_tokens=fields.pop("max_tokens", 4), seed=1, ignore_eos=True)
        self.core.inbox.put(
            AddRequest(
                request_id=request_id,
                prompt_token_ids=pack_ids(prompt),
                sampling=sampling,
                arrival_time=self.now,
                **fields,
            )
        )

    def step(self) -> None:
        before = self.executor.num_steps
        self.core.step()
        self.scheduler.check()
        moved = self.executor.num_steps > before
        self.now += self.scheduler.totals.step_seconds if moved else 0.001
        while self.core.outbox:
            frame = self.core.outbox.popleft()
            assert isinstance(frame, StepOutputs)
            for i, request_id in enumerate(frame.request_ids):
                self.cached[request_id] = frame.cached_tokens[i]
                self.misses[request_id] = frame.miss_reasons[i]
                finish = frame.finish[i]
                if finish is not None:
                    self.finish[request_id] = finish

    def drain(self) -> None:
        for _ in range(5000):
            self.step()
            if not self.scheduler.has_work:
                return
        raise AssertionError("requests never end")

    def parked(self) -> set[str]:
        return {r.request_id for r in self.scheduler.requests.values() if r.status is RequestStatus.PARKED}


def prompt(seed: int, shared: int = len(PREFIX), own: int = 60) -> np.ndarray:
    tail = np.random.default_rng(seed + 1).integers(2, 2048, own).astype(np.int32)
    return np.concatenate([PREFIX[:shared], tail])


@pytest.fixture
def config(make_config: MakeConfig) -> ResolvedConfig:
    return make_config(
        max_model_len=1 << 16,
        num_pages=2000,
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        num_snapshots=40,
        num_host_pages=40,
        scheduling=GOALS,
    )


@pytest.mark.parametrize("num_snapshots", [0, 40])
def test_many_that_begin_alike_compute_the_prefix_once(config: ResolvedConfig, num_snapshots: int) -> None:
    """Of different keys, which fairness would serve side by side."""
    engine = Engine(replace(config, num_snapshots=num_snapshots))
    for i in range(12):
        engine.send(f"r{i}", prompt(i), tenant=f"t{i}")
    engine.drain()
    rows = engine.executor.rows
    assert rows["r0"] == 5060 and engine.cached["r0"] == 0
    whole_pages = 5000 // 256 * 256
    assert all(engine.cached[f"r{i}"] == whole_pages for i in range(1, 12))
    assert sum(rows.values()) == 5060 + 11 * (5060 - whole_pages)
    stats = engine.scheduler.stats()
    assert stats.num_prefix_waits == 11 and stats.num_parked == 0


def test_without_a_wait_they_would_all_compute_it(config: ResolvedConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would see otherwise; and the reason is told."""
    monkeypatch.setattr("engine.leaders.longest_prefix_wait", lambda *args: 0.0)
    engine = Engine(config)
    for i in range(12):
        engine.send(f"r{i}", prompt(i), tenant=f"t{i}")
    engine.step()
    assert len(engine.parked()) == 11, "they wait until the next step"
    engine.drain()
    assert sum(engine.executor.rows.values()) > 4 * 5060
    assert "in_flight" in engine.misses.values()


@pytest.mark.parametrize("how", ["abort", "fails"])
def test_a_leader_that_dies_lets_them_go(config: ResolvedConfig, how: str) -> None:
    engine = Engine(config)
    for i in range(4):
        engine.send(f"r{i}", prompt(i))
    while not engine.parked():
        engine.step()
    assert engine.parked() == {"r1", "r2", "r3"}
    if how == "abort":
        engine.core.inbox.put(AbortRequest(request_id="r0"))
        engine.step()
    else:
        engine.scheduler._fail("r0", "for the test")
    assert "r1" not in engine.parked(), "one of them leads now"
    engine.drain()
    assert [engine.finish[f"r{i}"] for i in (1, 2, 3)] == ["length"] * 3
    assert sum(engine.executor.rows[f"r{i}"] for i in (1, 2, 3)) < 1.2 * 5060 + 2 * 256 + 3 * 60


def test_who_waits_can_be_aborted_and_can_be_late(config: ResolvedConfig) -> None:
    engine = Engine(config)
    engine.send("leader", prompt(0))
    engine.send("gone", prompt(1))
    engine.send("late", prompt(2), deadline=0.05)
    while not engine.parked():
        engine.step()
    assert engine.parked() == {"gone", "late"}
    engine.core.inbox.put(AbortRequest(request_id="gone"))
    engine.step()
    assert engine.finish["gone"] == "abort"
    engine.drain()
    assert engine.finish == {"gone": "abort", "late": "error", "leader": "length"}


def test_nobody_waits_for_a_leader_that_stands_still(config: ResolvedConfig) -> None:
    engine = Engine(config)
    engine.send("leader", prompt(0))
    engine.send("follower", prompt(1))
    while not engine.parked():
        engine.step()
    leader = engine.scheduler.requests["leader"]
    leader.last_chunk_time = engine.now - STANDSTILL_SECONDS
    scheduler = engine.scheduler
    scheduler._admission.prefixes.release_overdue(engine.now)
    assert not engine.parked()
    scheduler.check()
    engine.drain()


def test_nobody_waits_for_ever(config: ResolvedConfig) -> None:
    """The leader goes on at the pace of one row in a while; the follower has its longest wait and no more."""
    engine = Engine(config)
    engine.send("leader", prompt(0))
    engine.send("follower", prompt(1))
    while not engine.parked():
        engine.step()
    follower = engine.scheduler.requests["follower"]
    assert follower.wait_until is not None
    longest = GOALS.ttft_seconds(0) + 10.0 * follower.prefill_seconds
    assert follower.wait_until - engine.now <= longest + 1e-9
    engine.scheduler.requests["leader"].last_chunk_time = follower.wait_until
    engine.now = follower.wait_until
    engine.scheduler._admission.prefixes.release_overdue(engine.now)
    assert follower.status is RequestStatus.QUEUED
    engine.step()
    assert follower.status is RequestStatus.RUNNING, "it does not wait a second time"
    engine.drain()


def test_who_shares_little_or_matters_more_does_not_wait(config: ResolvedConfig) -> None:
    engine = Engine(config)
    engine.send("leader", prompt(0), priority=1)
    engine.step()
    engine.send("little", prompt(1, shared=300, own=4000), priority=1)
    engine.send("other", prompt(2, own=0)[::-1].copy(), priority=1)
    engine.send("first", prompt(3), priority=0)
    engine.step()
    assert not engine.parked() & {"other", "first"}
    engine.drain()
    assert engine.cached["first"] == 0, "one of a lower priority may have to wait for ever"


def test_a_long_leader_is_waited_for_only_as_long_as_its_share_allows(config: ResolvedConfig) -> None:
    """A long prompt gets a quarter beside shorter ones: what it would compute first, a short one computes itself."""
    engine = Engine(replace(config, scheduling=replace(GOALS, long_prompt_tokens=20_000)))
    long = np.concatenate([PREFIX, np.random.default_rng(9).integers(2, 2048, 30_000).astype(np.int32)])
    engine.send("long", long, tenant="l")
    engine.step()
    engine.send("short", prompt(1))
    engine.step()
    assert not engine.parked()
    while engine.scheduler.requests["long"].num_computed_tokens < 4500:
        engine.step()
    engine.send("late", prompt(2))
    engine.drain()
    assert engine.finish == {"long": "length", "short": "length", "late": "length"}


def test_a_search_finds_what_two_prompts_share() -> None:
    class Keys:
        def __init__(self, names: str) -> None:
            self.keys = [names[: i + 1].encode() for i in range(len(names))]

    for a, b, shared in [("abcdef", "abcxyz", 3), ("abc", "abc", 3), ("abc", "abcd", 3), ("x", "y", 0), ("", "a", 0)]:
        for known in range(shared):
            assert num_shared_pages(Keys(a), Keys(b), known) == shared  # type: ignore[arg-type]
        assert num_shared_pages(Keys(a), Keys(b), shared) == 0, "what is published is no reason to wait"  # type: ignore[arg-type]


def test_a_fan_out_hits_what_can_be_hit() -> None:
    """Sixty questions behind a system prompt of 30,000 tokens, from four keys, faster than it can be computed."""
    flash = preset("flash")
    config = simulated_config(flash, kv_bytes=80 << 30, host_bytes=8 << 30, max_num_seqs=64)
    machine = Machine(flash, config.layout(flash), gpu("h200"))
    scheduler = Scheduler(config, config.layout(flash), eos_token_id=1)
    run = simulate(fan_out(num_requests=60, answer=20), scheduler, machine, to_message=keyed_message)
    report = summarize(run, machine, policy="fathom", goals=Goals(ttft_seconds=1.0, ttft_work=3.0, itl_seconds=0.1))
    assert report.total.hit_rate >= 0.995 * report.total.hit_bound
    prompts = sum(r.request.prompt.num_tokens - r.num_cached_tokens for r in run.records.values())
    assert prompts < 1.5 * 30_000 + 60 * 400
    requests: list[Request] = list(scheduler.requests.values())
    assert not requests and scheduler.stats().num_prefix_waits >= 10
