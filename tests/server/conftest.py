"""A server in this process around a simulated engine, and one in processes of its own."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from engine.client import RequestOutput
from engine.clients import InProcessClient
from engine.config import EngineConfig
from engine.messages import FinishReason, SamplingParams
from engine.runner.sim_executor import CostModel, SimExecutor, sim_config
from model.config import load_config
from model.presets import preset
from model.tools.byte_tokenizer import save_byte_tokenizer
from server.app import create_app
from server.auth import KeyRing
from server.config import ServerConfig
from server.generation import Answer
from server.state import ServerState
from server.text.parser import OutputParser, StartsIn
from server.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
MODEL = "sim"
JSON = {"content-type": "application/json"}


class Harness:
    """An application and its engine; `http` speaks to it without a socket."""

    def __init__(self, state: ServerState, app: Any, client: InProcessClient, tokenizer: Tokenizer) -> None:
        self.state = state
        self.app = app
        self.engine = client
        self.tokenizer = tokenizer
        self.turns: list[list[int]] = []
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app, client=("127.0.0.1", 1)), base_url="http://fathom", timeout=30
        )

    def say(self, answer: str) -> None:
        """Another script, for a server that has one."""
        assert self.turns
        self.turns[:] = [self.tokenizer.encode(answer, special=True)]

    async def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        return await self.http.post(path, json=body, **kwargs)

    async def post_raw(self, path: str, body: bytes) -> httpx.Response:
        return await self.http.post(path, content=body, headers=JSON)

    async def chat(self, text: str = "hi", **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}
        return await self.post("/v1/chat/completions", body)

    async def chat_messages(self, messages: Sequence[Any], **fields: Any) -> httpx.Response:
        return await self.post("/v1/chat/completions", {"model": MODEL, "messages": messages, **fields})

    async def complete(self, prompt: Any = "hi", **fields: Any) -> httpx.Response:
        return await self.post("/v1/completions", {"model": MODEL, "prompt": prompt, **fields})

    async def idle(self, seconds: float = 5.0) -> None:
        """Wait until nothing is queued or held; fails when that does not happen."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            stats, info = self.engine.stats, self.engine.info
            free = stats.num_free_pages == info.num_pages and stats.num_free_slots == info.num_slots
            if free and stats.num_running + stats.num_waiting + self.state.admission.in_flight == 0:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"not idle: {self.engine.stats}, {self.state.admission.in_flight} in flight")


