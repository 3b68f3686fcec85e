"""The virtual clock around the production scheduler and around small fakes."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.config import ResolvedConfig, SchedulingConfig
from engine.messages import AddRequest, StepOutputs
from engine.outputs import OutputColumns
from engine.plan import StepPlan, StepResult
from engine.request import Request
from engine.scheduler import Scheduler
from engine.simulation.clock import Run, SimulationError, add_message, simulate
from engine.simulation.generators import agent_sessions, cancel_storm, chat_and_long
from engine.simulation.hardware import Machine, StepWork, gpu, simulated_config
from engine.simulation.workload import SimRequest, Text, Trace, seed_of
from model.presets import preset

FLASH = preset("flash")


def config_of(**changes: Any) -> ResolvedConfig:
    return replace(simulated_config(FLASH, kv_bytes=80 << 30, max_num_seqs=64), **changes)


def machine_of(config: ResolvedConfig) -> Machine:
    return Machine(FLASH, config.layout(FLASH), gpu("h200"))


def run_production(trace: Trace, *, until: float | None = None, checked: bool = False, **changes: Any) -> Run:
    config = config_of(**changes)
    scheduler = Scheduler(config, config.layout(FLASH), eos_token_id=1)
    return simulate(trace, scheduler, machine_of(config), until=until, check=scheduler.check if checked else None)


def request(name: str, prompt: int, answer: int, **fields: Any) -> SimRequest:
    return SimRequest(
        request_id=name,
        prompt=Text([seed_of(name)], [prompt]),
        answer=Text([seed_of(name, "answer")], [answer]),
        kind=fields.pop("kind", "test"),
        **fields,
    )


def test_one_request_takes_as_long_as_the_machine_says() -> None:
    patient = SchedulingConfig(step_seconds=60.0, interactive_itl_seconds=60.0, long_itl_seconds=60.0)
    trace = Trace(name="one", requests=(request("a", 20_000, 5, arrival=3.0),))
    run = run_production(trace, scheduling=patient, enable_prefix_cache=False)
    record = run.records["a"]
    machine = machine_of(config_of())
    assert record.arrival == 3.0 and record.ending == "length" and record.num_cached_tokens == 0
    # The budget of 8,192 rows cuts 20,000 into three; the machine's own chunking cuts the same way.
    assert record.ttft == pytest.approx(machine.prefill_seconds(0, 20_000), rel=1e-6)
    steps = [machine.step_seconds(StepWork(decode_contexts=[20_001 + i], num_sampled=1)) for i in range(4)]
    assert np.allclose(record.itls, steps)
    assert run.end == record.end == pytest.approx(record.arrival + record.ttft + sum(steps))
    assert list(run.steps.num_prefill_rows) == [8192, 8192, 3616, 0, 0, 0, 0]
    assert list(run.steps.num_decode_rows) == [0, 0, 0, 1, 1, 1, 1]


def test_turns_follow_each_other_and_repeat_what_was_said() -> None:
    prompts: dict[str, np.ndarray] = {}

    def remember(request: SimRequest, token_ids: np.ndarray, arrival: float) -> AddRequest:
        prompts[request.request_id] = token_ids
        return add_message(request, token_ids, arrival)

    trace = agent_sessions(seconds=50, session_rate=0.1, turns=4, seed=3)
    config = config_of()
    scheduler = Scheduler(config, config.layout(FLASH), eos_token_id=1)
    run = simulate(trace, scheduler, machine_of(config), to_message=remember)
    by_id = {r.request_id: r for r in trace.requests}
    assert len(prompts) == len(trace.requests) > 10
    for request_id, record in run.records.items():
        spoken = by_id[request_id]
        assert np.array_equal(prompts[request_id], spoken.prompt.tokens(FLASH.vocab_size))
        for before in spoken.after:
            assert record.arrival == pytest.approx(run.records[before].end + spoken.delay)
            conversation = by_id[before].conversation.tokens(FLASH.vocab_size)
            assert np.array_equal(prompts[request_id][: len(conversation)], conversation)


def test_followers_wait_for_all_their_predecessors_and_for_their_own_time() -> None:
    trace = Trace(
        name="join",
        requests=(
            request("short", 100, 2),
            request("long", 50_000, 50),
            request("join", 100, 2, after=("short", "long"), delay=1.5),
            request("late", 100, 2, after=("short",), arrival=40.0),
        ),
    )
    records = run_production(trace).records
    assert records["short"].end < records["long"].end
    assert records["join"].arrival == pytest.approx(records["long"].end + 1.5)
    assert records["late"].arrival == 40.0


def test_clients_that_leave_free_the_engine_and_their_later_turns_never_come() -> None:
    trace = Trace(
        name="leave",
        requests=(
            request("leaves", 400_000, 50, cancel_after=2.0),
            request("next", 100, 5, after=("leaves",)),
            request("after next", 100, 5, after=("next",)),
            request("stays", 1000, 50, arrival=1.0),
            request("ends first", 10, 1, cancel_after=1e6),
        ),
    )
    run = run_production(trace, checked=True)
    endings = {name: record.ending for name, record in run.records.items()}
    assert endings == {
        "leaves": "abort",
        "next": "dropped",
        "after next": "dropped",
        "stays": "length",
        "ends first": "length",
    }
    assert run.records["next"].arrival is None
    assert run.records["leaves"].end == pytest.approx(2.0, abs=0.5)


@pytest.mark.parametrize("seed", range(3))
def test_cancel_storms_leave_nothing_behind(seed: int) -> None:
    config = config_of(num_pages=2000, max_num_seqs=16, max_model_len=300_000)
    scheduler = Scheduler(config, config.layout(FLASH), eos_token_id=1)
    trace = cancel_storm(num_requests=150, seed=seed)
    run = simulate(trace, scheduler, machine_of(config), check=scheduler.check)
    assert {r.ending for r in run.records.values()} == {"abort", "length"}
    assert scheduler.kv.num_available_pages == 2000 and scheduler.kv.num_free_slots == 16


def test_refusals_are_recorded() -> None:
    run = run_production(Trace(name="big", requests=(request("a", 5000, 5), request("b", 100, 5))), num_pages=10)
    assert run.records["a"].ending == "error" and run.records["a"].error == "too_large"
    assert run.records["b"].ending == "length"


def test_a_simulation_ends_when_told() -> None:
    run = run_production(chat_and_long(seconds=60, long_every=40), until=25.0)
    endings = [r.ending for r in run.records.values()]
    assert 25.0 <= run.end < 26.0 and "unfinished" in endings and "length" in endings
    assert all(r.arrival is None or r.arrival <= run.end for r in run.records.values())


def test_the_same_trace_gives_the_same_run() -> None:
    def columns() -> tuple[Any, ...]:
        run = run_production(chat_and_long(seconds=30, long_every=20, long_tokens=100_000))
        return run.end, run.steps.start, [(r.arrival, r.end, r.token_times) for r in run.records.values()]

    assert columns() == columns()


class _Idle:
    """A planner that never plans."""

    def __init__(self) -> None:
        self.has_work = False

    def add(self, request: Request) -> None:
        self.has_work = True

    def abort(self, request_id: str) -> None:
        raise AssertionError("nobody leaves here")

    def schedule(self, now: float) -> StepPlan:
        return StepPlan(step_id=0)

    def update(self, plan: StepPlan, result: StepResult, now: float) -> StepOutputs:
        return OutputColumns().pack(Scheduler(CONFIG, CONFIG.layout(FLASH), eos_token_id=1).stats())


CONFIG = config_of()


def test_a_scheduler_that_stands_still_is_found_out() -> None:
    trace = Trace(name="t", requests=(request("a", 10, 1), request("b", 10, 1, arrival=5.0)))
    with pytest.raises(SimulationError, match=r"at 5\.000 s nothing is planned for 2 requests"):
        simulate(trace, _Idle(), machine_of(CONFIG))


def test_a_million_token_prompt_costs_milliseconds_of_real_time() -> None:
    """No Python for each token: the whole run of a cold 1M prompt is a fraction of a second."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run = run_production(Trace(name="1M", requests=(request("a", 1_000_000, 20),)))
        times.append(time.perf_counter() - start)
        # Alone it gets long steps, so that reading the weights in each of them costs little.
        alone = machine_of(config_of()).prefill_seconds(0, 1_000_000)
        assert alone < run.records["a"].ttft < 1.1 * alone < 120
    assert np.median(times) < 1.5


def test_the_simulator_itself_costs_little_for_a_step() -> None:
    trace = chat_and_long(seconds=60, long_every=200)
    run = run_production(trace)
    outside = run.wall_seconds - sum(run.steps.planner_seconds)
    assert outside / len(run.steps.seconds) < 1.5e-3


def test_messages_carry_what_the_scheduler_orders_by() -> None:
    sent = request("a", 10, 7, priority=3)
    message = add_message(sent, sent.prompt.tokens(FLASH.vocab_size), 1.25)
    assert (message.request_id, message.priority, message.arrival_time) == ("a", 3, 1.25)
    assert message.sampling.max_tokens == 7 and message.sampling.ignore_eos
    assert len(message.prompt_token_ids) == 40
