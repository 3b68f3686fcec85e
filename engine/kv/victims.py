"""What to give up first: the fewest seconds saved for each byte, weighed by how likely they are to be saved at all.

    value(now) = uses(now) * seconds / bytes            uses(now) = sum over past uses of 2 ** (-(now - t) / half life)

All values fade at the same rate, so their order does not depend on the time and is fixed between two uses:

    rank       = log2(uses(last use) * seconds / bytes) + last use / half life
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import log2
from typing import Generic, Protocol, TypeVar

_LEAST = 1e-12


def fade(uses: float, last_use: float, now: float, half_life: float) -> float:
    """Uses counted at `last_use`, seen from `now`."""
    return float(uses * 2.0 ** ((last_use - now) / half_life))


def rank_of(uses: float, last_use: float, seconds_per_byte: float, half_life: float) -> float:
    """Sort key of a victim; the lowest goes first."""
    return log2(max(uses, _LEAST)) + log2(max(seconds_per_byte, _LEAST)) + last_use / half_life


class Victim(Protocol):
    ticket: int
    """Of its latest offer to any heap; an entry with another ticket is void."""


V = TypeVar("V", bound=Victim)


class VictimHeap(Generic[V]):
    """Candidates by rank, O(log n) each. Entries are void once the item is offered again or is no victim any more."""

    def __init__(self, is_victim: Callable[[V], bool], tickets: Iterator[int]) -> None:
        self._is_victim = is_victim
        self._tickets = tickets
        self._heap: list[tuple[float, int, V]] = []
        self._most = 1024

    def offer(self, victim: V, rank: float) -> None:
        victim.ticket = next(self._tickets)
        heapq.heappush(self._heap, (rank, victim.ticket, victim))
        if len(self._heap) > self._most:
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapq.heapify(self._heap)
            self._most = 2 * len(self._heap) + 1024

    def lowest(self) -> tuple[float, V] | None:
        """Rank and item that `pop` would return."""
        while self._heap and not self._is_live(self._heap[0]):
            heapq.heappop(self._heap)
        return (self._heap[0][0], self._heap[0][2]) if self._heap else None

    def pop(self) -> V | None:
        found = self.lowest()
        if found is not None:
            heapq.heappop(self._heap)
        return None if found is None else found[1]

    def live(self) -> list[tuple[float, V]]:
        """All valid entries; for checks."""
        return [(entry[0], entry[2]) for entry in self._heap if self._is_live(entry)]

    def _is_live(self, entry: tuple[float, int, V]) -> bool:
        return entry[2].ticket == entry[1] and self._is_victim(entry[2])


@dataclass(slots=True)
class Evicted:
    """What eviction did; the copies belong to the plan in which the pages are used again."""

    page_ids: list[int] = field(default_factory=list)
    """Device pages that are free now."""
    spills: list[tuple[int, int]] = field(default_factory=list)
    """(page, host page), in this order; a later copy to the same host page replaces an earlier one."""
    lost: list[bytes] = field(default_factory=list)
    """Names of positions that no page holds any more: snapshots taken there have lost their use."""
