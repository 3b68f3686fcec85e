"""Runs the batches: validates them, has their lines answered a few at a time, and ends them.

Everything that matters is in the database, so a server that stops, in whatever way, goes on where it was: lines
without an answer run again, those with one do not.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from secrets import token_hex
from typing import Any

import msgspec
from starlette.types import ASGIApp

from server import logs
from server.batches import lane
from server.batches.check import InvalidBatch, read_body, read_lines
from server.batches.files import Files
from server.batches.store import Batch, Batches, Line, LineUsage, Refused
from server.errors import ApiError
from server.state import ServerState

_TICK_SECONDS = 0.1
"""How often the room is looked at while lines wait for it."""
_IDLE_SECONDS = 1.0
_SWEEP_SECONDS = 60.0
_PAUSE_SECONDS = 5.0
_LINES_AHEAD = 64
_RETRY_STATUS = frozenset({408, 429, 499, 503})
"""These say something about the server's state, not about the line."""
_MOST_TRIES = 3
_FIRST_RETRY_SECONDS = 0.5
_LONGEST_RETRY_SECONDS = 30.0


@dataclass(slots=True)
class _Active:
    """A batch whose lines run."""

    batch: Batch
    waiting: deque[Line] = field(default_factory=deque)
    last: int = 0
    """The last line that was fetched."""
    fetched_all: bool = False
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class BatchRunner:
    def __init__(
        self,
        state: ServerState,
        lane_state: ServerState,
        app: ASGIApp,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`app` has the routes and shares `lane_state`."""
        self._state = state
        self._lane_state = lane_state
        self._app = app
        self._batches: Batches = state.batches
        self._files: Files = state.files
        self._clock = clock
        self._active: dict[int, _Active] = {}
        self._turns: deque[int] = deque()
        self._next_sweep = 0.0

    async def run(self) -> None:
        """Until it is cancelled; running lines are given up then and run again another time."""
        try:
            while True:
                self._state.batches_changed.clear()
                try:
                    busy = await self._round()
                except ApiError:
                    # The storage fails, and said so in the log.
                    await asyncio.sleep(_PAUSE_SECONDS)
                    continue
                except Exception as error:  # noqa: BLE001  batches may stop, the server goes on
                    logs.server.error("running batches failed: %s", logs.failure(error))
                    await asyncio.sleep(_PAUSE_SECONDS)
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_TICK_SECONDS if busy else _IDLE_SECONDS):
                        await self._state.batches_changed.wait()
        finally:
            for active in self._active.values():
                await _give_up(active)

    async def _round(self) -> bool:
        """Bring every batch one state further, then begin lines; False when there is nothing to do."""
        if self._clock() >= self._next_sweep:
            self._next_sweep = self._clock() + _SWEEP_SECONDS
            await self._files.delete_expired()
            await self._batches.delete_old()
        unfinished = await self._batches.unfinished()
        for batch in unfinished:
            await self._advance(batch)
        for _ in range(lane.MOST_WAITING - self._lane_state.admission.queued_requests):
            if not lane.has_room(self._state, self._num_running) or not await self._begin_next():
                break
        return bool(unfinished)

    @property
    def _num_running(self) -> int:
        return sum(len(active.tasks) for active in self._active.values())

    async def _advance(self, batch: Batch) -> None:
        match batch.status:
            case "validating" if batch.expires_at <= self._clock():
                await self._batches.finish(batch, "expired")
            case "validating":
                await self._validate(batch)
            case "in_progress" if batch.expires_at <= self._clock():
                await self._leave(batch)
                await self._batches.finish(batch, "expired", _expired)
            case "in_progress":
                active = self._active.get(batch.seq)
                if active is None:
                    active = self._active[batch.seq] = _Active(batch)
                    self._turns.append(batch.seq)
                await self._fetch(active)
                if active.fetched_all and not active.waiting and not active.tasks:
                    await self._leave(batch)
                    await self._batches.finalize(batch)
                    await self._batches.finish(batch, "completed")
            case "cancelling":
                await self._leave(batch)
                await self._batches.finish(batch, "cancelled")
            case "finalizing":
                await self._batches.finish(batch, "completed")

    async def _validate(self, batch: Batch) -> None:
        try:
            data = await self._files.read_all(batch.owner, batch.input_file_id)
            lines = await asyncio.to_thread(read_lines, data, batch.endpoint)
        except InvalidBatch as invalid:
            await self._batches.fail(batch, invalid.errors)
        else:
            await self._batches.start(batch, lines)
        self._state.batches_changed.set()

    async def _fetch(self, active: _Active) -> None:
        if not active.waiting and not active.fetched_all:
            lines = await self._batches.to_do(active.batch, active.last, _LINES_AHEAD)
            active.waiting.extend(lines)
            active.fetched_all = len(lines) < _LINES_AHEAD
            active.last = lines[-1].number if lines else active.last

    async def _begin_next(self) -> bool:
        """Begin a line of the batch whose turn it is: a small batch does not wait for a large one."""
        for _ in range(len(self._turns)):
            self._turns.rotate(-1)
            active = self._active[self._turns[-1]]
            await self._fetch(active)
            if active.waiting:
                line = active.waiting.popleft()
                task = asyncio.create_task(self._run_line(active.batch, line))
                active.tasks.add(task)
                task.add_done_callback(partial(self._ended, active, line))
                return True
        return False

    def _ended(self, active: _Active, line: Line, task: asyncio.Task[None]) -> None:
        active.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # It has no answer yet. The store counts how often it is begun.
            logs.server.error("a line of %s failed: %s", active.batch.id, logs.failure(error))
            active.waiting.append(line)
        self._state.batches_changed.set()

    async def _leave(self, batch: Batch) -> None:
        active = self._active.pop(batch.seq, None)
        if active is not None:
            self._turns.remove(batch.seq)
            await _give_up(active)

    async def _run_line(self, batch: Batch, line: Line) -> None:
        try:
            await self._answer_line(batch, line)
        except ApiError:
            # The storage fails; no hurry to see it fail again.
            await asyncio.sleep(_PAUSE_SECONDS)
            raise

    async def _answer_line(self, batch: Batch, line: Line) -> None:
        found = await self._batches.take(batch, line)
        if isinstance(found, Refused):
            result, ok, usage = _no_response(line.custom_id, found.code, found.message), False, LineUsage()
        else:
            answer = await self._ask(batch, found)
            ok = answer.status < 300
            result, usage = _response(line.custom_id, answer), _usage(answer.body) if ok else LineUsage()
        if await self._batches.record(batch, line, result, ok=ok, usage=usage):
            self._state.metrics.batch_lines["completed" if ok else "failed"].inc()

    async def _ask(self, batch: Batch, text: bytes) -> lane.Answer:
        """The answer that is kept: overload is waited out, failures of the server are tried again."""
        try:
            body = read_body(text)
        except ApiError as error:
            return lane.Answer(error.status, "", error.body())
        pause, tries = _FIRST_RETRY_SECONDS, 0
        while True:
            answer = await lane.post(self._app, batch.endpoint, body, batch.owner)
            tries += answer.status not in _RETRY_STATUS
            if (answer.status < 500 and answer.status not in _RETRY_STATUS) or tries >= _MOST_TRIES:
                return answer
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_RETRY_SECONDS)


async def _give_up(active: _Active) -> None:
    tasks = list(active.tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _response(custom_id: str, answer: lane.Answer) -> bytes:
    return _row(
        custom_id,
        {"status_code": answer.status, "request_id": answer.request_id, "body": msgspec.Raw(answer.body)},
        None,
    )


def _no_response(custom_id: str, code: str, message: str) -> bytes:
    return _row(custom_id, None, {"code": code, "message": message})


def _expired(custom_id: str) -> bytes:
    message = "This request could not be executed before the completion window expired."
    return _no_response(custom_id, "batch_expired", message)


def _row(custom_id: str, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
    row = {"id": f"batch_req_{token_hex(16)}", "custom_id": custom_id, "response": response, "error": error}
    return msgspec.json.encode(row) + b"\n"


class _Details(msgspec.Struct):
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class _Usage(msgspec.Struct):
    """The counts of all three APIs."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Counted(msgspec.Struct):
    usage: _Usage | None = None


def _usage(body: bytes) -> LineUsage:
    usage = msgspec.json.decode(body, type=_Counted).usage or _Usage()
    read = usage.prompt_tokens_details or usage.input_tokens_details or _Details()
    written = usage.completion_tokens_details or usage.output_tokens_details or _Details()
    return LineUsage(
        input_tokens=usage.prompt_tokens or usage.input_tokens,
        cached_tokens=read.cached_tokens,
        output_tokens=usage.completion_tokens or usage.output_tokens,
        reasoning_tokens=written.reasoning_tokens,
    )
