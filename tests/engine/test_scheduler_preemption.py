"""Shortage while answers grow: victims go back to the queue and continue as if nothing had happened."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from engine.config import ResolvedConfig, SchedulingConfig
from engine.core import EngineCore
from engine.messages import AbortRequest, AddRequest, StepOutputs, unpack_ids
from engine.plan import StepPlan, StepResult
from engine.request import Request, RequestStatus
from engine.runner.sim_executor import SimExecutor
from engine.scheduler import Scheduler
from model.presets import preset

MakeMessage = Callable[..., AddRequest]
MakeRequest = Callable[..., Request]
MakeConfig = Callable[..., ResolvedConfig]
MakeScheduler = Callable[..., Scheduler]

OVERBOOKED = SchedulingConfig(
    step_seconds=1e6, interactive_itl_seconds=1e6, long_itl_seconds=1e6, long_prompt_tokens=600, output_quantile=0.5
)


def run_step(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule(0.0)
    ids = tuple(s.request_id for s in plan.scheduled if s.samples)
    result = StepResult(step_id=plan.step_id, request_ids=ids, token_ids=(5,) * len(ids), logprobs=(None,) * len(ids))
    scheduler.update(plan, result, 0.0)
    scheduler.check()
    return plan


def teach_short_answers(scheduler: Scheduler, make_request: MakeRequest) -> None:
    """Enough answers of two tokens for the engine to expect no more."""
    for i in range(20):
        scheduler.add(make_request(f"teach{i}", 4, max_tokens=2))
    while scheduler.requests:
        run_step(scheduler)
    run_step(scheduler)


def test_a_shortage_preempts_and_the_victim_reserves_all(
    make_scheduler: MakeScheduler, make_request: MakeRequest
) -> None:
    scheduler = make_scheduler(num_pages=4, scheduling=OVERBOOKED)
    teach_short_answers(scheduler, make_request)
    requests = [make_request(i, 250, max_tokens=600) for i in "abcd"]
    for request in requests:
        scheduler.add(request)
    plan = run_step(scheduler)
    assert [s.request_id for s in plan.scheduled] == ["a", "b"], "512 rows: two prompts in this step"
    plan = run_step(scheduler)
    assert {s.request_id for s in plan.scheduled} == {"a", "b", "c", "d"}, "a page each is enough, says the quantile"
    while not scheduler.totals.num_preemptions:
        plan = run_step(scheduler)
    victims = [r for r in requests if r.status is RequestStatus.QUEUED]
    assert {r.request_id for r in victims} == set(plan.finished) and victims
    assert all(r.num_output_tokens > 0 and r.num_computed_tokens == 0 and r.grant is None for r in victims)
    assert all(scheduler._admission.reserve(r) == 850 for r in victims)
    new: dict[str, Any] = {}
    while scheduler.requests:
        known = {r.request_id: r.token_ids.tolist() for r in requests}
        plan = run_step(scheduler)
        for n in plan.new:
            assert n.token_ids.tolist() == known[n.request_id] and n.num_prompt_tokens == 250
            new[n.request_id] = n
    assert set(new) == {r.request_id for r in requests if r.num_preemptions} >= {r.request_id for r in victims}
    assert all(r.num_output_tokens == 600 and r.num_preemptions <= 1 for r in requests)
    assert scheduler.totals.prompt_tokens == 20 * 4 + 4 * 250, "a prompt row counts once"
    assert scheduler.totals.num_recomputed_tokens > 0
    assert scheduler.kv.num_available_pages == 4


def test_the_lowest_priority_is_taken(make_scheduler: MakeScheduler, make_request: MakeRequest) -> None:
    scheduler = make_scheduler(num_pages=4, scheduling=OVERBOOKED, max_num_batched_tokens=2048)
    teach_short_answers(scheduler, make_request)
    requests = [make_request(str(i), 250, max_tokens=600, priority=i % 3 - 1) for i in range(4)]
    for request in requests:
        scheduler.add(request)
    while not scheduler.totals.num_preemptions:
        run_step(scheduler)
    queued = [r.request_id for r in requests if r.status is RequestStatus.QUEUED]
    assert queued == ["1", "2"], "priorities 0 and 1; those of -1 go on"


def test_a_started_request_is_past_its_deadline(make_scheduler: MakeScheduler, make_request: MakeRequest) -> None:
    scheduler = make_scheduler(num_pages=2, scheduling=OVERBOOKED)
    teach_short_answers(scheduler, make_request)
    requests = [make_request(i, 250, max_tokens=200, deadline=5.0) for i in "ab"]
    for request in requests:
        scheduler.add(request)
    while not scheduler.totals.num_preemptions:
        run_step(scheduler)
    plan = scheduler.schedule(9.0)
    assert len(scheduler.requests) == 2, "it waits again, but it had started in time"
    scheduler.abort("a")
    scheduler.abort("b")
    ids = tuple(s.request_id for s in plan.scheduled if s.samples)
    scheduler.update(
        plan,
        StepResult(step_id=plan.step_id, request_ids=ids, token_ids=(5,) * len(ids), logprobs=(None,) * len(ids)),
        0.0,
    )
    scheduler.check()
    assert scheduler.kv.num_available_pages == 2


class Run:
    """Messages through a core until all have ended; checks the books after every step."""

    def __init__(self, config: ResolvedConfig) -> None:
        self.core = EngineCore(SimExecutor(config, preset("nano"), eos_probability=0.001), draw_seed=lambda: 1)
        self.tokens: dict[str, list[int]] = {}
        self.finish: dict[str, str] = {}

    def step(self) -> None:
        self.core.step()
        self.core.scheduler.check()
        while self.core.outbox:
            frame = self.core.outbox.popleft()
            assert isinstance(frame, StepOutputs)
            ids = unpack_ids(frame.token_ids).tolist()
            for i, request_id in enumerate(frame.request_ids):
                self.tokens.setdefault(request_id, []).extend(ids[frame.cu_tokens[i] : frame.cu_tokens[i + 1]])
                finish = frame.finish[i]
                if finish is not None:
                    assert request_id not in self.finish
                    self.finish[request_id] = finish

    def drain(self) -> None:
        for _ in range(20_000):
            self.step()
            if not self.core.scheduler.has_work:
                break
        scheduler = self.core.scheduler
        assert not scheduler.requests, "requests never ended"
        assert scheduler.kv.num_available_pages == scheduler.config.num_pages
        assert scheduler.kv.num_free_slots == scheduler.config.max_num_seqs


@pytest.mark.parametrize("seed", range(5))
def test_preempted_answers_are_the_same_answers(make_config: MakeConfig, make_message: MakeMessage, seed: int) -> None:
    """Random traffic in far too few pages: many preemptions, aborts among them, and every token as if alone."""
    rng = random.Random(seed)
    config = make_config(
        num_pages=rng.choice([6, 8]),
        max_num_seqs=rng.choice([6, 12]),
        max_num_batched_tokens=rng.choice([40, 300, 2000]),
        max_model_len=1400,
        scheduling=replace(OVERBOOKED, output_quantile=rng.choice([0.1, 0.5])),
    )
    messages = {}
    for i in range(70):
        num_prompt = rng.choice([1, 127, 256, 257, rng.randrange(1, 700)])
        prompt = [rng.randrange(2048) for _ in range(num_prompt)]
        messages[f"r{i}"] = make_message(
            f"r{i}",
            prompt,
            max_tokens=rng.choice([3, 40, 600, 600]),
            seed=i,
            priority=rng.randrange(2),
            tenant=rng.choice("ab"),
        )
    crowded = Run(config)
    aborted = set()
    for request_id, message in messages.items():
        crowded.core.inbox.put(message)
        for _ in range(rng.randrange(12)):
            crowded.step()
        if rng.random() < 0.1:
            aborted.add(request_id)
            crowded.core.inbox.put(AbortRequest(request_id=request_id))
    crowded.drain()
    totals = crowded.core.scheduler.totals
    assert totals.num_preemptions >= 3, "little was tested"
    assert set(crowded.finish) == set(messages)

    roomy = Run(make_config(num_pages=2000, max_num_seqs=100, max_num_batched_tokens=4096, max_model_len=1400))
    for message in messages.values():
        roomy.core.inbox.put(message)
    roomy.drain()
    for request_id in messages:
        mine, whole = crowded.tokens.get(request_id, []), roomy.tokens[request_id]
        if crowded.finish[request_id] == "abort":
            assert request_id in aborted and mine == whole[: len(mine)]
        else:
            assert (mine, crowded.finish[request_id]) == (whole, roomy.finish[request_id])


def test_without_overbooking_nothing_is_ever_preempted(make_config: MakeConfig, make_message: MakeMessage) -> None:
    run = Run(make_config(num_pages=6, max_model_len=1400, scheduling=replace(OVERBOOKED, output_quantile=1.0)))
    rng = random.Random(0)
    for i in range(60):
        run.core.inbox.put(make_message(f"r{i}", rng.randrange(1, 500), max_tokens=rng.choice([3, 500]), seed=i))
        run.step()
    run.drain()
    assert run.core.scheduler.totals.num_preemptions == 0
