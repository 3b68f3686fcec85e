"""A virtual clock around a scheduler: arrivals and departures are events, a step takes as long as the machine says.

Anything with the scheduler's face can be driven; the production scheduler runs unchanged. Between two steps the same
things happen in the same order as in the engine's loop: hear what has arrived meanwhile, plan, run, commit.
"""

import heapq
import time
from array import array
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from engine.messages import AddRequest, EngineStats, FinishReason, SamplingParams, StepOutputs, pack_ids
from engine.plan import StepPlan, StepResult
from engine.request import Request
from engine.simulation.hardware import Machine, StepWork
from engine.simulation.workload import SimRequest, Text, Trace

Ending = FinishReason | Literal["dropped", "unfinished"]
"""`dropped`: never sent, for a turn before it failed or was cancelled. `unfinished`: the simulation ended first."""


class SimulationError(RuntimeError):
    """The scheduler stands still although it has requests."""


class Planner(Protocol):
    """What a scheduler must offer."""

    @property
    def has_work(self) -> bool: ...

    def add(self, request: Request) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def schedule(self, now: float) -> StepPlan: ...

    def update(self, plan: StepPlan, result: StepResult, now: float) -> StepOutputs: ...


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """What became of one request; times are seconds of the virtual clock."""

    request: SimRequest
    arrival: float | None = None
    """None: it was never sent."""
    token_times: "array[float]" = field(default_factory=lambda: array("d"))
    end: float | None = None
    ending: Ending = "unfinished"
    num_cached_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float | None:
        """Arrival to first token."""
        return self.token_times[0] - self.arrival if self.token_times and self.arrival is not None else None

    @property
    def itls(self) -> np.ndarray:
        """float64 [tokens - 1]: seconds between tokens."""
        return np.diff(np.asarray(self.token_times))


@dataclass(slots=True, kw_only=True)
class StepLog:
    """A column for each quantity, a row for each step with work."""

    start: "array[float]" = field(default_factory=lambda: array("d"))
    seconds: "array[float]" = field(default_factory=lambda: array("d"))
    num_decode_rows: "array[int]" = field(default_factory=lambda: array("q"))
    num_prefill_rows: "array[int]" = field(default_factory=lambda: array("q"))
    num_running: "array[int]" = field(default_factory=lambda: array("q"))
    num_waiting: "array[int]" = field(default_factory=lambda: array("q"))
    num_free_pages: "array[int]" = field(default_factory=lambda: array("q"))
    planner_seconds: "array[float]" = field(default_factory=lambda: array("d"))
    """Real time in `schedule` and `update`; everything else here is virtual and repeats exactly."""

    def add(self, start: float, seconds: float, work: StepWork, stats: EngineStats, planner_seconds: float) -> None:
        self.start.append(start)
        self.seconds.append(seconds)
        self.num_decode_rows.append(len(work.decode_contexts))
        self.num_prefill_rows.append(sum(rows for _, rows in work.chunks))
        self.num_running.append(stats.num_running)
        self.num_waiting.append(stats.num_waiting)
        self.num_free_pages.append(stats.num_free_pages)
        self.planner_seconds.append(planner_seconds)


@dataclass(slots=True, kw_only=True)
class Run:
    """A finished simulation."""

    trace: Trace
    records: dict[str, RequestRecord]
    """By request id, in trace order."""
    steps: StepLog
    end: float
    """Virtual seconds."""
    wall_seconds: float
    bytes_in: int
    """Moved from host to device: loads and restores."""
    bytes_out: int
    """Moved from device to host: spills and snapshots."""
    num_preemptions: int


def keyed_message(request: SimRequest, token_ids: np.ndarray, arrival: float) -> AddRequest:
    """The message that a server would send where fairness is owed to the keys of the trace."""
    return add_message(request, token_ids, arrival, tenant=request.key)


def add_message(request: SimRequest, token_ids: np.ndarray, arrival: float, *, tenant: str = "") -> AddRequest:
    """The message that a server would send to an engine of one party."""
    return AddRequest(
        request_id=request.request_id,
        prompt_token_ids=pack_ids(token_ids),
        sampling=SamplingParams(temperature=0.0, max_tokens=request.answer.num_tokens, ignore_eos=True, seed=0),
        priority=request.priority,
        tenant=tenant,
        arrival_time=arrival,
    )


def simulate(
    trace: Trace,
    planner: Planner,
    machine: Machine,
    *,
    until: float | None = None,
    to_message: Callable[[SimRequest, np.ndarray, float], AddRequest] = add_message,
    check: Callable[[], None] | None = None,
) -> Run:
    """Serve a trace to its end, or until the virtual clock shows `until` seconds.

    `check` is called after every step (a scheduler's `check` in tests).

    Raises:
        SimulationError: nothing is planned, nothing is to come, and requests are left.
    """
    return _Simulation(trace, planner, machine, to_message).run(until, check)


