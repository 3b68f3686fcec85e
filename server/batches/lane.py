"""How lines of batches reach the routes: the same application, called in this process, behind everybody else.

Interactive requests wait in the queue before any line of a batch does, and lines are only begun while there is room.
"""

import asyncio
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

from starlette.types import ASGIApp, Message

from server import logs
from server.errors import ApiError, internal
from server.middleware import RequestContext
from server.state import ServerState

MOST_RUNNING = 256
MOST_WAITING = 8
"""Lines without a first token: more would hide from the engine's statistics what they are going to take."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    request_id: str
    body: bytes
    """JSON."""


def has_room(state: ServerState, num_running: int) -> bool:
    """Whether one more line may begin beside `num_running` others.

    Half of the slots and half of the pages are not theirs to begin in, and nothing is while more than a few interactive
    requests wait. With nothing running one line may always begin: it may be as long as the context.
    """
    try:
        engine = state.serving().engine
    except ApiError:
        return False
    info, stats, queue = engine.info, engine.stats, state.admission
    if queue.draining or queue.queued_requests > info.num_slots // 4:
        return False
    if queue.max_queued_tokens is not None and 4 * queue.queued_tokens > queue.max_queued_tokens:
        return False
    if num_running == 0:
        return True
    if num_running >= min(MOST_RUNNING, info.num_slots // 2):
        return False
    return 4 * stats.num_free_slots >= info.num_slots and 2 * stats.num_free_pages >= info.num_pages


async def post(app: ASGIApp, path: str, body: bytes, key_id: str) -> Answer:
    """Ask a route as the owner of `key_id` would; failures are answers too."""
    context = RequestContext(request_id="req-" + token_hex(16), key_id=key_id)
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("ascii"),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))],
        "client": None,
        "server": None,
        "fathom": context,
    }
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
    status = 0
    parts: list[bytes] = []

    async def receive() -> Message:
        return pending.pop() if pending else await asyncio.shield(never)

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception as error:  # noqa: BLE001  a boundary like the guard's: the line gets an answer, the log the place
        logs.server.error("request %s of a batch failed: %s", context.request_id, logs.failure(error))
        status, parts = 500, [internal().body()]
    finally:
        never.cancel()
    return Answer(status or 500, context.request_id, b"".join(parts))
