"""Runs operations against a whole engine core on the symbolic device, watches its books, and shortens what fails."""

import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, get_args

from symbolic.device import SymbolicDevice
from symbolic.faults import Faults
from symbolic.traffic import MODEL, AbortInFlight, Budget, Jump, Kind, Op, Step, Traffic, expected, random_config

from engine.config import ResolvedConfig
from engine.core import EngineCore
from engine.executor import StepError
from engine.messages import AbortRequest, AddRequest, StepOutputs, unpack_ids
from engine.plan import StepPlan, StepResult

MakeDevice = Callable[..., SymbolicDevice]
EPISODES: dict[Kind, int] = {"plain": 8, "crowded": 8, "asleep": 5, "storm": 8, "full": 8, "faulty": 25}
"""Seeds that must pass, and within which every mutant must fail; faults are rare, so they take more."""
EPISODE_OPS = 400
"""24,800 operations in all, those not counted in which an episode drains."""
FULL_CHECK = 50
"""Operations between two recomputations of all books."""
MOST_IDLE_STEPS = 3
"""Steps without a row while somebody waits: one that ends requests, one that keeps their slots, one that frees them."""


@dataclass(slots=True, kw_only=True)
class Episode:
    """One engine and what happens to it."""

    seed: int
    config: ResolvedConfig
    ops: list[Op]
    faults: Faults = field(default_factory=Faults)
    most_live: int = 1_000_000
    """With so many requests queued and running an arrival is a step instead: a long episode would pile up a queue that
    takes longer to drain than the episode took."""

    @staticmethod
    def draw(seed: int, num_ops: int, kind: Kind | None = None) -> "Episode":
        rng = random.Random(seed)
        kind = kind or rng.choice(get_args(Kind))
        config = random_config(rng, kind)
        faults = Faults()
        if kind == "faulty":
            faults = Faults(
                seed=seed, step=rng.choice((0.02, 0.1)), request=rng.choice((0.03, 0.2)), copy=0.2, slow=0.02
            )
        elif kind == "asleep" and seed % 2:
            faults = Faults(seed=seed, step=0.02, copy=0.2)
        return Episode(seed=seed, config=config, ops=Traffic(rng, config, kind).ops(num_ops), faults=faults)


