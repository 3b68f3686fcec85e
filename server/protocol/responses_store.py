"""Answers of /v1/responses that are kept: for a while, within a bound on bytes, each for the key that asked.

A conversation of many responses shares its turns, so that it takes no more memory than it has text.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from server.errors import ApiError, bad_request, echo


class EventLog:
    """The events of a response that runs by itself; any number of readers follow it."""

    def __init__(self) -> None:
        self._events: list[bytes] = []
        self._closed = False
        self._changed = asyncio.Event()

    def append(self, event: bytes) -> None:
        self._events.append(event)
        self._wake()

    def close(self) -> None:
        """Nothing follows any more."""
        self._closed = True
        self._wake()

    async def follow(self, start: int = 0) -> AsyncGenerator[bytes, None]:
        """The events from number `start` on, until the last."""
        while True:
            while start < len(self._events):
                yield self._events[start]
                start += 1
            if self._closed:
                return
            await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


@dataclass(slots=True, eq=False)
class _Turn:
    """Items that were sent or answered together."""

    items: bytes
    """A JSON array."""
    num_holders: int = 0


@dataclass(slots=True, eq=False, kw_only=True)
class Stored:
    """One kept response."""

    response_id: str
    key_id: str
    background: bool
    turns: tuple[_Turn, ...]
    """The conversation: of the earlier responses, then the own input, then the own output if there is one."""
    num_earlier: int
    """Turns of earlier responses."""
    expires: float
    response: bytes = b""
    """The response object; empty while it runs."""
    snapshot: Callable[[], dict[str, Any]] | None = None
    """The response object of a running response."""
    task: "asyncio.Task[None] | None" = None
    log: EventLog | None = None
    num_logged: int = 0
    held: list[_Turn] = field(default_factory=list)
    """The turns whose bytes the store counts for this response."""

    @property
    def is_running(self) -> bool:
        return self.snapshot is not None

    def body(self) -> bytes:
        """The response object as JSON."""
        return self.response if self.snapshot is None else msgspec.json.encode(self.snapshot())

    def input_items(self) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = msgspec.json.decode(self.turns[self.num_earlier].items)
        return items

    def conversation(self) -> list[dict[str, Any]]:
        """All items up to and including the answer."""
        return [item for turn in self.turns for item in msgspec.json.decode(turn.items)]

    @property
    def num_conversation_bytes(self) -> int:
        return sum(len(turn.items) for turn in self.turns)


class ResponseStore:
    def __init__(self, *, max_bytes: int, ttl: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`ttl`: seconds."""
        self.max_bytes = max_bytes
        self._ttl = ttl
        self._clock = clock
        self._stored: dict[str, Stored] = {}
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all responses, turns and logs, each counted once."""
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._stored)

    def find(self, response_id: str, key_id: str) -> Stored:
        """Raises ApiError 404, also for the response of another key."""
        found = self._get(response_id, key_id)
        if found is None:
            message = f"Response with id '{echo(response_id)}' not found."
            raise ApiError(404, message, type="not_found_error", code="response_not_found", param="response_id")
        return found

    def find_previous(self, response_id: str, key_id: str) -> Stored:
        """The response that another one continues. Raises ApiError 400."""
        found = self._get(response_id, key_id)
        if found is None:
            message = f"Previous response with id '{echo(response_id)}' not found."
            raise bad_request(message, param="previous_response_id", code="previous_response_not_found")
        if found.is_running:
            message = f"Previous response with id '{echo(response_id)}' is still in progress."
            raise bad_request(message, param="previous_response_id")
        return found

    def open(
        self,
        response_id: str,
        key_id: str,
        items: Sequence[dict[str, Any]],
        *,
        snapshot: Callable[[], dict[str, Any]],
        previous: Stored | None = None,
        background: bool = False,
        log: EventLog | None = None,
    ) -> Stored:
        """Keep a response that runs. It does not expire and is not put out before `finish`."""
        earlier = previous.turns if previous is not None else ()
        stored = Stored(
            response_id=response_id,
            key_id=key_id,
            background=background,
            turns=(*earlier, _Turn(msgspec.json.encode(items))),
            num_earlier=len(earlier),
            expires=self._clock() + self._ttl,
            snapshot=snapshot,
            log=log,
        )
        self._hold(stored, stored.turns)
        self._stored[response_id] = stored
        self._shrink()
        return stored

    def log(self, stored: Stored, event: bytes) -> None:
        """Append to the log of a running response."""
        assert stored.log is not None
        stored.log.append(event)
        if self._stored.get(stored.response_id) is stored:
            stored.num_logged += len(event)
            self._num_bytes += len(event)

    def finish(self, stored: Stored) -> None:
        """The response is what its snapshot says now, and its output joins the conversation."""
        assert stored.snapshot is not None
        response = stored.snapshot()
        stored.snapshot = stored.task = None
        stored.response = msgspec.json.encode(response)
        stored.turns = (*stored.turns, _Turn(msgspec.json.encode(response["output"])))
        stored.expires = self._clock() + self._ttl
        if stored.log is not None:
            stored.log.close()
        if self._stored.get(stored.response_id) is not stored:
            return  # It was deleted meanwhile.
        self._num_bytes += len(stored.response)
        self._hold(stored, stored.turns[-1:])
        self._shrink()

    def delete(self, stored: Stored) -> None:
        """Forget a response, and stop it if it runs. Responses that continue it keep their conversation."""
        self._remove(stored)
        if stored.task is not None:
            stored.task.cancel()

    def _get(self, response_id: str, key_id: str) -> Stored | None:
        self._shrink()
        found = self._stored.get(response_id)
        return found if found is not None and found.key_id == key_id else None

    def _hold(self, stored: Stored, turns: Sequence[_Turn]) -> None:
        for turn in turns:
            turn.num_holders += 1
            if turn.num_holders == 1:
                self._num_bytes += len(turn.items)
        stored.held += turns

    def _remove(self, stored: Stored) -> None:
        del self._stored[stored.response_id]
        self._num_bytes -= len(stored.response) + stored.num_logged
        for turn in stored.held:
            turn.num_holders -= 1
            if turn.num_holders == 0:
                self._num_bytes -= len(turn.items)
        stored.held.clear()

    def _shrink(self) -> None:
        """Drop what has expired, and the oldest until the rest fits."""
        now = self._clock()
        # In the order in which they began, which is nearly that in which they expire.
        while (oldest := next((s for s in self._stored.values() if not s.is_running), None)) is not None:
            if oldest.expires > now and self._num_bytes <= self.max_bytes:
                return
            self._remove(oldest)
