"""The two implementations of `engine.client.EngineClient`: an engine in another process, and one in a thread.

Both hear the same frames; what differs is how a frame travels.
"""

import asyncio
import contextlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from pathlib import Path

import zmq
import zmq.asyncio

from engine.client import EngineDeadError, RequestOutput, joined
from engine.core import EngineCore
from engine.executor import Executor
from engine.messages import (
    AbortRequest,
    AddRequest,
    EngineDead,
    EngineInfo,
    EngineStats,
    FromEngine,
    Heartbeat,
    Ping,
    Shutdown,
    StepOutputs,
    ToEngine,
    decode_from_engine,
    encode,
)
from engine.outputs import split

logger = logging.getLogger(__name__)

MAX_FRAME_BYTES = 64 * 1024 * 1024
"""Largest message to an engine: a million token ids are 4 MiB."""
_CLOSED = "the engine client was closed"
_LAST_FRAME_SECONDS = 0.2
"""How long the frames of a process that has ended may still be on their way."""


class StreamingClient(ABC):
    """Streams of one engine, keyed by request id. Everything here runs on the server's event loop.

    What a stream holds unread is bounded by its request's `max_tokens`.
    """

    def __init__(self) -> None:
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._dead_reason: str | None = None
        self._progress_time = time.monotonic()
        self._streams: dict[str, asyncio.Queue[RequestOutput | None]] = {}

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "the engine is not ready yet"
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def dead_reason(self) -> str | None:
        return self._dead_reason

    @property
    def num_streams(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def seconds_since_progress(self, now: float) -> float:
        """Age of the newest frame whose step counter moved, or of the newest frame at all when the engine is idle.

        `now` is `time.monotonic()`.
        """
        return max(0.0, now - self._progress_time)

    async def submit(self, request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request; the last one has a finish reason. The request is sent at the first iteration.

        A reader that is slower than the engine gets the outputs of several steps as one. Closing the iterator early
        aborts the request.

        Raises:
            EngineDeadError: the engine is dead or dies meanwhile.
            ValueError: the id is in use, or the request is larger than MAX_FRAME_BYTES.
        """
        self._check_alive()
        if request.request_id in self._streams:
            raise ValueError(f"request id {request.request_id} is in use")
        stream: asyncio.Queue[RequestOutput | None] = asyncio.Queue()
        self._streams[request.request_id] = stream
        ended = False
        try:
            self._send(request)
            while not ended:
                outputs = [await stream.get()]
                while not stream.empty():
                    outputs.append(stream.get_nowait())
                news = [output for output in outputs if output is not None]
                if news:
                    ended = news[-1].finish_reason is not None
                    yield news[0] if len(news) == 1 else joined(news)
                if len(news) < len(outputs) and not ended:
                    raise EngineDeadError(self._dead_reason)
        finally:
            del self._streams[request.request_id]
            if not ended:
                self.abort(request.request_id)

    def abort(self, request_id: str) -> None:
        """Idempotent; unknown ids are ignored."""
        if self._dead_reason is None:
            self._send(AbortRequest(request_id=request_id))

    def ping(self, nonce: int) -> None:
        """Ask for a heartbeat that carries `nonce`."""
        self._check_alive()
        self._send(Ping(nonce=nonce))

    @abstractmethod
    async def close(self) -> None:
        """End every open stream and let go of the link."""

    @abstractmethod
    def _send(self, message: ToEngine) -> None: ...

    def _check_alive(self) -> None:
        if self._dead_reason is not None:
            raise EngineDeadError(self._dead_reason)

    def _hear(self, frame: FromEngine) -> None:
        match frame:
            case StepOutputs():
                for request_id, output in split(frame):
                    stream = self._streams.get(request_id)
                    if stream is not None:
                        stream.put_nowait(output)
                self._note_stats(frame.stats)
            case Heartbeat():
                self._note_stats(frame.stats)
            case EngineInfo():
                self._info = frame
                self._stats = EngineStats(num_free_pages=frame.num_pages, num_free_slots=frame.num_slots)
                self._progress_time = time.monotonic()
            case EngineDead():
                self._die(frame.reason)

    def _note_stats(self, stats: EngineStats) -> None:
        idle = stats.num_running + stats.num_waiting == 0
        if idle or stats.step_id != self._stats.step_id:
            self._progress_time = time.monotonic()
        self._stats = stats

    def _die(self, reason: str) -> None:
        if self._dead_reason is None:
            self._dead_reason = reason
            for stream in self._streams.values():
                stream.put_nowait(None)


class InProcessClient(StreamingClient):
    """An EngineCore in a thread of this process; serves tests and the simulator."""

    def __init__(self, executor: Executor) -> None:
        """The engine runs from here on; the event loop is the one that first calls `submit`."""
        super().__init__()
        self._core = EngineCore(executor)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._hear(self._core.info)
        self._thread = threading.Thread(target=self._core.run, args=(self._post,), name="engine", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        self._core.inbox.put(Shutdown())
        await asyncio.to_thread(self._thread.join)
        self._die(_CLOSED)

    def _send(self, message: ToEngine) -> None:
        self._loop = asyncio.get_running_loop()
        self._core.inbox.put(self._core.prepare(message))

    def _post(self, frame: FromEngine) -> None:
        if self._loop is None:
            self._hear(frame)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hear, frame)


class SocketClient(StreamingClient):
    """The engine process at the other end of two ZeroMQ sockets in `directory` (mode 0700, made by the caller)."""

    def __init__(self, directory: Path) -> None:
        """Binds the output socket. The engine binds the input before it says that it is ready; only then is there
        somewhere to send to.
        """
        super().__init__()
        self.input_address = f"ipc://{directory / 'input'}"
        self.output_address = f"ipc://{directory / 'output'}"
        self._context = zmq.asyncio.Context()
        # The high-water marks are off: admission bounds what goes out, max_tokens what comes in, and neither side may
        # wait for the other.
        self._to_engine: zmq.Socket[bytes] = zmq.Context.shadow(self._context).socket(zmq.PUSH)
        self._to_engine.set_hwm(0)
        self._to_engine.setsockopt(zmq.LINGER, 0)
        self._from_engine = self._context.socket(zmq.PULL)
        self._from_engine.set_hwm(0)
        self._from_engine.bind(self.output_address)
        self._ready = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None

    async def start(self, timeout_seconds: float) -> None:
        """Listen, and wait until the engine is ready.

        Raises:
            EngineDeadError: the engine could not start; the text is its reason.
            TimeoutError: it said nothing for `timeout_seconds`.
        """
        self._reader = asyncio.create_task(self._read())
        async with asyncio.timeout(timeout_seconds):
            await self._ready.wait()
        self._check_alive()

    def shut_down(self) -> None:
        """Ask the engine to leave now."""
        if self._ready.is_set() and self._dead_reason is None:
            self._send(Shutdown())

    def notice_exit(self, reason: str) -> None:
        """The process has ended: after its last frames, every stream ends with `reason` if they gave no better one."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(reason))

    async def close(self) -> None:
        for task in (self._reader, self._ending):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        self._die(_CLOSED)
        self._to_engine.close(linger=0)
        self._from_engine.close(linger=0)
        self._context.term()

    def _send(self, message: ToEngine) -> None:
        frame = encode(message)
        if len(frame) > MAX_FRAME_BYTES:
            raise ValueError(f"a message of {len(frame)} bytes is larger than {MAX_FRAME_BYTES}")
        if not self._to_engine.closed:
            self._to_engine.send(frame, zmq.NOBLOCK)

    async def _read(self) -> None:
        while True:
            frame = await self._from_engine.recv()
            try:
                self._hear(decode_from_engine(frame))
            except Exception as error:
                logger.exception("a frame of the engine cannot be read")
                self._die(f"a frame of the engine cannot be read: {error}")
            if self._dead_reason is not None:
                self._ready.set()
            elif self._info is not None and not self._ready.is_set():
                self._to_engine.connect(self.input_address)
                self._ready.set()

    async def _end(self, reason: str) -> None:
        await asyncio.sleep(_LAST_FRAME_SECONDS)
        self._die(reason)
        self._ready.set()
