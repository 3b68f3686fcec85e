"""A server that knows the right answers, and gives wrong ones where a test wants them; and a small random model."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import uvicorn

from embedded.data.example import Answer, Example
from embedded.data.render import answer_ids, prompt_of
from engine.clients import InProcessClient
from engine.config import EngineConfig
from engine.runner.sim_executor import SimExecutor, sim_config
from model.config import load_config
from model.presets import preset
from model.tools.byte_tokenizer import save_byte_tokenizer
from model.tools.make_checkpoint import make_checkpoint
from server.app import create_app
from server.auth import KeyRing
from server.config import ServerConfig
from server.state import ServerState
from server.text.tokenizer import Tokenizer

MAX_MODEL_LEN = 65536


class AnsweringServer:
    """The HTTP side over a simulated engine, in a thread of this process.

    What it was taught it says; everything else is answered by the simulated engine's own noise.
    """

    MODEL = "answering"

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self.tokenizer = Tokenizer.load(model_dir, load_config(model_dir).vocab_size)
        self.num_asked = 0
        """Different prompts since the last `forget`, probes included."""
        self.meddle: Callable[[list[int]], list[int]] = lambda ids: ids
        """Changes every taught answer."""
        self._taught: dict[bytes, list[int]] = {}
        self._asked: set[bytes] = set()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server: uvicorn.Server | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()

    def teach(self, examples: Iterable[Example], answer: Answer | None = None) -> None:
        """Answer these rightly, or all with `answer`."""
        for example in examples:
            ids = answer_ids(self.tokenizer, answer or example.answer)
            # EOS comes from the engine.
            self._taught[prompt_of(self.tokenizer, example).token_ids.astype(np.int32).tobytes()] = ids[:-1]

    def forget(self) -> None:
        self._taught.clear()
        self._asked.clear()
        self.num_asked = 0
        self.meddle = lambda ids: ids

    def stop(self) -> None:
        assert self._server is not None
        self._server.should_exit = True
        self._thread.join(10)

    def _script(self, prompt: np.ndarray) -> Sequence[int]:
        key = np.asarray(prompt, dtype=np.int32).tobytes()
        if key not in self._asked:
            self._asked.add(key)
            self.num_asked += 1
        taught = self._taught.get(key)
        return self.meddle(list(taught)) if taught is not None else self.meddle([5, 6, 7 + len(prompt) % 90])

    async def _serve(self) -> None:
        model = load_config(self.model_dir)
        config = EngineConfig(model_dir=str(self.model_dir), simulate=True, max_model_len=MAX_MODEL_LEN)
        client = InProcessClient(SimExecutor(sim_config(config, model), model, script=self._script))
        state = ServerState(ServerConfig(), KeyRing([]), self.MODEL)
        state.attach(client, self.tokenizer)
        self._server = uvicorn.Server(uvicorn.Config(create_app(state), log_level="error", lifespan="off"))
        await self._server.serve(sockets=[self._socket])
        await state.detach()
        await client.close()


@pytest.fixture(scope="session")
def _answering(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AnsweringServer]:
    directory = tmp_path_factory.mktemp("answering")
    (directory / "config.json").write_text(json.dumps(preset("nano").to_dict()), encoding="utf-8")
    save_byte_tokenizer(directory, model_max_length=MAX_MODEL_LEN)
    server = AnsweringServer(directory)
    yield server
    server.stop()


@pytest.fixture
def answering(_answering: AnsweringServer) -> AnsweringServer:
    """A server that has been taught nothing yet."""
    _answering.forget()
    return _answering


@pytest.fixture(scope="session")
def nano_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`nano` with random weights in float32, with its MTP block."""
    directory = tmp_path_factory.mktemp("nano") / "f32"
    make_checkpoint("nano", 0, "f32", directory)
    return directory
