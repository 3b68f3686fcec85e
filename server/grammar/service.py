"""Grammars of requests, written and compiled in processes that can be killed, and remembered.

A job that takes more of a processor's time than the deadline, or more memory than its process may have, costs its own
request a 400 and the process its life; another one is started in its place. Where the machine is too busy to tell, the
request gets a 503 and nothing is remembered.
"""

import asyncio
import contextlib
import sys
import time
from collections import OrderedDict
from hashlib import blake2b
from pathlib import Path

import msgspec

from server.errors import bad_request, internal, overloaded
from server.grammar.messages import Answer, GrammarJob, GrammarText, Refusal, Setup

WORKER_COMMAND = (sys.executable, "-m", "server.grammar.worker")
NUM_WORKERS = 2
DEADLINE_SECONDS = 2.0
MEMORY_BYTES = 1 << 30
CACHE_BYTES = 64 << 20
MOST_JOB_BYTES = 1 << 20
"""Tools and schemas of one request, as JSON."""
_START_SECONDS = 60.0
_PATIENCE = 10
"""Deadlines on the clock that a job may wait for one of processor time."""
_BUSY_RETRY_SECONDS = 10
_MOST_LINE = 64 << 20
_ENTRY_BYTES = 512
_ROOT = Path(__file__).resolve().parents[2]


class GrammarService:
    """One for each server; made and used on its event loop."""

    def __init__(
        self,
        model_dir: str,
        *,
        vocab_size: int,
        eos_token_id: int,
        num_workers: int = NUM_WORKERS,
        deadline_seconds: float = DEADLINE_SECONDS,
        memory_bytes: int = MEMORY_BYTES,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._setup = Setup(
            model_dir=model_dir, vocab_size=vocab_size, eos_token_id=eos_token_id, memory_bytes=memory_bytes
        )
        self._num_workers = num_workers
        self._deadline_seconds = deadline_seconds
        self._cache_bytes = cache_bytes
        self._known: OrderedDict[bytes, Answer] = OrderedDict()
        self._used_bytes = 0
        self._running: dict[bytes, asyncio.Task[Answer]] = {}
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._workers: set[_Worker] = set()
        self._started = False
        self.num_killed = 0
        """Processes that took too long or too much."""
        self.num_left_out = 0
        """Keywords of tools that are not strict which were not kept."""

    @property
    def used_bytes(self) -> int:
        """Of the answers remembered."""
        return self._used_bytes

    def start(self) -> None:
        """Start the processes; the first job does so where nobody did."""
        if not self._started:
            self._started = True
            for _ in range(self._num_workers):
                self._replace()

    async def write(self, job: GrammarJob) -> GrammarText:
        """The grammar of a job.

        Raises:
            ApiError: 400 with `param` when there is none; 500 when no process can be started, 503 when the machine is
                too busy for the work.
        """
        line = msgspec.json.encode(job)
        param = job.format_param or "tools"
        if len(line) > MOST_JOB_BYTES:
            message = f"{param}: tools and schemas have {len(line)} bytes; at most {MOST_JOB_BYTES} can be enforced."
            raise bad_request(message, param=param)
        key = blake2b(line, digest_size=32).digest()
        answer = self._known.get(key)
        if answer is not None:
            self._known.move_to_end(key)
        else:
            task = self._running.get(key)
            if task is None:
                task = self._running[key] = asyncio.create_task(self._ask(key, line, param))
                task.add_done_callback(lambda _: self._running.pop(key, None))
            # A client that leaves does not take the answer of the others with it.
            answer = await asyncio.shield(task)
        if answer.grammar is None:
            assert answer.refusal is not None
            raise bad_request(f"{answer.refusal.message.rstrip('.')}.", param=answer.refusal.param)
        return answer.grammar

    async def close(self) -> None:
        """End the processes."""
        self._started = True
        for task in (*self._tasks, *self._running.values()):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._running.values(), return_exceptions=True)
        for worker in list(self._workers):
            await worker.kill()

    async def _ask(self, key: bytes, line: bytes, param: str) -> Answer:
        self.start()
        worker = await self._idle.get()
        if worker.process is None:
            # It could not start; perhaps the next one can.
            self._replace()
            raise internal()
        try:
            answer = await worker.ask(line, self._deadline_seconds)
        except _BusyError:
            await self._kill(worker)
            message = "The server is too busy to check the grammar of this request."
            raise overloaded(message, _BUSY_RETRY_SECONDS) from None
        except (TimeoutError, EOFError, OSError, ValueError) as error:
            self.num_killed += 1
            await self._kill(worker)
            why = (
                f"it takes longer than {self._deadline_seconds:g} s to compile"
                if isinstance(error, TimeoutError)
                else f"it takes more than {self._setup.memory_bytes >> 20} MiB to compile"
            )
            # Remembered like any other answer: the next one would take as long.
            answer = Answer(refusal=Refusal(message=f"{param}: {why}", param=param))
        except BaseException:
            await self._kill(worker)
            raise
        else:
            self._idle.put_nowait(worker)
        if answer.grammar is not None:
            self.num_left_out += len(answer.grammar.left_out)
        self._remember(key, answer)
        return answer

    def _remember(self, key: bytes, answer: Answer) -> None:
        self._known[key] = answer
        self._used_bytes += _size(answer)
        while self._used_bytes > self._cache_bytes and len(self._known) > 1:
            _, old = self._known.popitem(last=False)
            self._used_bytes -= _size(old)

    async def _kill(self, worker: "_Worker") -> None:
        self._workers.discard(worker)
        await worker.kill()
        self._replace()

    def _replace(self) -> None:
        task = asyncio.create_task(self._start_worker())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start_worker(self) -> None:
        worker = _Worker()
        self._workers.add(worker)
        if not await worker.start(self._setup):
            self._workers.discard(worker)
        self._idle.put_nowait(worker)


