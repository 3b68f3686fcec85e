"""A real server around the simulated engine whose answers follow from the prompt, so that a client can hold a talk.

The last user turn decides. One that holds tool results is answered in words. One that says

    CALL name {"key": "value"}

is answered with that call, if the prompt declares the tool; several lines give several calls. Anything else gets a
greeting. Run it: `python tests/clients/scripted_server.py`; it prints its URL.
"""

import asyncio
import json
import re
import socket
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from engine.clients import InProcessClient
from engine.config import EngineConfig
from engine.runner.sim_executor import SimExecutor, sim_config
from model.config import load_config
from model.presets import preset
from model.tools.byte_tokenizer import save_byte_tokenizer
from server.app import create_app
from server.auth import KeyRing
from server.config import ServerConfig
from server.state import ServerState
from server.text.tokenizer import Tokenizer

MODEL = "deepseek-v4-flash"
MAX_MODEL_LEN = 262_144
GREETING = "Hello from Fathom."
REPORT = "The tool said:"
SCHEMA_ANSWER = '{"city": "Paris", "degrees": 21}'
_CALL = re.compile(r"CALL (\S+) (\{.*\})")
_RESULT = re.compile(r"<tool_result>(.*?)</tool_result>", re.DOTALL)


def answer(prompt: str) -> str:
    """What the model says to a prompt, special tokens spelled out."""
    thinks = prompt.endswith("<think>")
    last = prompt.rsplit("<｜User｜>", 1)[-1]
    results = _RESULT.findall(last)
    calls = [] if results else _calls(prompt, last)
    said = GREETING
    if results:
        said = f"{REPORT} {results[-1].strip()[-200:]}"
    elif calls:
        said = _block(calls)
    elif "## Response Format:" in prompt:
        said = SCHEMA_ANSWER
    opened = prompt.endswith("<｜DSML｜tool_calls>\n")
    if opened:
        said = _block(calls).split("tool_calls>\n", 1)[1]
    return ("A thought.</think>" if thinks else "") + said


def _calls(prompt: str, turn: str) -> list[tuple[str, dict[str, Any]]]:
    """What a turn asks for. Agents also quote a turn, in which case its JSON is none."""
    calls = []
    for name, arguments in _CALL.findall(turn):
        if f'"name": "{name}"' in prompt:
            with suppress(ValueError):
                calls.append((name, json.loads(arguments)))
    return calls


def _block(calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
    lines = []
    for name, arguments in calls:
        lines.append(f'<｜DSML｜invoke name="{name}">')
        for key, value in arguments.items():
            text, kind = (value, "true") if isinstance(value, str) else (json.dumps(value), "false")
            lines.append(f'<｜DSML｜parameter name="{key}" string="{kind}">{text}</｜DSML｜parameter>')
        lines.append("</｜DSML｜invoke>")
    return "\n\n<｜DSML｜tool_calls>\n" + "\n".join(lines) + "\n</｜DSML｜tool_calls>"


async def serve(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(preset("nano").to_dict()), encoding="utf-8")
    save_byte_tokenizer(directory, model_max_length=MAX_MODEL_LEN)
    model = load_config(directory)
    tokenizer = Tokenizer.load(directory, model.vocab_size)

    @lru_cache(maxsize=64)
    def answer_ids(prompt: bytes) -> Sequence[int]:
        text = tokenizer.decode(np.frombuffer(prompt, dtype=np.int32).tolist())
        return tokenizer.encode(answer(text), special=True)

    def script(prompt: np.ndarray) -> Sequence[int]:
        return answer_ids(np.asarray(prompt, dtype=np.int32).tobytes())

    config = EngineConfig(model_dir=str(directory), simulate=True, max_model_len=MAX_MODEL_LEN)
    client = InProcessClient(SimExecutor(sim_config(config, model), model, script=script))
    state = ServerState(ServerConfig(), KeyRing([]), MODEL)
    state.attach(client, tokenizer)
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    server = uvicorn.Server(uvicorn.Config(create_app(state), log_level="warning"))
    try:
        await server.serve(sockets=[listener])
    finally:
        await client.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(serve(Path(folder)))
