"""What the routes share: configuration, keys, admission, metrics and, once it is up, the engine."""

import asyncio
import copy
import time
from dataclasses import dataclass

from engine.client import EngineClient
from engine.messages import EngineInfo
from server.admission import Admission
from server.auth import KeyRing
from server.batches.database import Database
from server.batches.files import Files
from server.batches.store import Batches
from server.config import ServerConfig
from server.errors import ApiError, model_not_found, overloaded
from server.generation import Generator
from server.grammar.service import GrammarService
from server.metrics import Metrics
from server.protocol.responses_store import ResponseStore
from server.text.effort import EffortTable, table_of
from server.text.tokenizer import Tokenizer
from server.turns import TurnMemory

LOADING_RETRY_SECONDS = 5
_TOKENS_BOUND = 2**20
_CONTEXTS_BOUND = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """How much a request's waiting matters."""

    priority: int = 0
    """Added to what the client says, which is within 1000 of 0."""
    queue_timeout: bool = True
    """Requests that do not start in time are given up."""
    measured: bool = True
    """Waiting counts in the metrics of latency."""


BATCH_LANE = Lane(priority=10_000, queue_timeout=False, measured=False)


@dataclass(frozen=True, slots=True)
class Serving:
    """A running engine and what turns text into its tokens and back."""

    engine: EngineClient
    tokenizer: Tokenizer
    generator: Generator
    grammars: GrammarService
    effort_table: EffortTable = "release"

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    @property
    def max_request_tokens(self) -> int:
        """Tokens of prompt and answer together that one request can ever have."""
        return min(self.info.max_model_len, self.info.num_pages * self.info.page_tokens)


class ServerState:
    """Made inside the event loop, one for each server."""

    def __init__(self, config: ServerConfig, keys: KeyRing, model_name: str, database: Database | None = None) -> None:
        self.config = config
        self.keys = keys
        self.model_name = model_name
        self.created = int(time.time())
        self.admission = Admission(
            max_queued_requests=config.max_queued_requests,
            max_queued_tokens=config.max_queued_tokens,
            max_requests_per_key=config.max_requests_per_key,
        )
        self.responses = ResponseStore(max_bytes=config.response_store_bytes, ttl=config.response_ttl)
        self.metrics = Metrics(model_name, lambda: self._serving.engine if self._serving else None, self.admission)
        self.stopping: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when running requests must end now."""
        self._serving: Serving | None = None
        self.lane = Lane()
        self.turns = TurnMemory(config.replay_bytes)
        self.database = database or Database.open(None)
        self.files = Files(self.database, bytes_per_owner=config.file_bytes_per_key)
        self.batches = Batches(self.database, bytes_per_owner=config.file_bytes_per_key)
        self.batches_changed = asyncio.Event()
        """Set when there may be something to do for the batches."""

    def batch_lane(self) -> "ServerState":
        """The same server for the lines of batches, once an engine is attached: everything is shared but the queue's
        bounds, which the lines neither feel nor fill."""
        lane = copy.copy(self)
        lane.lane = BATCH_LANE
        lane.admission = Admission(max_queued_requests=2**62)
        return lane

    def attach(self, engine: EngineClient, tokenizer: Tokenizer) -> None:
        """Serve with this engine and the tokenizer of its model."""
        table = self.config.effort_table
        if table == "auto":
            table = table_of(engine.info.model_dir, is_preview=engine.info.is_preview)
        info = engine.info
        grammars = GrammarService(info.model_dir, vocab_size=info.vocab_size, eos_token_id=info.eos_token_id)
        self._serving = Serving(engine, tokenizer, Generator(engine, tokenizer), grammars, table)
        self.admission.drain_seconds = lambda: engine.stats.drain_seconds
        if self.admission.max_queued_tokens is None:
            self.admission.max_queued_tokens = max(_TOKENS_BOUND, _CONTEXTS_BOUND * engine.info.max_model_len)

    async def detach(self) -> None:
        """End what was started beside the engine."""
        if self._serving is not None:
            await self._serving.grammars.close()

    def serving(self) -> Serving:
        """Raises ApiError 503 while there is no engine to ask."""
        if self._serving is None:
            raise overloaded("The model is still loading.", LOADING_RETRY_SECONDS, code="server_loading")
        if self._serving.engine.dead_reason is not None:
            raise overloaded("The engine has stopped.", LOADING_RETRY_SECONDS, code="engine_dead")
        return self._serving

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 for a name that is not served."""
        if name != self.model_name:
            raise model_not_found(name)

    def not_ready(self) -> str | None:
        """Why new work would not be served now; None when it would. Asks the engine nothing."""
        if self.admission.draining:
            return "draining"
        try:
            engine = self.serving().engine
        except ApiError as error:
            return error.code
        if engine.seconds_since_progress(time.monotonic()) > self.config.progress_timeout:
            return "no_progress"
        return None

    def stop_now(self) -> None:
        """End running requests with an error."""
        if not self.stopping.done():
            self.stopping.set_result(None)