class Run:
    """One episode in progress."""

    def __init__(
        self,
        episode: Episode,
        *,
        make_device: MakeDevice = SymbolicDevice,
    ) -> None:
        self.sent: dict[str, AddRequest] = {}
        self.device = make_device(
            episode.config,
            MODEL,
            salt_of=lambda request_id: self.sent[request_id].cache_salt,
            faults=episode.faults,
        )
        self.recorder = Recorder(self.device)
        self.now = 1.0
        self.num_ops = 0
        self.core = EngineCore(self.recorder, clock=lambda: self.now, draw_seed=lambda: 1)
        self.scheduler = self.core.scheduler
        self.recorder.abort = self.scheduler.abort
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.finish: dict[str, str] = {}
        self._aborted: set[str] = set()
        self.episode = episode
        self._idle_steps = 0
        self.watch_device = True
        """False: something else returns the results."""

    def all(self) -> None:
        for op in self.episode.ops:
            self.do(op)
        self.drain()

    def do(self, op: Op) -> None:
        self.num_ops += 1
        if isinstance(op, AddRequest) and len(self.scheduler.requests) >= self.episode.most_live:
            op = Step()
        match op:
            case AddRequest():
                # As a client would: times are relative to the moment in which the request is made.
                deadline = None if op.deadline is None else self.now + op.deadline
                message = self.sent[op.request_id] = _with(op, deadline, self.now)
                self.core.inbox.put(message)
            case AbortRequest():
                self._aborted.add(op.request_id)
                self.core.inbox.put(op)
            case AbortInFlight():
                self._aborted.add(op.request_id)
                self.recorder.meanwhile.append(op.request_id)
            case Jump():
                self.now += op.seconds
            case Budget():
                self._set_rows(max(op.num_rows, self.episode.config.max_num_seqs))
            case Step():
                self._step()
        if self.num_ops % FULL_CHECK == 0:
            self._check_all()

    def drain(self) -> None:
        """Everybody gets an answer and everything comes back, in steps of at least the configured size."""
        self._set_rows(max(256, self.episode.config.max_num_batched_tokens))
        self._step()
        for _ in range(50_000):
            if not self.scheduler.has_work:
                break
            self.do(Step())
        assert not self.scheduler.requests, "requests never end"
        self._step()
        self._check_all()
        kv, config = self.scheduler.kv, self.episode.config
        assert not (self.watch_device and self.device.num_live), "the device remembers a request"
        assert set(self.finish) == set(self.sent), "a request has no answer"
        assert kv.num_available_pages == config.num_pages, "pages are lost"
        assert kv.pages.num_free + kv.index.num_device_pages == config.num_pages, "pages are neither free nor cached"
        assert kv.num_free_slots == config.max_num_seqs and not kv.num_departing, "slots are lost"
        # What is cached can be given up, all of it, and then nothing is left.
        evicted = kv.index.evict(config.num_pages)
        kv.pages.free(evicted.page_ids)
        kv.snapshots.discard(evicted.lost)
        assert kv.pages.num_free == config.num_pages, "a cached page can never be given up"
        dropped = kv.index.discard(set(range(config.num_host_pages)), set())
        kv.snapshots.discard(dropped.lost)
        assert not kv.index and kv.index.host.num_free == config.num_host_pages, "host pages are lost"
        assert not len(kv.snapshots), "a snapshot is kept that nobody can come back to"
        kv.check()

    def _set_rows(self, count: int) -> None:
        self.scheduler.config = self.device.config = replace(self.scheduler.config, max_num_batched_tokens=count)

    def _step(self) -> None:
        num_waiting = len(self.scheduler.requests)
        self.recorder.num_rows = 0
        self.core.step()
        self.now += max(self.recorder.seconds, 1e-6)
        idle = bool(num_waiting and self.scheduler.requests and not self.recorder.num_rows)
        self._idle_steps = self._idle_steps + 1 if idle else 0
        assert self._idle_steps <= MOST_IDLE_STEPS, "requests wait and nothing runs"
        while self.core.outbox:
            frame = self.core.outbox.popleft()
            if isinstance(frame, StepOutputs):
                self._hear(frame)
        self._check_few()

    def _hear(self, frame: StepOutputs) -> None:
        ids = unpack_ids(frame.token_ids).tolist()
        assert len(set(frame.request_ids)) == len(frame.request_ids), "two rows for one request"
        for i, request_id in enumerate(frame.request_ids):
            assert request_id not in self.finish, f"{request_id} speaks after its end"
            tokens = self.tokens[request_id]
            tokens += ids[frame.cu_tokens[i] : frame.cu_tokens[i + 1]]
            skipped = self.recorder.resumed.get(request_id, 0)
            assert frame.cached_tokens[i] <= skipped, (
                f"{request_id}: {frame.cached_tokens[i]} cached, {skipped} skipped"
            )
            finish = frame.finish[i]
            if finish is None:
                continue
            self.finish[request_id] = finish
            due, reason = expected(self.sent[request_id])
            if finish in ("stop", "length"):
                assert (tokens, finish) == (due, reason), f"{request_id} has a wrong answer"
            else:
                assert tokens == due[: len(tokens)], f"{request_id} has a wrong answer"
            error = frame.errors[i]
            assert (error is not None) == (finish == "error")
            assert finish != "abort" or request_id in self._aborted
            if error is not None and error.code == "internal":
                assert request_id in self.recorder.failed, f"{request_id} failed for no reason"

    def _check_few(self) -> None:
        scheduler, config = self.scheduler, self.episode.config
        kv = scheduler.kv
        assert scheduler.num_running + scheduler.num_waiting == len(scheduler.requests)
        assert 0 <= kv.num_available_pages <= config.num_pages
        assert scheduler.num_running + kv.num_free_slots + kv.num_departing <= config.max_num_seqs
        assert len(kv.snapshots) <= config.num_snapshots
        scheduler._admission.prefixes.check(scheduler._running)
        assert all(scheduler.requests[h.request_id].grant is None for h in kv.hibernations), "pins stay"

    def _check_all(self) -> None:
        self.scheduler.check()
        if not self.watch_device:
            return
        for request in self.scheduler.requests.values():
            if request.grant is not None and request.last_step_id:
                assert self.device.table(request.request_id) == request.grant.page_ids, "the device has another table"


