"""What the routes share: configuration, keys, admission, metrics and, once it is up, the engine."""

import asyncio
import time
from dataclasses import dataclass

from engine.client import EngineClient
from engine.messages import EngineInfo
from server.admission import Admission
from server.auth import KeyRing
from server.config import ServerConfig
from server.errors import ApiError, model_not_found, overloaded
from server.generation import Generator
from server.metrics import Metrics
from server.protocol.responses_store import ResponseStore
from server.text.tokenizer import Tokenizer

ROUTES = (
    *("/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize"),
    *("/v1/responses", "/responses", "/v1/messages", "/v1/messages/count_tokens"),
    *("/anthropic/v1/messages", "/anthropic/v1/messages/count_tokens"),
    *("/health", "/health/live", "/health/ready", "/metrics", "/version"),
)
LOADING_RETRY_SECONDS = 5
_TOKENS_BOUND = 2**20
_CONTEXTS_BOUND = 16


@dataclass(frozen=True, slots=True)
class Serving:
    """A running engine and what turns text into its tokens and back."""

    engine: EngineClient
    tokenizer: Tokenizer
    generator: Generator

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    @property
    def max_request_tokens(self) -> int:
        """Tokens of prompt and answer together that one request can ever have."""
        return min(self.info.max_model_len, self.info.num_pages * self.info.page_tokens)


class ServerState:
    """Made inside the event loop, one for each server."""

    def __init__(self, config: ServerConfig, keys: KeyRing, model_name: str) -> None:
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
        self.metrics = Metrics(
            model_name, lambda: self._serving.engine if self._serving else None, self.admission, ROUTES
        )
        self.stopping: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when running requests must end now."""
        self._serving: Serving | None = None

    def attach(self, engine: EngineClient, tokenizer: Tokenizer) -> None:
        """Serve with this engine and the tokenizer of its model."""
        self._serving = Serving(engine, tokenizer, Generator(engine, tokenizer))
        self.admission.drain_seconds = lambda: engine.stats.drain_seconds
        if self.admission.max_queued_tokens is None:
            self.admission.max_queued_tokens = max(_TOKENS_BOUND, _CONTEXTS_BOUND * engine.info.max_model_len)

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
