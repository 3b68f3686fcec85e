"""Requests that are set aside keep their pages, come back to them, and get on; recomputing is the last resort."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from engine.config import ResolvedConfig, SchedulingConfig
from engine.core import EngineCore
from engine.executor import StepError
from engine.messages import AbortRequest, AddRequest, EngineStats, StepOutputs, unpack_ids
from engine.plan import StepPlan, StepResult
from engine.request import Request
from engine.runner.sim_executor import SimExecutor
from engine.scheduler import Scheduler
from model.presets import preset

MakeMessage = Callable[..., AddRequest]
MakeRequest = Callable[..., Request]
MakeConfig = Callable[..., ResolvedConfig]
MakeScheduler = Callable[..., Scheduler]

PAGE = 256
SCHEDULING = SchedulingConfig(
    step_seconds=1e6, interactive_itl_seconds=1e6, long_itl_seconds=1e6, long_prompt_tokens=10**6, output_quantile=0.5
)


class Recorder(SimExecutor):
    """Keeps the plans, and loses the loads of some steps."""

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        if plan.page_loads and self.num_failing:
            self.num_failing -= 1
            self._forget(plan)
            raise StepError("a page could not be loaded")
        return super().execute(plan)

    plans: list[StepPlan]
    num_failing = 0


class Engine:
    """Messages through a core; the books are checked now and then."""

    def __init__(self, config: ResolvedConfig, *, expects: int | None = None) -> None:
        """`expects`: answers are believed to have that many tokens."""
        self.executor = Recorder(config, preset("nano"))
        self.executor.plans = []
        self.core = EngineCore(self.executor, draw_seed=lambda: 1)
        self.scheduler = self.core.scheduler
        self.tokens: dict[str, list[int]] = {}
        self.finish: dict[str, str] = {}
        self.num_steps = 0
        for _ in range(20 if expects else 0):
            for service in (0, 1):
                self.scheduler._admission.outputs.observe(service, "", expects)  # type: ignore[arg-type]

    @property
    def stats(self) -> EngineStats:
        return self.scheduler.stats()

    def send(self, *messages: AddRequest) -> None:
        for message in messages:
            self.core.inbox.put(message)

    def step(self) -> None:
        self.core.step()
        self.num_steps += 1
        if not self.num_steps % 7:
            self.scheduler.check()
        while self.core.outbox:
            frame = self.core.outbox.popleft()
            assert isinstance(frame, StepOutputs)
            ids = unpack_ids(frame.token_ids).tolist()
            for i, request_id in enumerate(frame.request_ids):
                self.tokens.setdefault(request_id, []).extend(ids[frame.cu_tokens[i] : frame.cu_tokens[i + 1]])
                finish = frame.finish[i]
                if finish is not None:
                    self.finish[request_id] = finish

    def until(self, condition: Callable[[], bool], *, most: int = 20_000) -> None:
        for _ in range(most):
            if condition():
                return
            self.step()
        raise AssertionError("it never comes to that")

    def drain(self) -> None:
        self.until(lambda: not self.scheduler.has_work and self.core.inbox.empty())
        self.scheduler.check()
        kv, config = self.scheduler.kv, self.scheduler.config
        assert kv.num_available_pages == config.num_pages and kv.num_free_slots == config.max_num_seqs
        assert not len(kv.hibernations)


def hibernated(engine: Engine) -> list[str]:
    return [h.request_id for h in engine.scheduler.kv.hibernations]


def answer(config: ResolvedConfig, message: AddRequest) -> list[int]:
    alone = Engine(replace(config, num_pages=500, max_num_seqs=4))
    alone.send(message)
    alone.drain()
    return alone.tokens[message.request_id]


@pytest.fixture
def small(make_config: MakeConfig) -> ResolvedConfig:
    return make_config(
        num_pages=8, num_host_pages=40, num_snapshots=8, max_num_batched_tokens=4096, scheduling=SCHEDULING
    )


def test_large_limits_do_not_keep_others_out(make_config: MakeConfig, make_message: MakeMessage) -> None:
    """Twenty requests that may each fill the memory, and answer little: they run together."""
    config = make_config(
        num_pages=100, max_num_seqs=20, max_model_len=100 * PAGE, scheduling=replace(SCHEDULING, output_quantile=0.9)
    )
    engine = Engine(config, expects=100)
    for i in range(20):
        engine.send(make_message(f"r{i}", 300 + i, max_tokens=100 * PAGE - 400, seed=i))
    engine.until(lambda: engine.scheduler.num_running == 20, most=60)
    assert engine.stats.num_preemptions == 0
    reserved = replace(config, scheduling=replace(SCHEDULING, output_quantile=1.0))
    careful = Engine(reserved, expects=100)
    for i in range(20):
        careful.send(make_message(f"r{i}", 300 + i, max_tokens=100 * PAGE - 400, seed=i))
    for _ in range(60):
        careful.step()
    assert careful.scheduler.num_running == 1


def test_an_unknown_answer_is_taken_for_a_usual_one(make_scheduler: MakeScheduler, make_request: MakeRequest) -> None:
    scheduler = make_scheduler(max_model_len=10**6, num_pages=4000)
    request = make_request("a", 100, max_tokens=10**6)
    scheduler.add(request)
    assert scheduler._admission.reserve(request) == 100 + SCHEDULING.unknown_output_tokens


@pytest.mark.parametrize("cached", [False, True])
def test_a_million_tokens_are_admitted_when_their_bytes_are_there(
    make_scheduler: MakeScheduler, make_request: MakeRequest, cached: bool
) -> None:
    """Prompt and reserved answer and two in a hundred, whatever is cached or set aside, and one slot."""
    history, answer = 1_000_000, 1000
    num_pages = int(1.02 * (-(-(history + answer) // PAGE)))
    scheduler = make_scheduler(
        num_pages=num_pages + 4,
        max_model_len=1 << 20,
        num_host_pages=num_pages if cached else 0,
        num_snapshots=4,
        max_num_seqs=2,
        max_num_batched_tokens=8192,
    )
    for _ in range(20):
        scheduler._admission.outputs.observe(1, "", answer)  # type: ignore[arg-type]
    if cached:
        scheduler.add(make_request("before", 500_000, max_tokens=1))
        while scheduler.requests:
            run_step(scheduler)
        assert scheduler.kv.pages.num_free < 0.55 * num_pages
    scheduler.add(make_request("neighbour", 200, max_tokens=800))
    run_step(scheduler)
    scheduler.add(make_request("million", [5, 6, 7, 8] * (history // 4), max_tokens=15_000))
    plan = run_step(scheduler)
    assert [n.request_id for n in plan.new] == ["million"]


def run_step(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule(0.0)
    ids = tuple(s.request_id for s in plan.scheduled if s.samples)
    result = StepResult(step_id=plan.step_id, request_ids=ids, token_ids=(5,) * len(ids), logprobs=(None,) * len(ids))
    scheduler.update(plan, result, 0.0)
    return plan


def crowd(make_message: MakeMessage, count: int = 4, **fields: Any) -> list[AddRequest]:
    return [make_message(f"r{i}", 300 + i, max_tokens=500, seed=i, ignore_eos=True, **fields) for i in range(count)]


def test_who_is_set_aside_comes_back_to_its_own_pages(small: ResolvedConfig, make_message: MakeMessage) -> None:
    engine = Engine(small, expects=100)
    messages = crowd(make_message)
    engine.send(*messages)
    engine.until(lambda: bool(hibernated(engine)))
    asleep = hibernated(engine)
    # Strangers press through memory meanwhile; they take the device's pages, and nobody's kept ones.
    engine.send(*(make_message(f"stranger{i}", 900 + i, max_tokens=2, priority=-1) for i in range(12)))
    engine.until(lambda: sum(name.startswith("stranger") for name in engine.finish) == 12)
    assert set(asleep) & set(hibernated(engine)), "nobody sleeps any more: nothing was tested"
    engine.drain()
    stats = engine.stats
    assert stats.num_hibernations == stats.num_preemptions > 0 and stats.num_recompute_preemptions == 0
    assert stats.num_recomputed_tokens == 0 and stats.num_wakes == stats.num_preemptions
    assert any(plan.page_spills for plan in engine.executor.plans)
    for message in messages:
        assert engine.tokens[message.request_id] == answer(small, message)


@pytest.mark.parametrize("num_host_pages", [0, 2])
def test_without_room_in_host_memory_somebody_is_computed_again(
    small: ResolvedConfig, make_message: MakeMessage, num_host_pages: int
) -> None:
    config = replace(small, num_host_pages=num_host_pages)
    engine = Engine(config, expects=50)
    messages = crowd(make_message, 6)
    engine.send(*messages)
    engine.drain()
    assert engine.stats.num_recompute_preemptions > 0 and engine.stats.num_recomputed_tokens > 0
    for message in messages:
        assert engine.tokens[message.request_id] == answer(small, message)


def test_without_a_cache_nothing_is_kept(small: ResolvedConfig, make_message: MakeMessage) -> None:
    engine = Engine(replace(small, enable_prefix_cache=False), expects=50)
    engine.send(*crowd(make_message))
    engine.drain()
    stats = engine.stats
    assert stats.num_preemptions == stats.num_recompute_preemptions > 0 and stats.num_hibernations == 0


def test_whoever_comes_back_gets_on(make_config: MakeConfig, make_message: MakeMessage) -> None:
    """Far too many answers that all outgrow their pages: each gets twice as far before it is set aside again."""
    least = 64
    config = make_config(
        num_pages=7,
        num_host_pages=100,
        num_snapshots=20,
        max_num_batched_tokens=4096,
        max_model_len=7 * PAGE,
        scheduling=replace(SCHEDULING, woken_output_tokens=least),
    )
    engine = Engine(config, expects=1)
    for i in range(6):
        engine.send(make_message(f"r{i}", 200 + i, max_tokens=1100, seed=i, ignore_eos=True))
    outputs: dict[str, list[int]] = {}

    def watch() -> bool:
        for name in hibernated(engine):
            request, seen = engine.scheduler.requests[name], outputs.setdefault(name, [])
            if len(seen) < request.num_preemptions:
                assert not seen or request.num_output_tokens >= seen[-1] + max(seen[-1], least)
                seen.append(request.num_output_tokens)
        return not engine.scheduler.requests and engine.core.inbox.empty()

    engine.step()
    engine.until(watch)
    assert len(engine.tokens) == 6 and all(len(tokens) == 1100 for tokens in engine.tokens.values())
    assert max(len(seen) for seen in outputs.values()) >= 2, "nobody was set aside twice: little was tested"
    assert engine.stats.num_recompute_preemptions == 0


def test_who_goes_away_asleep_leaves_nothing(small: ResolvedConfig, make_message: MakeMessage) -> None:
    engine = Engine(small, expects=100)
    engine.send(*crowd(make_message))
    engine.until(lambda: bool(hibernated(engine)))
    (first, *_) = hibernated(engine)
    engine.send(AbortRequest(request_id=first))
    engine.step()
    assert first not in hibernated(engine)
    engine.drain()
    assert engine.finish[first] == "abort"


def test_a_page_load_that_fails_fails_the_step(small: ResolvedConfig, make_message: MakeMessage) -> None:
    """Who was in the step ends; whoever else had a page there is computed again, and nobody reads what is not there."""
    engine = Engine(small, expects=100)
    messages = crowd(make_message, 5)
    engine.send(*messages)
    engine.until(lambda: bool(hibernated(engine)))
    engine.send(*(make_message(f"stranger{i}", 900 + i, max_tokens=2, priority=-1) for i in range(8)))
    engine.executor.num_failing = 1
    engine.drain()
    assert not engine.executor.num_failing, "nothing was loaded: nothing was tested"
    ends = [engine.finish[m.request_id] for m in messages]
    assert "error" in engine.finish.values() and "length" in ends
    for message in messages:
        if engine.finish[message.request_id] == "length":
            assert engine.tokens[message.request_id] == answer(small, message)


@pytest.mark.parametrize("seed", range(3))
def test_random_crowds_end_with_their_own_answers(
    make_config: MakeConfig, make_message: MakeMessage, seed: int
) -> None:
    rng = random.Random(seed)
    config = make_config(
        num_pages=rng.choice([6, 9]),
        num_host_pages=rng.choice([0, 3, 10, 60]),
        num_snapshots=rng.choice([0, 1, 6]),
        max_num_seqs=rng.choice([4, 8]),
        max_num_batched_tokens=rng.choice([60, 2000]),
        max_model_len=1500,
        scheduling=SCHEDULING,
    )
    engine = Engine(config, expects=rng.choice([1, 60]))
    messages = [
        make_message(
            f"r{i}", rng.randrange(1, 900), max_tokens=rng.choice([3, 300, 600]), seed=i, priority=rng.randrange(3)
        )
        for i in range(14)
    ]
    for message in messages:
        engine.send(message)
        for _ in range(rng.randrange(20)):
            engine.step()
        if rng.random() < 0.1:
            engine.send(AbortRequest(request_id=message.request_id))
    engine.drain()
    assert engine.stats.num_preemptions > 0
    for message in rng.sample(messages, 4):
        if engine.finish[message.request_id] == "length":
            assert engine.tokens[message.request_id] == answer(config, message)