class Computes(Protocol):
    """What the recorder needs of a device."""

    def execute(self, plan: StepPlan) -> StepResult: ...

    def close(self) -> None: ...


class Recorder:
    """Keeps plans and results on their way between engine and device."""

    def __init__(self, device: SymbolicDevice) -> None:
        self.device: Computes = device
        self.config, self.model, self.eos_token_id = device.config, device.model, device.eos_token_id
        self.keep = False
        self.abort: Callable[[str], None] = lambda request_id: None
        self.meanwhile: list[str] = []
        """Requests that end while the next step is under way."""
        self.log: list[tuple[StepPlan, StepResult | None]] = []
        """None: the step failed."""
        self.failed: set[str] = set()
        self.resumed: dict[str, int] = {}
        """Tokens that a request did not compute when it was new for the first time."""
        self.num_rows = 0
        self.seconds = 0.0

    def execute(self, plan: StepPlan) -> StepResult:
        self.num_rows, self.seconds = len(plan.scheduled), 0.001
        for new in plan.new:
            self.resumed.setdefault(new.request_id, new.num_computed_tokens)
        for request_id in self.meanwhile:
            self.abort(request_id)
        self.meanwhile.clear()
        try:
            result = self.device.execute(plan)
        except StepError:
            self.failed.update(rows.request_id for rows in plan.scheduled)
            if self.keep:
                self.log.append((plan, None))
            raise
        self.seconds = result.seconds
        self.failed |= result.failed.keys()
        if self.keep:
            self.log.append((plan, result))
        return result

    def close(self) -> None:
        self.device.close()


def run_episode(episode: Episode, *, make_device: MakeDevice = SymbolicDevice, shrink_seconds: float = 20.0) -> Run:
    """Run to the end.

    Raises:
        AssertionError: something is wrong; it names the seed and holds the shortest operations that still show it.
    """
    run = Run(episode, make_device=make_device)
    try:
        run.all()
    except Exception as error:
        ops = shrink(replace(episode, ops=episode.ops[: run.num_ops]), make_device, shrink_seconds)
        lines = "\n".join(f"    {describe(op)}" for op in ops[-60:])
        raise AssertionError(
            f"seed {episode.seed}, operation {run.num_ops}: {type(error).__name__}: {error}\n"
            f"  {episode.config}\n  {episode.faults}\n  {len(ops)} operations show it:\n{lines}"
        ) from error
    return run


def shrink(episode: Episode, make_device: MakeDevice, seconds: float) -> list[Op]:
    """Leave out operations, in ever smaller pieces, while the run still fails."""

    def fails(ops: Sequence[Op]) -> bool:
        try:
            Run(replace(episode, ops=list(ops)), make_device=make_device).all()
        except Exception:
            return True
        return False

    end = time.monotonic() + seconds
    ops, size = list(episode.ops), max(1, len(episode.ops) // 2)
    while time.monotonic() < end:
        start = 0
        while start < len(ops) and time.monotonic() < end:
            shorter = ops[:start] + ops[start + size :]
            if fails(shorter):
                ops = shorter
            else:
                start += size
        if size == 1:
            break
        size = max(1, size // 2)
    return ops


def describe(op: Op) -> str:
    if not isinstance(op, AddRequest):
        return str(op)
    prompt = unpack_ids(op.prompt_token_ids)
    return (
        f"add {op.request_id}: {len(prompt)} tokens from {prompt[:3].tolist()}, max_tokens {op.sampling.max_tokens}, "
        f"salt {op.cache_salt!r}, priority {op.priority}, snapshots {unpack_ids(op.snapshot_positions).tolist()}"
    )


def _with(message: AddRequest, deadline: float | None, now: float) -> AddRequest:
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    return AddRequest(**{**fields, "deadline": deadline, "arrival_time": now})