class _Simulation:
    def __init__(
        self,
        trace: Trace,
        planner: Planner,
        machine: Machine,
        to_message: Callable[[SimRequest, np.ndarray, float], AddRequest],
    ) -> None:
        self.trace = trace
        self.planner = planner
        self.machine = machine
        self.to_message = to_message
        self.now = 0.0
        self.steps = StepLog()
        self.stats = EngineStats()
        self.bytes_in = 0
        self.bytes_out = 0
        self.records = {r.request_id: RequestRecord(request=r) for r in trace.requests}
        self._live: dict[str, list[int]] = {}
        """Ids the engine knows, with the tokens of their answers."""
        self._events: list[tuple[float, int, Literal["arrive", "cancel"], str]] = []
        self._num_events = 0
        self._num_requests = 0
        self._missing = {r.request_id: len(set(r.after)) for r in trace.requests}
        self._followers: dict[str, list[SimRequest]] = defaultdict(list)
        self._known: dict[str, tuple[Text, np.ndarray]] = {}
        """Last prompt of each session or class: most of the next one is a copy of it."""
        for request in trace.requests:
            for other in set(request.after):
                self._followers[other].append(request)
            if not request.after:
                self._push(request.arrival, "arrive", request.request_id)

    def run(self, until: float | None, check: Callable[[], None] | None) -> Run:
        started = time.perf_counter()
        while until is None or self.now < until:
            self._deliver()
            if not self.planner.has_work:
                if not self._events:
                    break
                self.now = max(self.now, self._events[0][0])
                continue
            if not self._step():
                if not self._events:
                    raise SimulationError(f"at {self.now:.3f} s nothing is planned for {len(self._live)} requests")
                self.now = max(self.now, self._events[0][0])
            if check is not None:
                check()
        return Run(
            trace=self.trace,
            records=self.records,
            steps=self.steps,
            end=self.now,
            wall_seconds=time.perf_counter() - started,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            num_preemptions=self.stats.num_preemptions,
        )

    def _step(self) -> bool:
        """Plan, run and commit; False when that did and said nothing."""
        clock = time.perf_counter()
        plan = self.planner.schedule(self.now)
        planner_seconds = time.perf_counter() - clock
        work = self.machine.work_of(plan)
        seconds = self.machine.step_seconds(work)
        request_ids = tuple(rows.request_id for rows in plan.scheduled if rows.samples)
        result = StepResult(
            step_id=plan.step_id,
            request_ids=request_ids,
            token_ids=tuple(self._next_token(request_id) for request_id in request_ids),
            logprobs=(None,) * len(request_ids),
            seconds=seconds,
            load_seconds=self.machine.load_seconds(work),
            save_seconds=self.machine.save_seconds(work),
        )
        start, self.now = self.now, self.now + seconds
        clock = time.perf_counter()
        outputs = self.planner.update(plan, result, self.now)
        planner_seconds += time.perf_counter() - clock
        self.stats = outputs.stats
        self.bytes_in += work.bytes_in
        self.bytes_out += work.bytes_out
        if plan.scheduled:
            self.steps.add(start, seconds, work, outputs.stats, planner_seconds)
        self._hear(outputs)
        return bool(plan.scheduled or plan.finished or outputs.request_ids or seconds)

    def _deliver(self) -> None:
        """Hand over what has arrived by now."""
        while self._events and self._events[0][0] <= self.now:
            at, _, action, request_id = heapq.heappop(self._events)
            if action == "arrive":
                self._arrive(self.records[request_id], at)
            elif request_id in self._live:
                self.planner.abort(request_id)

    def _arrive(self, record: RequestRecord, at: float) -> None:
        request = record.request
        record.arrival = at
        group = request.kind if request.session is None else request.session
        token_ids = request.prompt.tokens_after(self.machine.model.vocab_size, self._known.get(group))
        self._known[group] = (request.prompt, token_ids)
        self._live[request.request_id] = request.answer.tokens(self.machine.model.vocab_size).tolist()
        self._num_requests += 1
        message = self.to_message(request, token_ids, at)
        self.planner.add(Request(message, vocab_size=self.machine.model.vocab_size, order=self._num_requests, seed=0))
        if request.cancel_after is not None:
            self._push(at + request.cancel_after, "cancel", request.request_id)

    def _next_token(self, request_id: str) -> int:
        return self._live[request_id][len(self.records[request_id].token_times)]

    def _hear(self, outputs: StepOutputs) -> None:
        for i, request_id in enumerate(outputs.request_ids):
            record = self.records[request_id]
            record.num_cached_tokens = max(record.num_cached_tokens, outputs.cached_tokens[i])
            for _ in range(outputs.cu_tokens[i + 1] - outputs.cu_tokens[i]):
                record.token_times.append(self.now)
            ending = outputs.finish[i]
            if ending is not None:
                error = outputs.errors[i]
                record.error = None if error is None else error.code
                self._end(record, ending)

    def _end(self, record: RequestRecord, ending: FinishReason) -> None:
        record.end, record.ending = self.now, ending
        request = record.request
        del self._live[request.request_id]
        followers = self._followers.pop(request.request_id, ())
        if not followers and request.session is not None:
            self._known.pop(request.session, None)
        for follower in followers:
            if ending in ("abort", "error"):
                self._drop(follower)
                continue
            self._missing[follower.request_id] -= 1
            if not self._missing[follower.request_id]:
                self._push(max(follower.arrival, self.now + follower.delay), "arrive", follower.request_id)

    def _drop(self, request: SimRequest) -> None:
        """A turn that cannot come any more, and those after it."""
        doomed = [request]
        while doomed:
            request = doomed.pop()
            self.records[request.request_id].ending = "dropped"
            doomed += self._followers.pop(request.request_id, ())

    def _push(self, at: float, action: Literal["arrive", "cancel"], request_id: str) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (at, self._num_events, action, request_id))
