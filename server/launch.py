"""From configuration to a serving process and back: claim the port, start the engine, serve, drain, leave nothing.

signal 1     not ready, new work 503, running work finishes or is told after --drain-timeout, exit 0
signal 2     running work is told now
engine dies  open streams get an error event, not ready, exit 1
"""

import asyncio
import contextlib
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
import uvloop

from engine.client import EngineDeadError
from engine.config import EngineConfig
from engine.process import EngineHandle, start_engine
from server import logs
from server.app import create_app, create_routes
from server.auth import KeyRing, load_keys
from server.batches.database import Database
from server.batches.runner import BatchRunner
from server.config import VERSION, ServerConfig, ServerConfigError
from server.connection import connection_class
from server.limits import MOST_HEADER_BYTES
from server.state import ServerState
from server.text.tokenizer import Tokenizer

_BACKLOG = 2048
_MOST_FILES = 65536
_WATCH_SECONDS = 0.1
_LAST_WORDS_SECONDS = 2.0
"""For streams to send their error event once running work must end."""
_HTTP_EXIT_SECONDS = 3
_ENGINE_EXIT_SECONDS = 5.0


def serve(config: ServerConfig, make_engine_config: Callable[[], EngineConfig]) -> int:
    """Serve until a signal or the engine's death; returns the exit code.

    `make_engine_config` may take its time (it may have to make a model): it runs when the port is ours.

    Raises:
        ServerConfigError: flags, keys or address cannot work; nothing was started.
    """
    logs.configure()
    keys = load_keys(config.api_key_file)
    config.check(num_keys=len(keys))
    # Before the weights: a taken port should not cost a minute of loading.
    listener = _listen(config.host, config.port)
    _raise_file_limit()
    try:
        database = Database.open(config.data_dir)
        try:
            return _serve(config, keys, listener, database, make_engine_config())
        finally:
            database.close()
    finally:
        listener.close()


def _serve(
    config: ServerConfig, keys: KeyRing, listener: socket.socket, database: Database, engine_config: EngineConfig
) -> int:
    model_name = config.served_model_name or Path(engine_config.model_dir).resolve().name

    async def run() -> int:
        state = ServerState(config, keys, model_name, database)
        return await _Process(state, engine_config, listener).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


class _HttpServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Signals are ours: uvicorn would stop listening before running requests have drained.
        yield


class _Process:
    def __init__(self, state: ServerState, engine_config: EngineConfig, listener: socket.socket) -> None:
        self._state = state
        self._engine_config = engine_config
        self._listener = listener
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._http = _HttpServer(
            uvicorn.Config(
                create_app(state),
                http=connection_class(state.config.header_timeout),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=MOST_HEADER_BYTES,
                timeout_graceful_shutdown=_HTTP_EXIT_SECONDS,
            )
        )

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        http = asyncio.create_task(self._http.serve(sockets=[self._listener]))
        engine: EngineHandle | None = None
        try:
            try:
                engine = await self._start_engine()
            except (EngineDeadError, OSError, ValueError) as error:
                logs.server.error("the engine did not start: %s", error)
                return 1
            return 0 if engine is None else await self._serve(engine, http)
        finally:
            self._state.admission.draining = True
            self._state.stop_now()
            self._http.should_exit = True
            self._http.force_exit = self._stop_now.is_set()
            await asyncio.gather(http, return_exceptions=True)
            await self._state.detach()
            if engine is not None:
                await engine.stop(_ENGINE_EXIT_SECONDS)

    async def _start_engine(self) -> EngineHandle | None:
        """The engine with its tokenizer attached; None when a signal came first."""
        starting = asyncio.create_task(start_engine(self._engine_config))
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                handle = await starting
                await handle.stop(0)
            return None
        handle = starting.result()
        try:
            directory = Path(handle.client.info.model_dir)
            tokenizer = await asyncio.to_thread(Tokenizer.load, directory, handle.client.info.vocab_size)
            self._state.attach(handle.client, tokenizer)
            self._state.serving().grammars.start()
        except BaseException:
            await handle.stop(0)
            raise
        return handle

    async def _serve(self, engine: EngineHandle, http: asyncio.Task[None]) -> int:
        state = self._state
        host, port = self._listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        # A supervisor may have closed our stdout; that is no reason to stop.
        with contextlib.suppress(OSError):
            print(f"Fathom {VERSION} serving {state.model_name} on http://{host}:{port}", flush=True)
        died = asyncio.create_task(self._engine_death(engine))
        stopped = asyncio.create_task(self._stop.wait())
        hurried = asyncio.create_task(self._stop_now.wait())
        idle = asyncio.create_task(asyncio.sleep(0))
        lane = state.batch_lane()
        batches = asyncio.create_task(BatchRunner(state, lane, create_routes(lane)).run())
        try:
            await asyncio.wait({died, stopped, http}, return_when=asyncio.FIRST_COMPLETED)
            state.admission.draining = True
            # Lines of batches are not worth a longer stop: they run again after the next start.
            batches.cancel()
            await asyncio.gather(batches, return_exceptions=True)
            if stopped.done() and not died.done():
                logs.server.info("draining %d requests", state.admission.in_flight)
                idle = asyncio.create_task(state.admission.wait_idle())
                await asyncio.wait(
                    {died, hurried, idle}, timeout=state.config.drain_timeout, return_when=asyncio.FIRST_COMPLETED
                )
            if died.done():
                logs.server.error("the engine died: %s", engine.client.dead_reason)
                # Streams hear it from the engine's client and send their own error events.
                await self._settle(_LAST_WORDS_SECONDS)
            state.stop_now()
            await self._settle(_LAST_WORDS_SECONDS)
            return 1 if died.done() or http.done() else 0
        finally:
            for task in (died, stopped, hurried, idle, batches):
                task.cancel()

    async def _engine_death(self, engine: EngineHandle) -> None:
        while engine.client.dead_reason is None:  # noqa: ASYNC110  a client has no event for it, a state it has
            await asyncio.sleep(_WATCH_SECONDS)

    async def _settle(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._state.admission.wait_idle()

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ServerConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    listener.setblocking(False)
    return listener


def _raise_file_limit() -> None:
    """Each open stream is a file descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(_MOST_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
