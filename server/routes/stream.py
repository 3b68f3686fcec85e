"""Sending answers while watching the client: whoever leaves, or is cut off, frees the engine at once."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server import logs
from server.errors import ApiError, internal, overloaded
from server.middleware import CLIENT_GONE
from server.protocol import sse
from server.state import ServerState

T = TypeVar("T")

_TICK_SECONDS = 1.0
_DRAIN_RETRY_SECONDS = 5


def shutting_down() -> ApiError:
    return overloaded("The server is shutting down.", _DRAIN_RETRY_SECONDS, code="server_draining")


async def until_disconnect(request: Request, state: ServerState, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`; cancel it when the client leaves or the server stops.

    Raises:
        ApiError: 499 (nobody reads it) or 503; and whatever `work` raises.
    """
    task: asyncio.Future[T] = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request.receive))
    try:
        waited: set[asyncio.Future[Any]] = {task, gone, state.stopping}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ApiError(CLIENT_GONE, "The client left.")
        raise shutting_down()
    finally:
        await _cancel(task, gone)


class EventStream(Response):
    """Sends server-sent events until they end, the client leaves or stalls, or the server stops.

    `events` is closed in every case, then `on_close` is called.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        state: ServerState,
        on_close: Callable[[], None],
        *,
        failure: Callable[[ApiError], bytes] = sse.error_event,
        keep_alive: bytes = sse.COMMENT,
    ) -> None:
        """`failure` writes the last event of a stream that the server ends; `keep_alive` fills long silences."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type=sse.MEDIA_TYPE)
        # A stream's length is not known.
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        self._events = events
        self._state = state
        self._on_close = on_close
        self._failure = failure
        self._keep_alive = keep_alive
        self._sending_since: float | None = None
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(_disconnect(receive))
        stopping = self._state.stopping
        config = self._state.config
        try:
            while True:
                waited = {sender, gone, stopping}
                await asyncio.wait(waited, timeout=_TICK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if sender.done():
                    await self._end(sender, send)
                    return
                if gone.done():
                    return
                if stopping.done():
                    await _cancel(sender)
                    await self._fail(send, shutting_down())
                    return
                now = time.monotonic()
                if self._sending_since is not None:
                    if now - self._sending_since > config.write_timeout:
                        return
                elif now - self._last_sent >= config.keep_alive_interval:
                    await self._send(send, self._keep_alive)
        finally:
            await _cancel(sender, gone)
            self._on_close()

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for chunk in self._events:
                await self._send(send, chunk)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _end(self, sender: asyncio.Future[None], send: Send) -> None:
        """Everything was sent; or making it failed, and then the client is told and the log gets the place."""
        error = sender.exception()
        if error is None:
            return
        if not isinstance(error, Exception):
            raise error
        logs.server.error("a stream failed: %s", logs.failure(error))
        await self._fail(send, internal())

    async def _fail(self, send: Send, error: ApiError) -> None:
        await self._send(send, self._failure(error))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, chunk: bytes) -> None:
        self._sending_since = self._last_sent = time.monotonic()
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        self._sending_since = None


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
