"""A real child process and real sockets around the simulated executor: life, death, and what streams see of it."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import uvloop
import zmq

from engine.client import EngineDeadError, RequestOutput
from engine.clients import InProcessClient, StreamingClient
from engine.config import EngineConfig, ResolvedConfig
from engine.messages import AddRequest
from engine.process import EngineHandle, start_engine
from engine.runner.sim_executor import Faults, SimExecutor
from model.presets import preset

ROOT = Path(__file__).parents[2]
CONFIG = EngineConfig(model_dir="", simulate=True, max_model_len=4096, max_num_seqs=32, max_num_batched_tokens=512)
MakeMessage = Callable[..., AddRequest]

# An engine process whose executor goes wrong as the tests want it.
FAULTY = """
import sys
from engine.process import main
from engine.runner.sim_executor import CostModel, Faults, SimExecutor, sim_config
from model.presets import preset
faults = {faults}
sys.exit(main(lambda c: SimExecutor(sim_config(c, preset("nano")), preset("nano"), sleep=True, faults=faults)))
"""


def run(body: Callable[[EngineHandle], Awaitable[None]], faults: str = "") -> None:
    """Start an engine, run `body`, stop it."""

    async def main() -> None:
        if faults:
            handle = await start_engine(CONFIG, command=(sys.executable, "-c", FAULTY.format(faults=faults)))
        else:
            handle = await start_engine(CONFIG)
        try:
            async with asyncio.timeout(30):
                await body(handle)
        finally:
            await handle.stop(1.0)

    asyncio.run(main())


async def collect(client: StreamingClient, message: AddRequest) -> tuple[list[int], RequestOutput]:
    tokens: list[int] = []
    async for output in client.submit(message):
        tokens += output.token_ids
    return tokens, output


async def until(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


def is_gone(pid: int) -> bool:
    """No process, or one that nobody has reaped yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def test_start_answer_and_stop(make_message: MakeMessage) -> None:
    async def main() -> None:
        handle = await start_engine(CONFIG)
        info = handle.client.info
        assert (info.pid, info.max_model_len, info.num_slots) == (handle.process.pid, 4096, 32)
        assert stat.S_IMODE(handle.directory.stat().st_mode) == 0o700
        tokens, last = await collect(handle.client, make_message("a", 700, max_tokens=4, ignore_eos=True))
        assert len(tokens) == 4 and last.finish_reason == "length"
        assert await handle.stop() == 0
        assert not handle.directory.exists() and is_gone(info.pid)
        assert await handle.stop() == 0
        with pytest.raises(EngineDeadError, match="closed"):
            await collect(handle.client, make_message("late"))

    asyncio.run(main())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_200_requests_at_once(make_message: MakeMessage) -> None:
    async def body(handle: EngineHandle) -> None:
        messages = [make_message(f"r{i}", 1 + 3 * i, max_tokens=10, seed=i, ignore_eos=True) for i in range(200)]
        answers = await asyncio.gather(*(collect(handle.client, m) for m in messages))
        assert all(len(tokens) == 10 and last.finish_reason == "length" for tokens, last in answers)
        again, _ = await collect(handle.client, make_message("again", 1 + 3 * 77, max_tokens=10, seed=77))
        assert again == answers[77][0][: len(again)]
        stats = handle.client.stats
        assert (stats.num_free_pages, stats.num_free_slots) == (handle.client.info.num_pages, 32)
        assert stats.generation_tokens >= 2000 and handle.client.num_streams == 0

    run(body)


def test_closing_a_stream_early_frees_its_memory(make_message: MakeMessage) -> None:
    async def body(handle: EngineHandle) -> None:
        stream = handle.client.submit(make_message("a", 600, max_tokens=3000, ignore_eos=True))
        await anext(stream)
        await stream.aclose()
        await until(lambda: handle.client.stats.num_free_slots == 32 and handle.client.stats.step_id > 0, 2.0)
        assert handle.client.stats.num_free_pages == handle.client.info.num_pages
        task = asyncio.create_task(collect(handle.client, make_message("b", 600, max_tokens=3000, ignore_eos=True)))
        await until(lambda: handle.client.stats.num_running == 1)
        task.cancel()
        await until(lambda: handle.client.stats.num_running == 0, 2.0)
        handle.client.abort("a")
        handle.client.abort("unknown")

    run(body)


