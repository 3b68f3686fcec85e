"""Requests that have not started: a queue in policy order from which any of them may leave at any time."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator

from engine.policy import QueueKey, queue_key
from engine.request import Request, RequestStatus


class WaitingQueue:
    """Sorted by `queue_key`; insertion and removal move pointers only."""

    def __init__(self) -> None:
        # Last first, so that the head leaves from the end of the list.
        self._queue: list[tuple[QueueKey, Request]] = []
        # Entries of requests that left are dropped when they surface.
        self._deadlines: list[tuple[float, int, Request]] = []

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Request]:
        """In the order in which they will start."""
        return (request for _, request in reversed(self._queue))

    def add(self, request: Request) -> None:
        insort(self._queue, (_reversed(queue_key(request)), request), key=_key)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.order, request))

    def head(self) -> Request | None:
        return self._queue[-1][1] if self._queue else None

    def remove(self, request: Request) -> None:
        index = bisect_left(self._queue, _reversed(queue_key(request)), key=_key)
        assert self._queue[index][1] is request, f"{request.request_id} is not waiting"
        del self._queue[index]

    def expired(self, now: float) -> list[Request]:
        """Waiting requests whose deadline is not after `now`; each is reported once."""
        late: list[Request] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[2]
            if request.status is RequestStatus.QUEUED:
                late.append(request)
        return late


def _reversed(key: QueueKey) -> QueueKey:
    return (-key[0], -key[1], -key[2])


def _key(entry: tuple[QueueKey, Request]) -> QueueKey:
    return entry[0]
