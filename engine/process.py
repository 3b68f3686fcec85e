"""The engine process: how a server starts it, and what runs in it (`python -m engine.process`).

    server                                        engine process
      stdin (kept open) -- LaunchConfig, JSON -->   first line; its end is the server's end: leave at once
      input   PUSH connect ---- ToEngine -------->  PULL bind      reader thread -> inbox
      output  PULL bind <------ FromEngine -------  PUSH connect   the step loop

Both sockets live in a directory that only this user can enter. SIGTERM and SIGINT are the server's business: the engine
ignores them and leaves on Shutdown, or when the server is gone.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import zmq

from engine.clients import MAX_FRAME_BYTES, SocketClient
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.executor import Executor
from engine.messages import EngineDead, FromEngine, ToEngine, decode_to_engine, encode

logger = logging.getLogger(__name__)

ENGINE_COMMAND = (sys.executable, "-m", "engine.process")
_ROOT = Path(__file__).resolve().parents[1]
_PR_SET_PDEATHSIG = 1
_LINGER_MILLISECONDS = 2000
# sun_path holds 107 characters.
_MAX_SOCKET_PATH = 100


class LaunchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine process is told at birth."""

    config: EngineConfig
    input_address: str
    output_address: str
    log_level: str = "INFO"


@dataclass(slots=True, kw_only=True)
class EngineHandle:
    """A running engine process, as its server holds it."""

    client: SocketClient
    process: subprocess.Popen[bytes]
    directory: Path
    exited: asyncio.Event
    """Set on the server's loop when the process has ended and been reaped."""

    async def stop(self, grace_seconds: float = 5.0) -> int:
        """Ask the engine to leave, kill it after `grace_seconds`, and clean up; returns its exit code."""
        self.client.shut_down()
        try:
            async with asyncio.timeout(grace_seconds):
                await self.exited.wait()
        except TimeoutError:
            self.process.kill()
            await self.exited.wait()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        await self.client.close()
        shutil.rmtree(self.directory, ignore_errors=True)
        return self.process.wait()


async def start_engine(
    config: EngineConfig,
    *,
    timeout_seconds: float = 600.0,
    log_level: str = "INFO",
    command: Sequence[str] = ENGINE_COMMAND,
) -> EngineHandle:
    """Start an engine process and wait until it is ready. Call it on the thread that outlives the engine.

    `command` runs `main` of this module, with another executor for one.

    Raises:
        EngineDeadError: it could not start; the text is the reason as the engine gave it.
        TimeoutError: it was not ready in time.
    """
    directory = _socket_directory()
    client = SocketClient(directory)
    launch = LaunchConfig(
        config=_with_absolute_path(config),
        input_address=client.input_address,
        output_address=client.output_address,
        log_level=log_level,
    )
    # The working directory makes the packages importable where Fathom is not installed.
    # Threads that spin while they wait for work make each other late wherever cores are shared. The user's word wins.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=_ROOT, env=environment)  # noqa: S603, ASYNC220
    handle = EngineHandle(client=client, process=process, directory=directory, exited=asyncio.Event())
    _watch(handle, asyncio.get_running_loop())
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(msgspec.json.encode(launch) + b"\n")
            process.stdin.flush()
        await client.start(timeout_seconds)
    except BaseException:
        await handle.stop(grace_seconds=0.0)
        raise
    return handle


def main(make_executor: Callable[[EngineConfig], Executor] | None = None) -> int:
    """Life of an engine process; the exit code is 0 only after a Shutdown."""
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=LaunchConfig)
    logging.raiseExceptions = False
    formatter = logging.Formatter("%(asctime)s %(levelname)s engine[%(process)d] %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=launch.log_level, handlers=[handler])
    _follow_parent()
    context = zmq.Context()
    output = context.socket(zmq.PUSH)
    output.set_hwm(0)
    output.connect(launch.output_address)

    def send(frame: FromEngine) -> None:
        output.send(encode(frame))

    try:
        core = _create_core(launch.config, make_executor or create_executor, send)
        if core is None:
            return 1
        # Bound before the first frame says that the engine is ready: what is sent after that arrives.
        source = context.socket(zmq.PULL)
        source.set_hwm(0)
        source.bind(launch.input_address)
        threading.Thread(target=_read, args=(source, core), name="reader", daemon=True).start()
        return 0 if core.run(send) else 1
    finally:
        output.close(linger=_LINGER_MILLISECONDS)
        # Waits until the last frame has left, and ends the reader.
        context.term()


def create_executor(config: EngineConfig) -> Executor:
    """The executor that the configuration asks for. Everything with torch in it is imported here."""
    if config.simulate:
        from engine.runner.sim_executor import create_sim_executor

        return create_sim_executor(config)
    from engine.runner.executor import create_executor as create_model_executor

    return create_model_executor(config)


def _create_core(
    config: EngineConfig, make_executor: Callable[[EngineConfig], Executor], send: Callable[[FromEngine], None]
) -> EngineCore | None:
    began = time.monotonic()
    try:
        executor = make_executor(config)
        return EngineCore(executor, load_seconds=time.monotonic() - began)
    except (ValueError, OSError) as error:
        # The user's mistake or the machine's state, in its own words.
        logger.error("the engine cannot start: %s", error)
        send(EngineDead(reason=str(error)))
    except Exception as error:
        logger.exception("the engine cannot start")
        send(EngineDead(reason=f"{type(error).__name__}: {error}"))
    return None


def _read(source: "zmq.Socket[bytes]", core: EngineCore) -> None:
    """The reader thread: frames to messages. Should it fail, the engine ends: nobody may wait for a deaf engine."""
    try:
        while True:
            message = _decode(source.recv())
            if message is not None:
                core.inbox.put(core.prepare(message))
    except zmq.ContextTerminated:
        pass
    except Exception as error:
        logger.exception("the reader ends")
        core.inbox.put(RuntimeError(f"the engine's input has ended: {error}"))
    finally:
        source.close(linger=0)


def _decode(frame: bytes) -> ToEngine | None:
    if len(frame) > MAX_FRAME_BYTES:
        logger.warning("a message of %d bytes is dropped", len(frame))
        return None
    try:
        return decode_to_engine(frame)
    except msgspec.MsgspecError as error:
        logger.warning("a message of %d bytes cannot be read and is dropped: %s", len(frame), error)
        return None


def _follow_parent() -> None:
    """Leave when the server does. The death signal alone is not enough: it follows the parent's thread."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        # Not through sys.stdin: a thread inside its buffer makes the interpreter's exit fail.
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _watch(handle: EngineHandle, loop: asyncio.AbstractEventLoop) -> None:
    """Notice the end of the process at once, on the server's loop."""

    def note(how: str) -> None:
        handle.exited.set()
        handle.client.notice_exit(f"the engine process {how}")

    def wait() -> None:
        code = handle.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
        # A closed loop has no streams to end.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(note, how)

    threading.Thread(target=wait, name="engine-exit", daemon=True).start()


def _with_absolute_path(config: EngineConfig) -> EngineConfig:
    return replace(config, model_dir=str(Path(config.model_dir).absolute())) if config.model_dir else config


def _socket_directory() -> Path:
    """A directory of mode 0700 whose path fits a socket address."""
    directory = tempfile.mkdtemp(prefix="fathom-")
    if len(directory) > _MAX_SOCKET_PATH - len("/output"):
        os.rmdir(directory)
        directory = tempfile.mkdtemp(prefix="fathom-", dir="/tmp")
    return Path(directory)


if __name__ == "__main__":
    sys.exit(main())