def test_garbage_does_not_harm_the_engine(make_message: MakeMessage) -> None:
    async def body(handle: EngineHandle) -> None:
        stranger = zmq.Context.instance().socket(zmq.PUSH)
        stranger.connect(handle.client.input_address)
        for frame in (b"", b"garbage", b"\xff" * 1000, b"\x81\xa4type\xa3foo", b"\x80", bytes(70_000_000)):
            stranger.send(frame)
        stranger.send_multipart([b"several", b"parts"])
        await asyncio.sleep(0.3)
        stranger.close(linger=0)
        _, last = await collect(handle.client, make_message("a", 5, max_tokens=3, ignore_eos=True))
        assert last.finish_reason == "length"
        huge = msgspec.structs.replace(make_message("huge"), prompt_token_ids=bytes(70_000_000))
        with pytest.raises(ValueError, match="larger than"):
            await collect(handle.client, huge)
        assert (await collect(handle.client, make_message("b", 5, max_tokens=3)))[1].finish_reason is not None

    run(body)


def test_kill_9_ends_every_stream_within_a_second(make_message: MakeMessage) -> None:
    async def body(handle: EngineHandle) -> None:
        tasks = [
            asyncio.create_task(collect(handle.client, make_message(f"r{i}", 50, max_tokens=3000, ignore_eos=True)))
            for i in range(50)
        ]
        await until(lambda: handle.client.stats.num_running == 32)
        handle.process.kill()
        killed = time.monotonic()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert time.monotonic() - killed < 1.0
        assert all(isinstance(e, EngineDeadError) and "SIGKILL" in str(e) for e in ended)
        assert handle.client.dead_reason is not None
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            await collect(handle.client, make_message("late"))

    run(body)


def test_a_dying_engine_says_why_in_its_last_frame(make_message: MakeMessage) -> None:
    async def body(handle: EngineHandle) -> None:
        with pytest.raises(EngineDeadError, match="RuntimeError: illegal address"):
            await collect(handle.client, make_message("a", 5, max_tokens=900, ignore_eos=True))
        await asyncio.wait_for(handle.exited.wait(), 3.0)
        assert handle.process.returncode == 1

    run(body, faults="Faults(raise_in_step={5: RuntimeError('illegal address')})")


def test_a_hung_step_is_seen_and_stop_still_stops(make_message: MakeMessage) -> None:
    async def main() -> None:
        handle = await start_engine(
            CONFIG, command=(sys.executable, "-c", FAULTY.format(faults="Faults(hang_in_step=3)"))
        )
        await asyncio.sleep(1.2)
        assert handle.client.seconds_since_progress(time.monotonic()) < 1.0, "an idle engine beats"
        task = asyncio.create_task(collect(handle.client, make_message("a", 5, max_tokens=99, ignore_eos=True)))
        await asyncio.sleep(1.5)
        assert handle.client.seconds_since_progress(time.monotonic()) > 1.0
        assert await handle.stop(0.2) == -signal.SIGKILL
        with pytest.raises(EngineDeadError):
            await task

    asyncio.run(main())


def test_signals_are_the_servers_business(make_message: MakeMessage) -> None:
    async def body(handle: EngineHandle) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(handle.process.pid, number)
        await asyncio.sleep(0.1)
        _, last = await collect(handle.client, make_message("a", 5, max_tokens=3))
        assert last.finish_reason is not None

    run(body)