class _BusyError(Exception):
    """A process has had too little of a processor's time for a verdict."""


class _Worker:
    """One process."""

    def __init__(self) -> None:
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, setup: Setup) -> bool:
        """False when it does not come up; `process` is None then."""
        self.process = await asyncio.create_subprocess_exec(
            *WORKER_COMMAND,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=_ROOT,
            limit=_MOST_LINE,
        )
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self._exchange(msgspec.json.encode(setup))
        except (TimeoutError, EOFError, OSError, ValueError):
            await self.kill()
            return False
        return True

    async def ask(self, line: bytes, deadline_seconds: float) -> Answer:
        """Raises TimeoutError after `deadline_seconds` of the process's own time, _BusyError when it does not get them;
        EOFError or OSError when the process has died."""
        started = self._used_seconds()
        exchange = asyncio.ensure_future(self._exchange(line))
        try:
            for _ in range(_PATIENCE):
                await asyncio.wait([exchange], timeout=deadline_seconds)
                if exchange.done():
                    return msgspec.json.decode(exchange.result(), type=Answer)
                if self._used_seconds() - started >= deadline_seconds:
                    raise TimeoutError
            raise _BusyError
        finally:
            exchange.cancel()

    def _used_seconds(self) -> float:
        """Processor time of the process; where the system does not tell, the clock's."""
        assert self.process is not None
        if sys.platform != "linux":
            return time.monotonic()
        # The clock id of another process: its number, negated, over three bits of kind (2: scheduled time).
        return time.clock_gettime((~self.process.pid << 3) | 2)

    async def kill(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _exchange(self, line: bytes) -> bytes:
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + b"\n")
        await self.process.stdin.drain()
        answer = await self.process.stdout.readline()
        if not answer.endswith(b"\n"):
            raise EOFError("the process has ended")
        return answer


def _size(answer: Answer) -> int:
    return _ENTRY_BYTES + len(msgspec.json.encode(answer))
