"""Requests that have not started, in the order of the policy; any of them may leave at any time."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import itemgetter

from engine.fairness import TenantClock
from engine.policy import OrderKey, ServiceClass, order_key
from engine.request import Request, RequestStatus

_Group = tuple[int, ServiceClass]
_Entry = tuple[tuple[float, float, int], Request]
_key = itemgetter(0)


class WaitingQueue:
    """By priority and class, then by tenant, then by work: the tenant whose turn it is changes with every chunk, so it
    is looked up when somebody asks, while the requests of one tenant stay sorted.
    """

    def __init__(self, tenants: TenantClock) -> None:
        self.backlog_seconds = 0.0
        """Prompt work of those who wait."""
        self.num_tokens = 0
        self._tenants = tenants
        self._groups: dict[_Group, dict[str, list[_Entry]]] = {}
        self._order: list[_Group] = []
        self._parked: dict[str, Request] = {}
        self._num_waiting = dict.fromkeys(ServiceClass, 0)
        # Entries of requests that left are dropped when they surface.
        self._urgent: dict[ServiceClass, list[tuple[int, float, int, Request]]] = {s: [] for s in ServiceClass}
        self._deadlines: list[tuple[float, int, Request]] = []

    def __len__(self) -> int:
        return sum(self._num_waiting.values())

    def __iter__(self) -> Iterator[Request]:
        """By priority and class; in no order of tenants."""
        for group in self._order:
            for entries in self._groups[group].values():
                yield from (request for _, request in entries)
        yield from self._parked.values()

    def count(self, service: ServiceClass) -> int:
        return self._num_waiting[service]

    def add(self, request: Request) -> None:
        """Queue a request whose work and latest start are known."""
        self._enter(request)
        self._count(request, 1)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.order, request))

    def remove(self, request: Request) -> None:
        if self._parked.pop(request.request_id, None) is None:
            self._leave(request)
        self._count(request, -1)

    def park(self, request: Request) -> None:
        """Let a request wait without being looked at; its deadline still counts."""
        self._leave(request)
        self._parked[request.request_id] = request
        request.status = RequestStatus.PARKED

    def unpark(self, request: Request) -> None:
        del self._parked[request.request_id]
        request.status = RequestStatus.QUEUED
        self._enter(request)

    def _enter(self, request: Request) -> None:
        group = (request.priority, request.service)
        if group not in self._groups:
            self._groups[group] = {}
            insort(self._order, group)
        insort(self._groups[group].setdefault(request.tenant, []), (_work_key(request), request), key=_key)
        urgency = (request.priority, request.latest_start, request.order, request)
        heapq.heappush(self._urgent[request.service], urgency)

    def _leave(self, request: Request) -> None:
        group = (request.priority, request.service)
        tenants = self._groups[group]
        entries = tenants[request.tenant]
        index = bisect_left(entries, _work_key(request), key=_key)
        assert entries[index][1] is request, f"{request.request_id} is not waiting"
        del entries[index]
        if not entries:
            del tenants[request.tenant]
            if not tenants:
                del self._groups[group]
                self._order.remove(group)

    def most_urgent(self, service: ServiceClass) -> Request | None:
        """The waiting request of a class that must start first, priority before time."""
        heap = self._urgent[service]
        while heap and heap[0][3].status is not RequestStatus.QUEUED:
            heapq.heappop(heap)
        return heap[0][3] if heap else None

    def expired(self, now: float) -> list[Request]:
        """Requests that never started and whose deadline is not after `now`; each is reported once."""
        late: list[Request] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[2]
            # A deadline is for the start; who has started once is past it.
            waits = request.status in (RequestStatus.QUEUED, RequestStatus.PARKED)
            if waits and request.first_scheduled_time is None:
                late.append(request)
        return late

    def scan(self) -> "Scan":
        return Scan(self)

    def _count(self, request: Request, sign: int) -> None:
        self._num_waiting[request.service] += sign
        self.num_tokens += sign * request.num_tokens
        self.backlog_seconds = max(0.0, self.backlog_seconds + sign * request.prefill_seconds)
        if not len(self):
            self.backlog_seconds = 0.0


class Scan:
    """One walk over the queue for one step. Requests may leave the queue in between only if they are its head."""

    def __init__(self, queue: WaitingQueue) -> None:
        self._queue = queue
        self._passed: dict[tuple[_Group, str], int] = {}
        self._heaps: dict[_Group, list[tuple[float, tuple[float, float, int], str]]] = {}
        """Tenants by virtual time and their next request. Both only grow, so what is out of date is too low: it comes
        to the top and is entered again."""
        self._head: tuple[_Group, str] | None = None

    def head(self) -> tuple[OrderKey, Request] | None:
        """The next request in order that has not been passed, with its key."""
        for group in self._queue._order:
            tenants = self._queue._groups[group]
            heap = self._heaps.get(group)
            if heap is None:
                heap = self._heaps[group] = [(0.0, (0.0, 0.0, 0), tenant) for tenant in tenants]
            while heap:
                tenant = heap[0][2]
                entries, index = tenants.get(tenant, ()), self._passed.get((group, tenant), 0)
                if index >= len(entries):
                    heapq.heappop(heap)
                    continue
                key, request = entries[index]
                entry = (self._queue._tenants[tenant], key, tenant)
                if entry == heap[0]:
                    self._head = (group, tenant)
                    return waiting_order(request, entry[0]), request
                heapq.heapreplace(heap, entry)
        return None

    def skip(self) -> None:
        """Go past the head; it stays in the queue."""
        assert self._head is not None
        self._passed[self._head] = self._passed.get(self._head, 0) + 1


def waiting_order(request: Request, tenant_seconds: float) -> OrderKey:
    """A waiting request's place among those that run and those that wait."""
    return order_key(
        priority=request.priority,
        service=request.service,
        tenant_seconds=tenant_seconds,
        work_seconds=request.prefill_seconds,
        arrival=request.arrival_time,
        order=request.order,
    )


def _work_key(request: Request) -> tuple[float, float, int]:
    return (request.prefill_seconds, request.arrival_time, request.order)