def test_a_start_that_fails_gives_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")

    async def main() -> None:
        with pytest.raises(EngineDeadError, match=r"config.json: model_type: expected 'deepseek_v4', found 'llama'"):
            await start_engine(EngineConfig(model_dir=str(tmp_path), simulate=True))
        with pytest.raises(EngineDeadError, match="left with exit code 7"):
            await start_engine(CONFIG, command=(sys.executable, "-c", "import sys; sys.exit(7)"))
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            await start_engine(
                CONFIG, timeout_seconds=0.3, command=(sys.executable, "-c", "import time; time.sleep(60)")
            )
        assert time.monotonic() - began < 3.0

    # A short path of its own: a socket's address holds little.
    with tempfile.TemporaryDirectory(prefix="t-") as sockets:
        monkeypatch.setattr(tempfile, "tempdir", sockets)
        asyncio.run(main())
        assert os.listdir(sockets) == [], "a socket directory was left behind"


def test_two_engines_side_by_side(make_message: MakeMessage) -> None:
    async def main() -> None:
        handles = await asyncio.gather(start_engine(CONFIG), start_engine(CONFIG))
        message = make_message("same", 40, max_tokens=8, seed=1, ignore_eos=True)
        answers = await asyncio.gather(*(collect(h.client, message) for h in handles))
        assert answers[0][0] == answers[1][0]
        assert await asyncio.gather(*(h.stop() for h in handles)) == [0, 0]

    asyncio.run(main())


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM])
def test_the_engine_does_not_outlive_its_server(death: signal.Signals) -> None:
    code = f"""
import asyncio
from engine.process import start_engine
from engine.config import EngineConfig
async def main():
    handle = await start_engine({CONFIG!r})
    print(handle.process.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        assert not is_gone(pid)
        server.send_signal(death)
        server.wait()
    end = time.monotonic() + 3.0
    while not is_gone(pid):
        assert time.monotonic() < end, "the engine is an orphan"
        time.sleep(0.02)


def test_the_end_of_the_pipe_alone_ends_the_engine() -> None:
    """The death signal follows the parent's thread; the pipe follows the process."""

    async def body(handle: EngineHandle) -> None:
        assert handle.process.stdin is not None
        handle.process.stdin.close()
        await asyncio.wait_for(handle.exited.wait(), 2.0)
        assert handle.process.returncode == 1

    run(body)


def test_the_engine_in_a_thread_is_the_same_engine(
    make_message: MakeMessage, make_config: Callable[..., ResolvedConfig]
) -> None:
    async def main() -> None:
        client = InProcessClient(SimExecutor(make_config(), preset("nano"), sleep=True))
        answers = await asyncio.gather(
            *(collect(client, make_message(f"r{i}", 30 + i, max_tokens=10)) for i in range(20))
        )
        assert all(len(tokens) == 10 and last.finish_reason == "length" for tokens, last in answers)
        stream = client.submit(make_message("a", 600, max_tokens=3000))
        await anext(stream)
        await stream.aclose()
        await until(lambda: client.stats.num_running == 0 and client.stats.num_free_slots == 8)
        assert client.stats.num_free_pages == client.info.num_pages
        open_stream = asyncio.create_task(collect(client, make_message("b", 600, max_tokens=3000)))
        await until(lambda: client.stats.num_running == 1)
        await client.close()
        with pytest.raises(EngineDeadError, match="closed"):
            await open_stream
        with pytest.raises(EngineDeadError, match="closed"):
            await collect(client, make_message("late"))

    asyncio.run(main())


def test_an_engine_that_dies_in_a_thread_ends_its_streams(
    make_message: MakeMessage, make_config: Callable[..., ResolvedConfig]
) -> None:
    async def main() -> None:
        faults = Faults(raise_in_step={4: RuntimeError("illegal address")})
        client = InProcessClient(SimExecutor(make_config(), preset("nano"), faults=faults))
        with pytest.raises(EngineDeadError, match="illegal address"):
            await collect(client, make_message("a", 5, max_tokens=50))
        with pytest.raises(EngineDeadError, match="illegal address"):
            await collect(client, make_message("b", 5))
        await client.close()

    asyncio.run(main())