@pytest.fixture(scope="session")
def sim_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration and tokenizer of a model, without weights."""
    directory = tmp_path_factory.mktemp("models") / MODEL
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(preset("nano").to_dict()), encoding="utf-8")
    save_byte_tokenizer(directory, model_max_length=65536)
    return directory


@pytest.fixture
def serving(sim_model_dir: Path) -> Callable[..., Any]:
    """A factory: `async with serving(answer="...", max_model_len=...) as harness`.

    `answers` are those of a conversation's turns, `by_word` those to prompts that hold a word.
    """

    @asynccontextmanager
    async def make(
        *,
        answer: str | None = None,
        answers: Sequence[str] = (),
        by_word: Mapping[str, str] | None = None,
        keys: Sequence[str] = (),
        config: ServerConfig | None = None,
        max_model_len: int = 4096,
        max_num_seqs: int | None = None,
        step_seconds: float = 0.0,
        faults: Any = None,
    ) -> AsyncIterator[Harness]:
        model = load_config(sim_model_dir)
        tokenizer = Tokenizer.load(sim_model_dir, model.vocab_size)
        engine_config = EngineConfig(
            model_dir=str(sim_model_dir), simulate=True, max_model_len=max_model_len, max_num_seqs=max_num_seqs
        )
        script = None
        turns: list[list[int]] = []
        if answer is not None or answers:
            turns = [tokenizer.encode(text or "", special=True) for text in (answers or [answer])]
            assistant = tokenizer.required_id("<｜Assistant｜>")

            def script(prompt: np.ndarray) -> Sequence[int]:
                """The nth answer to a prompt that opens the nth turn."""
                return turns[min(np.count_nonzero(prompt == assistant), len(turns)) - 1]

        if by_word is not None:
            scripts = {word: tokenizer.encode(text, special=True) for word, text in by_word.items()}

            def script(prompt: np.ndarray) -> Sequence[int]:
                text = tokenizer.decode(prompt.tolist())
                return next(ids for word, ids in scripts.items() if word in text)

        executor = SimExecutor(
            sim_config(engine_config, model),
            model,
            script=script,
            eos_probability=0.02,
            sleep=step_seconds > 0,
            cost=CostModel(base_seconds=step_seconds),
            faults=faults,
        )
        client = InProcessClient(executor)
        state = ServerState(config or ServerConfig(), KeyRing(list(keys)), MODEL)
        state.attach(client, tokenizer)
        harness = Harness(state, create_app(state), client, tokenizer)
        harness.turns = turns
        try:
            yield harness
        finally:
            await harness.http.aclose()
            await state.detach()
            await client.close()

    return make


@dataclass
class ReadCall:
    name: str
    call_id: str
    arguments: str = ""


@dataclass
class ReadAnswer:
    """What a client has when the events are over."""

    reasoning: str
    content: str
    calls: list[ReadCall]
    finish_reason: str | None


@pytest.fixture(scope="session")
def read_answer() -> Callable[..., ReadAnswer]:
    """`read_answer(tokenizer, chunks of ids, ...)`: the parser as the server uses it, fed by no engine."""

    def read(
        tokenizer: Tokenizer,
        chunks: Sequence[Sequence[int]],
        *,
        starts_in: StartsIn = "reasoning",
        continues: bool = False,
        tools: bool = True,
        stops: Sequence[str] = (),
        finish: FinishReason = "stop",
        stop_token_id: int | None = 1,
        streams_json: bool = False,
    ) -> ReadAnswer:
        answer = Answer(
            OutputParser(
                tokenizer,
                starts_in=starts_in,
                continues=continues,
                tools=tools,
                streams_json=streams_json,
                skip_special=False,
            ),
            tokenizer,
            hidden_ids=frozenset(),
            num_prompt_tokens=1,
            sampling=SamplingParams(),
            stop=stops,
            include_stop=False,
            eos_token_id=1,
        )
        last = RequestOutput(
            token_ids=(1,) if finish == "stop" else (),
            finish_reason=finish,
            stop_token_id=stop_token_id if finish == "stop" else None,
        )
        read = ReadAnswer("", "", [], None)
        for output in [*(RequestOutput(token_ids=tuple(ids)) for ids in chunks), last]:
            event = answer.add(output)
            assert not (event.content and read.calls), "content comes before calls"
            assert not (event.reasoning and (read.content or read.calls)), "reasoning comes first"
            read.reasoning += event.reasoning
            read.content += event.content
            for piece in event.calls:
                if piece.call_id is not None:
                    assert piece.name is not None and not piece.arguments and piece.index == len(read.calls)
                    read.calls.append(ReadCall(piece.name, piece.call_id))
                else:
                    assert piece.name is None and piece.index == len(read.calls) - 1
                    read.calls[-1].arguments += piece.arguments
            read.finish_reason = event.finish_reason
            if event.finish_reason is not None:
                break
        return read

    return read


class ServerProcess:
    """`python -m server` with a simulated engine."""

    def __init__(self, process: subprocess.Popen[str], url: str, ready_line: str) -> None:
        self.process = process
        self.url = url
        self.ready_line = ready_line
        self.port = int(url.rsplit(":", 1)[1])

    def request(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """(status, parsed body, headers)."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {**JSON, **headers})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, _parsed(answer.read()), dict(answer.headers)
        except urllib.error.HTTPError as error:
            return error.code, _parsed(error.read()), dict(error.headers)

    def metric(self, name: str) -> float:
        text = self.request("/metrics")[1]
        match = re.search(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert match is not None, name
        return float(match[1])

    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (pid,) = (pid for pid in children if b"engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes())
        return int(pid)

    def wait(self, seconds: float = 15.0) -> int:
        return self.process.wait(seconds)


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode()


@contextmanager
def running_server(model_dir: Path, *flags: str, key: str | None = None) -> Iterator[ServerProcess]:
    environment = {k: v for k, v in os.environ.items() if k != "FATHOM_API_KEY"}
    if key is not None:
        environment["FATHOM_API_KEY"] = key
    command = [sys.executable, "-m", "server", str(model_dir), "--simulate", "--port", "0", *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"http://\S+", line)
        assert match is not None, f"no ready line: {line!r}"
        yield ServerProcess(process, match[0], line)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="session")
def start_server() -> Callable[..., Any]:
    """`with start_server(model_dir, *flags, key=...) as server`: a ServerProcess that answers."""
    return running_server
