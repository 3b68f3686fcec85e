"""Which snapshots there are: one place in host memory for each, and one position for everything in it (T9).

A snapshot is ordered while a step is planned, becomes ready when that step is committed, and can be restored from then
on. It is found by the name of its position (`Node.key`, or that and the tokens that follow, see `Mark.key`). The bytes
are the runner's; a place is an index into its arena.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Literal

from engine.kv.victims import VictimHeap, fade, rank_of

SnapshotKind = Literal["prompt_end", "turn_end", "junction", "periodic", "hibernate"]

EXPECTED_USES: dict[SnapshotKind, float] = {
    "prompt_end": 1.0,
    "turn_end": 1.0,
    "junction": 1.0,
    "periodic": 0.25,
    "hibernate": 1.0,
}
"""What a snapshot counts as used when it is new: conversations come back to the ends of their turns, and two requests
have met at a junction; a periodic one waits for somebody who diverges from a long prompt."""


class Snapshot:
    """One position whose slot is saved, or is being saved."""

    __slots__ = (
        "discarded",
        "hits",
        "key",
        "kind",
        "last_use",
        "pins",
        "place",
        "position",
        "ready",
        "seconds_saved",
        "ticket",
        "uses",
    )

    def __init__(
        self, *, key: bytes, place: int, position: int, kind: SnapshotKind, seconds_saved: float, now: float
    ) -> None:
        self.key = key
        self.place = place
        self.position = position
        """Tokens computed: the restored request goes on with this one."""
        self.kind = kind
        self.seconds_saved = seconds_saved
        """What coming back to the position takes without it."""
        self.ready = False
        """False until the step that writes it is committed."""
        self.discarded = False
        """Not to be found any more; its place is free once the writing step is over."""
        self.pins = 0
        self.hits = 0
        self.uses = EXPECTED_USES[kind]
        self.last_use = now
        self.ticket = 0

    @property
    def may_be_dropped(self) -> bool:
        return self.ready and not self.pins and not self.discarded


class SnapshotStore:
    """Places 0 .. num_places - 1 and what they hold."""

    def __init__(self, *, num_places: int, bytes_per_snapshot: int, half_life_seconds: float = 600.0) -> None:
        self.num_places = num_places
        self.bytes_per_snapshot = bytes_per_snapshot
        self._half_life = half_life_seconds
        self._free = list(range(num_places - 1, -1, -1))
        self._by_key: dict[bytes, Snapshot] = {}
        self._writing: set[Snapshot] = set()
        self._victims = VictimHeap[Snapshot](lambda snapshot: snapshot.may_be_dropped, count(1))

    def __len__(self) -> int:
        """Places in use."""
        return self.num_places - len(self._free)

    def __iter__(self) -> Iterator[Snapshot]:
        """All that can be found, those that are being written included; for checks."""
        return iter(self._by_key.values())

    def get(self, key: bytes) -> Snapshot | None:
        """The snapshot of a position, ready or not."""
        return self._by_key.get(key)

    def find(self, key: bytes) -> Snapshot | None:
        """The snapshot of a position that can be restored now."""
        snapshot = self._by_key.get(key)
        return snapshot if snapshot is not None and snapshot.ready else None

    def order(
        self, key: bytes, position: int, kind: SnapshotKind, *, seconds_saved: float, now: float
    ) -> Snapshot | None:
        """Give a place to a position that has no snapshot, if need be that of the least valuable one.

        None: all places hold something of more value or cannot be had. A hibernating request asks for no value.
        """
        assert key not in self._by_key, "the position has a snapshot"
        if not self._free:
            lowest = self._victims.lowest()
            new = self._rank(EXPECTED_USES[kind], now, seconds_saved)
            if lowest is None or (kind != "hibernate" and new <= lowest[0]):
                return None
            self._drop(lowest[1])
        snapshot = Snapshot(
            key=key, place=self._free.pop(), position=position, kind=kind, seconds_saved=seconds_saved, now=now
        )
        self._by_key[key] = snapshot
        self._writing.add(snapshot)
        return snapshot

    def commit(self, snapshot: Snapshot) -> None:
        """The step that writes it has run."""
        self._writing.remove(snapshot)
        snapshot.ready = True
        if snapshot.discarded:
            self._free.append(snapshot.place)
        else:
            self._offer(snapshot)

    def cancel(self, snapshot: Snapshot) -> None:
        """The step that writes it has run, but what it wrote is not to be trusted."""
        if not snapshot.discarded:
            self._discard(snapshot)
        self.commit(snapshot)

    def use(self, snapshot: Snapshot, now: float) -> None:
        """A request is restored from it."""
        assert snapshot.ready
        snapshot.uses = fade(snapshot.uses, snapshot.last_use, now, self._half_life) + 1.0
        snapshot.last_use = now
        snapshot.hits += 1
        self._offer(snapshot)

    def pin(self, snapshot: Snapshot) -> None:
        """Keep it until `unpin`: a hibernated request comes back to it."""
        assert not snapshot.discarded
        snapshot.pins += 1

    def unpin(self, snapshot: Snapshot) -> None:
        assert snapshot.pins > 0, "a pin is taken off twice"
        snapshot.pins -= 1
        self._offer(snapshot)

    def discard(self, keys: Iterable[bytes]) -> None:
        """No page holds these positions any more. Positions without a snapshot are fine."""
        for key in keys:
            snapshot = self._by_key.get(key)
            if snapshot is not None and not snapshot.pins:
                if snapshot.ready:
                    self._drop(snapshot)
                else:
                    self._discard(snapshot)

    def check(self) -> None:
        """Recompute the books; AssertionError names the first lie."""
        assert all(key == snapshot.key for key, snapshot in self._by_key.items())
        assert all(snapshot.ready != (snapshot in self._writing) for snapshot in self._by_key.values())
        assert not any(snapshot.discarded for snapshot in self._by_key.values()), "a discarded snapshot is found"
        assert all(s.discarded or self._by_key.get(s.key) is s for s in self._writing), "a written snapshot is lost"
        assert not any(s.discarded and s.pins for s in self._writing), "a pinned snapshot is lost"
        held = {*self._by_key.values(), *self._writing}
        places = [snapshot.place for snapshot in held] + self._free
        assert sorted(places) == list(range(self.num_places)), "a place is lost or has two owners"
        live = {snapshot: rank for rank, snapshot in self._victims.live()}
        assert set(live) == {snapshot for snapshot in held if snapshot.may_be_dropped}, "a victim is not in the heap"
        assert all(rank == self._rank(s.uses, s.last_use, s.seconds_saved) for s, rank in live.items())

    def check_pins(self, pinned: Iterable[Snapshot]) -> None:
        """Every pin is that of one of `pinned`."""
        counts = Counter(pinned)
        assert all(s.pins == counts[s] for s in {*self._by_key.values(), *self._writing}), "pins are wrong"

    def _discard(self, snapshot: Snapshot) -> None:
        assert not snapshot.pins, "a pinned snapshot is dropped"
        del self._by_key[snapshot.key]
        snapshot.discarded = True

    def _drop(self, snapshot: Snapshot) -> None:
        self._discard(snapshot)
        self._free.append(snapshot.place)

    def _offer(self, snapshot: Snapshot) -> None:
        if snapshot.may_be_dropped:
            rank = self._rank(snapshot.uses, snapshot.last_use, snapshot.seconds_saved)
            self._victims.offer(snapshot, rank)

    def _rank(self, uses: float, last_use: float, seconds_saved: float) -> float:
        return rank_of(uses, last_use, seconds_saved / self.bytes_per_snapshot, self._half_life)
