"""Who may join the queue. Counted before any work is done for a request, so that a full server answers at once."""

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from server.errors import ApiError, overloaded

RATE_WINDOW_SECONDS = 30.0
LONGEST_RETRY = 60


class Ticket:
    """A request's place: in the queue until `started`, in flight until `close`. Both are idempotent."""

    def __init__(self, admission: "Admission", key_id: str, num_tokens: int) -> None:
        self._admission = admission
        self._key_id = key_id
        self._num_tokens = num_tokens
        self._queued = True
        self._open = True
        admission._queued_requests += 1
        admission._queued_tokens += num_tokens
        admission._by_key[key_id] += 1

    def count(self, num_tokens: int) -> None:
        """Replace the estimate by the real number of prompt tokens."""
        if self._queued:
            self._admission._queued_tokens += num_tokens - self._num_tokens
            self._num_tokens = num_tokens

    def started(self) -> None:
        """The first token is there."""
        if self._leave_queue():
            self._admission._note_start()

    def close(self) -> None:
        if self._open:
            self._open = False
            self._leave_queue()
            self._admission._leave(self._key_id)

    def _leave_queue(self) -> bool:
        was_queued, self._queued = self._queued, False
        if was_queued:
            self._admission._queued_requests -= 1
            self._admission._queued_tokens -= self._num_tokens
        return was_queued

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Admission:
    """Bounds on waiting requests, on waiting prompt tokens and on one key's requests."""

    def __init__(
        self,
        *,
        max_queued_requests: int,
        max_queued_tokens: int | None = None,
        max_requests_per_key: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_queued_requests = max_queued_requests
        self.max_queued_tokens = max_queued_tokens
        self.max_requests_per_key = max_requests_per_key
        self.draining = False
        self._clock = clock
        self._queued_requests = 0
        self._queued_tokens = 0
        self._by_key: Counter[str] = Counter()
        self._starts: deque[float] = deque()
        self.drain_seconds: Callable[[], float] = lambda: 0.0
        """The engine's own estimate of how long its backlog takes; 0 while it has none."""
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def queued_requests(self) -> int:
        return self._queued_requests

    @property
    def queued_tokens(self) -> int:
        return self._queued_tokens

    @property
    def in_flight(self) -> int:
        return self._by_key.total()

    def enter(self, key_id: str, num_tokens: int) -> Ticket:
        """Take a place for a request of about `num_tokens` prompt tokens.

        Raises:
            ApiError: 503 when the server drains or is full, 429 when the key has too many requests in flight; both
                with Retry-After.
        """
        if self.draining:
            raise overloaded("The server is shutting down.", 5, code="server_draining")
        limit = self.max_requests_per_key
        if limit is not None and self._by_key[key_id] >= limit:
            headers = {"Retry-After": str(self.retry_after(1))}
            message = f"This API key already has {limit} requests in flight."
            raise ApiError(429, message, type="rate_limit_error", code="rate_limit_exceeded", headers=headers)
        if self._queued_requests >= self.max_queued_requests:
            message = f"The server is overloaded: {self._queued_requests} requests are waiting."
            raise overloaded(message, self.retry_after(self._queued_requests))
        # An empty queue takes a request of any size: otherwise the longest ones could never run.
        most = self.max_queued_tokens
        if most is not None and self._queued_requests and self._queued_tokens + num_tokens > most:
            message = f"The server is overloaded: {self._queued_tokens} prompt tokens are waiting."
            raise overloaded(message, self.retry_after(self._queued_requests))
        self._idle.clear()
        return Ticket(self, key_id, num_tokens)

    def retry_after(self, num_ahead: int) -> int:
        """Whole seconds until about `num_ahead` requests have started.

        By the engine's backlog and its measured pace; before there is one, by the starts of the last half minute.
        """
        drain = self.drain_seconds()
        if drain > 0:
            return min(LONGEST_RETRY, max(1, math.ceil(drain)))
        self._forget_old()
        if not self._starts:
            return min(LONGEST_RETRY, max(1, num_ahead))
        rate = len(self._starts) / max(1.0, self._clock() - self._starts[0])
        return min(LONGEST_RETRY, max(1, math.ceil(num_ahead / rate)))

    async def wait_idle(self) -> None:
        """Return when no request is in flight."""
        await self._idle.wait()

    def _note_start(self) -> None:
        self._forget_old()
        self._starts.append(self._clock())

    def _forget_old(self) -> None:
        oldest = self._clock() - RATE_WINDOW_SECONDS
        while self._starts and self._starts[0] < oldest:
            self._starts.popleft()

    def _leave(self, key_id: str) -> None:
        self._by_key[key_id] -= 1
        if not self._by_key[key_id]:
            del self._by_key[key_id]
        if not self._by_key:
            self._idle.set()
