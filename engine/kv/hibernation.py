"""Requests that were set aside, and what is kept for each until it comes back: its pages and its slot's snapshot.

    hibernate   the pages are pinned: they stay on the device while nobody needs the bytes, else they go to host memory
    wake        the request has its pages in a table again, and the pins are taken off
    give up     the pages are ordinary cached ones from now on: what is dropped of them is computed again

A pin is not a copy: until the bytes are needed a hibernated request costs nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.kv.prefix_index import PrefixIndex
from engine.kv.prefix_node import Node
from engine.kv.snapshot_store import Snapshot, SnapshotStore


@dataclass(slots=True, kw_only=True, eq=False)
class Hibernation:
    """What is pinned for one request."""

    request_id: str
    tip: Node
    """Its pages are those of the path to this one."""
    snapshot: Snapshot | None
    """None: there was no place, or the step that was to write it failed; the slot is replayed."""
    position: int
    """Tokens computed."""
    priority: int


class Hibernations:
    """All of them, by request. They own the pins of index and snapshot store."""

    def __init__(self, index: PrefixIndex, snapshots: SnapshotStore) -> None:
        self.num_given_up = 0
        """Since the start."""
        self._index = index
        self._snapshots = snapshots
        self._by_id: dict[str, Hibernation] = {}

    def __iter__(self) -> Iterator[Hibernation]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def begin(self, hibernation: Hibernation) -> None:
        """Pin everything. The pages are still in the request's table."""
        assert hibernation.request_id not in self._by_id, f"{hibernation.request_id} hibernates twice"
        self._by_id[hibernation.request_id] = hibernation
        self._index.pin(hibernation.tip)
        if hibernation.snapshot is not None:
            self._snapshots.pin(hibernation.snapshot)

    def end(self, request_id: str) -> bool:
        """Take the pins off: the request has woken, or is gone. Returns whether it had any."""
        hibernation = self._by_id.pop(request_id, None)
        if hibernation is None:
            return False
        if hibernation.snapshot is not None:
            self._snapshots.unpin(hibernation.snapshot)
        self._index.unpin(hibernation.tip)
        return True

    def give_up(self, *, spare: str | None = None) -> bool:
        """Take the pins off the request that matters least, but for `spare`; False: there is no other.

        Lowest priority first, then the one that is computed again soonest.
        """
        others = (h for h in self._by_id.values() if h.request_id != spare)
        least = min(others, key=lambda h: (-h.priority, h.position), default=None)
        if least is None:
            return False
        self.num_given_up += self.end(least.request_id)
        return True

    def lose_snapshot(self, snapshot: Snapshot) -> None:
        """The step that was to write it has failed."""
        for hibernation in self._by_id.values():
            if hibernation.snapshot is snapshot:
                self._snapshots.unpin(snapshot)
                hibernation.snapshot = None

    def lose_pages(self, host_pages: set[int], page_ids: set[int]) -> None:
        """These places hold nothing: whoever had something there is given up."""
        for hibernation in list(self._by_id.values()):
            places = ((node.host_page, node.page_id) for node in hibernation.tip.path())
            if any(host_page in host_pages or page_id in page_ids for host_page, page_id in places):
                self.num_given_up += self.end(hibernation.request_id)

    def check(self) -> None:
        """Recompute the snapshots' pins; those of pages are `PrefixIndex.check`'s."""
        pinned = [h.snapshot for h in self._by_id.values() if h.snapshot is not None]
        self._snapshots.check_pins(pinned)
