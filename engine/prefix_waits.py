"""Requests that wait while another one computes pages that they share: the prefix in flight.

Where many requests that begin alike come together, the first of them computes what they share and the others wait, as
long as that is predicted to be sooner than computing it as well. A leader that ends, is set aside or stands still lets
them go at once, and nobody waits longer than `policy.longest_prefix_wait`.
"""

import heapq

from engine.kv.hashing import PageKeys
from engine.policy import STANDSTILL_SECONDS
from engine.request import Request, RequestStatus
from engine.waiting import WaitingQueue


class PrefixWaits:
    """Who waits for whom. Those who wait stay in the queue, parked: nobody looks at them meanwhile."""

    def __init__(self, waiting: WaitingQueue) -> None:
        self.num_waits = 0
        """Since the start."""
        self._waiting = waiting
        self._followers: dict[str, dict[str, tuple[int, Request]]] = {}
        """By leader, then by follower: the position it waits for."""
        self._leader_of: dict[str, Request] = {}
        self._deadlines: list[tuple[float, int, Request]] = []

    def __len__(self) -> int:
        return len(self._leader_of)

    def begin(self, request: Request, leader: Request, position: int) -> None:
        """A waiting request waits until `leader` has computed the tokens before `position`, or its `wait_until`."""
        assert request.wait_until is not None
        self.num_waits += 1
        self._waiting.park(request)
        self._followers.setdefault(leader.request_id, {})[request.request_id] = (position, request)
        self._leader_of[request.request_id] = leader
        heapq.heappush(self._deadlines, (request.wait_until, request.order, request))

    def reached(self, leader_id: str, position: int) -> None:
        """A leader's tokens before a position are in published pages."""
        for awaited, request in list(self._followers.get(leader_id, {}).values()):
            if awaited <= position:
                self._let_go(request)

    def left(self, leader_id: str) -> None:
        """A leader runs no more."""
        for _, request in list(self._followers.get(leader_id, {}).values()):
            self._let_go(request)

    def forget(self, request: Request) -> None:
        """A request leaves the queue, whether it waits for a prefix or not."""
        leader = self._leader_of.pop(request.request_id, None)
        if leader is not None:
            followers = self._followers[leader.request_id]
            del followers[request.request_id]
            if not followers:
                del self._followers[leader.request_id]

    def release_overdue(self, now: float) -> None:
        """Let those go who have waited long enough, or whose leader has had no rows for a while."""
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[2]
            if request.request_id in self._leader_of:
                self._let_go(request)
        for followers in list(self._followers.values()):
            (_, first) = next(iter(followers.values()))
            leader = self._leader_of[first.request_id]
            if now - leader.last_chunk_time >= STANDSTILL_SECONDS:
                self.left(leader.request_id)

    def check(self, running: dict[str, Request]) -> None:
        """Recompute the books; AssertionError names the first lie."""
        pairs = [(name, leader) for leader, followers in self._followers.items() for name in followers]
        assert dict(pairs) == {name: leader.request_id for name, leader in self._leader_of.items()}
        assert all(self._followers.values()), "a leader without followers stays"
        for leader_id, followers in self._followers.items():
            assert leader_id in running, "somebody waits for a request that does not run"
            for position, request in followers.values():
                assert request.status is RequestStatus.PARKED and position > running[leader_id].num_computed_tokens

    def _let_go(self, request: Request) -> None:
        self.forget(request)
        self._waiting.unpark(request)


def num_shared_pages(a: PageKeys, b: PageKeys, known: int) -> int:
    """Leading full pages that two prompts have in common, where the first `known` are or more than these differ."""
    if known >= min(len(a.keys), len(b.keys)) or a.keys[known] != b.keys[known]:
        return 0
    # A key names all tokens before its end, so equal keys are a prefix of the lists.
    same, differs = known, min(len(a.keys), len(b.keys))
    while differs - same > 1:
        middle = (same + differs) // 2
        if a.keys[middle] == b.keys[middle]:
            same = middle
        else:
            differs = middle
    return same + 1
