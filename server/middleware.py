"""The outermost ASGI layer: every request passes it before a route sees one byte.

    head and declared length -> key -> body, counted while it comes -> route -> request id, one log line, one count

Plain ASGI on purpose: wrappers that buffer or copy a response lose the client's disconnect.
"""

import asyncio
import re
import time
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import limits, logs
from server.aliases import Dialect, canonical
from server.auth import ANONYMOUS, OPEN_PATHS, KeyRing
from server.compat import in_dialect
from server.config import ServerConfig
from server.errors import ApiError, internal, speaks_anthropic
from server.metrics import Metrics

_SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_NOT_A_NAME = re.compile(r"[^A-Za-z0-9_.-]")
_DISCARD_BYTES = 2**20
_DISCARD_SECONDS = 1.0
CLIENT_GONE = 499
"""For the log: the client left before its answer and nobody reads this."""


@dataclass(slots=True, kw_only=True)
class RequestContext:
    """What the guard knows of a request and what the route adds for the log line."""

    request_id: str
    key_id: str = ANONYMOUS
    dialect: Dialect = "openai"
    """Whose path the client asked: some details of DeepSeek's API differ from OpenAI's."""
    arrival: float = field(default_factory=time.monotonic)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "-"
    ignored_fields: list[str] = field(default_factory=list)
    """Members of the body that nobody defines: a client's own text."""


def context_of(scope: Scope) -> RequestContext:
    context = scope["fathom"]
    assert isinstance(context, RequestContext)
    return context


class Guard:
    def __init__(
        self, app: ASGIApp, *, config: ServerConfig, keys: KeyRing, metrics: Metrics, routes: frozenset[str]
    ) -> None:
        """`routes` are the patterns of the paths that `app` knows."""
        self._app = app
        self._routes = routes
        self._config = config
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        asked: str = scope["path"]
        path, dialect = canonical(asked)
        if path != asked:
            scope["path"], scope["raw_path"] = path, path.encode("utf-8", "surrogateescape")
        context = RequestContext(request_id=_request_id(scope["headers"]), dialect=dialect)
        scope["fathom"] = context
        is_head = scope["method"] == "HEAD"
        if is_head:
            scope["method"] = "GET"
        status = 0

        async def tracking_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                request_id = context.request_id.encode("ascii")
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
                if speaks_anthropic(path):
                    message["headers"].append((b"request-id", request_id))
                if context.ignored_fields:
                    message["headers"].append((b"x-fathom-ignored-fields", _names(context.ignored_fields)))
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        try:
            body = await self._pass(scope, receive, context)
            await self._app(scope, receive if body is None else _replay(body, receive), tracking_send)
        except ApiError as error:
            if not status:
                await in_dialect(error, self._config.api_compat).response(scope["path"])(scope, receive, tracking_send)
        except Exception as error:  # noqa: BLE001  the last boundary: a client gets an answer, the log gets the place
            logs.server.error("request %s failed: %s", context.request_id, logs.failure(error))
            if not status:
                await internal().response(scope["path"])(scope, receive, tracking_send)
        finally:
            self._note(scope, "HEAD" if is_head else scope["method"], asked, context, status or CLIENT_GONE)

    async def _pass(self, scope: Scope, receive: Receive, context: RequestContext) -> bytes | None:
        """Check the request and read its body; None where there is none to read."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        limits.check_head(scope["raw_path"] + scope["query_string"], headers)
        length = limits.declared_length(headers)
        limit = self._config.body_limit
        if length is not None and length > limit:
            await _discard(headers, receive)
            raise _too_large(limit)
        if scope["path"] not in OPEN_PATHS:
            key_id = self._keys.identify(headers)
            if key_id is None:
                raise ApiError(
                    401,
                    "Give a valid API key as `Authorization: Bearer KEY` or `x-api-key: KEY`.",
                    type="authentication_error",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            context.key_id = key_id
        if scope["method"] != "POST":
            return None
        try:
            async with asyncio.timeout(self._config.body_timeout):
                return await _read_body(headers, receive, limit)
        except TimeoutError:
            raise ApiError(408, "The request body did not arrive in time.", code="request_timeout") from None

    def _note(self, scope: Scope, method: str, asked: str, context: RequestContext, status: int) -> None:
        path: str = scope["path"]
        pattern: str | None = getattr(scope.get("route"), "path", None)
        self._metrics.count_response(pattern or (path if path in self._routes else None), status)
        if path in OPEN_PATHS or (path == "/metrics" and status < 400):
            return  # Probes come every second and would bury the rest.
        logs.access.info(
            "%s %s %s %d %.0fms key=%s in=%d out=%d finish=%s",
            context.request_id,
            logs.plain(method),
            logs.plain(asked),
            status,
            1000 * (time.monotonic() - context.arrival),
            context.key_id,
            context.prompt_tokens,
            context.completion_tokens,
            context.finish_reason,
        )


def _request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's x-request-id when it is harmless, else one of our own. It never keys engine state."""
    for name, value in headers:
        if name == b"x-request-id" and _SANE_REQUEST_ID.fullmatch(value):
            return value.decode("ascii")
    return "req-" + token_hex(16)


def _names(fields: list[str]) -> bytes:
    """Names for a header: letters, digits, `_`, `.` and `-`, bounded in number and length."""
    # An empty name at the end would leave a space there, which is no header value.
    cut = [name[: limits.MOST_IGNORED_CHARS] or "?" for name in fields[: limits.MOST_IGNORED_NAMES]]
    shown = [_NOT_A_NAME.sub("?", name) for name in cut]
    if len(fields) > limits.MOST_IGNORED_NAMES:
        shown.append("...")
    return ", ".join(shown).encode("ascii")


async def _read_body(headers: list[tuple[bytes, bytes]], receive: Receive, limit: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(CLIENT_GONE, "The client left.")
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            await _discard(headers, receive)
            raise _too_large(limit)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


async def _discard(headers: list[tuple[bytes, bytes]], receive: Receive) -> None:
    """Read on for a moment: closing on a client that still writes would reset the connection before it reads why."""
    if any(name == b"expect" for name, _ in headers):
        return
    size = 0
    try:
        async with asyncio.timeout(_DISCARD_SECONDS):
            while size < _DISCARD_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive channel that hands out the body once and then waits for the disconnect."""
    pending: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


def _too_large(limit: int) -> ApiError:
    headers = {"Connection": "close"}
    return ApiError(413, f"The request body is larger than {limit} bytes.", code="request_too_large", headers=headers)
