"""The snapshot store against a brute-force twin, and its rules one by one."""

import random
from dataclasses import dataclass, field

import pytest

from engine.kv.snapshot_store import EXPECTED_USES, Snapshot, SnapshotKind, SnapshotStore

KINDS: list[SnapshotKind] = ["prompt_end", "turn_end", "junction", "periodic", "hibernate"]
HALF_LIFE = 50.0


def store(num_places: int = 2) -> SnapshotStore:
    return SnapshotStore(num_places=num_places, bytes_per_snapshot=1000, half_life_seconds=HALF_LIFE)


def ready(s: SnapshotStore, key: bytes, *, seconds: float = 1.0, now: float = 0.0, kind: SnapshotKind = "turn_end"):
    snapshot = s.order(key, 10, kind, seconds_saved=seconds, now=now)
    assert snapshot is not None
    s.commit(snapshot)
    return snapshot


def test_a_snapshot_is_found_once_its_step_is_committed() -> None:
    s = store()
    snapshot = s.order(b"k", 777, "turn_end", seconds_saved=1.0, now=0.0)
    assert snapshot is not None and snapshot.position == 777
    assert s.find(b"k") is None and s.get(b"k") is snapshot
    s.commit(snapshot)
    assert s.find(b"k") is snapshot
    s.check()


def test_a_failed_step_leaves_no_snapshot() -> None:
    s = store(1)
    snapshot = s.order(b"k", 1, "turn_end", seconds_saved=1.0, now=0.0)
    assert snapshot is not None
    s.cancel(snapshot)
    assert s.get(b"k") is None and len(s) == 0
    assert s.order(b"k", 1, "turn_end", seconds_saved=1.0, now=0.0) is not None


def test_the_least_valuable_place_goes_and_only_to_something_better() -> None:
    s = store()
    ready(s, b"dear", seconds=9.0)
    ready(s, b"cheap", seconds=2.0)
    assert s.order(b"worse", 1, "turn_end", seconds_saved=1.0, now=0.0) is None
    assert s.order(b"better", 1, "turn_end", seconds_saved=3.0, now=0.0) is not None
    assert s.find(b"cheap") is None and s.find(b"dear") is not None


def test_old_value_fades_and_use_refreshes_it() -> None:
    s = store()
    used, idle = ready(s, b"used", seconds=4.0), ready(s, b"idle", seconds=4.5)
    s.use(used, now=2 * HALF_LIFE)
    # The idle one is worth 4.5 / 8 by now, the new one 1.
    assert s.order(b"new", 1, "turn_end", seconds_saved=1.0, now=3 * HALF_LIFE) is not None
    assert s.find(b"used") is used and s.get(b"idle") is None and idle.discarded


def test_places_being_written_are_not_given_away() -> None:
    s = store(1)
    assert s.order(b"a", 1, "turn_end", seconds_saved=1e-9, now=0.0) is not None
    assert s.order(b"b", 1, "hibernate", seconds_saved=1e9, now=0.0) is None


def test_a_snapshot_discarded_while_it_is_written_frees_its_place_afterwards() -> None:
    s = store(1)
    first = s.order(b"a", 1, "turn_end", seconds_saved=1.0, now=0.0)
    assert first is not None
    s.discard([b"a", b"unknown"])
    assert s.get(b"a") is None and len(s) == 1
    assert s.order(b"b", 1, "hibernate", seconds_saved=1.0, now=0.0) is None
    s.check()
    s.commit(first)
    assert len(s) == 0
    s.check()


def test_pinned_snapshots_stay() -> None:
    s = store(1)
    kept = ready(s, b"kept", seconds=1e-9)
    s.pin(kept)
    s.discard([b"kept"])
    assert s.order(b"b", 1, "hibernate", seconds_saved=1e9, now=1e6) is None
    assert s.find(b"kept") is kept
    s.unpin(kept)
    assert s.order(b"b", 1, "turn_end", seconds_saved=1.0, now=1e3) is not None


def test_a_hibernating_request_takes_any_place() -> None:
    s = store(1)
    ready(s, b"dear", seconds=1e9)
    assert s.order(b"sleeper", 1, "hibernate", seconds_saved=1e-9, now=0.0) is not None


def test_a_store_without_places_refuses() -> None:
    s = store(0)
    assert s.order(b"a", 1, "hibernate", seconds_saved=1.0, now=0.0) is None
    s.check()


@dataclass(eq=False)
class Twin:
    """One snapshot as its history says it should be."""

    place: int
    kind: SnapshotKind
    seconds: float
    born: float
    uses: list[float] = field(default_factory=list)
    ready: bool = False
    gone: bool = False
    pins: int = 0

    def value(self, now: float) -> float:
        past = EXPECTED_USES[self.kind] * 2.0 ** ((self.born - now) / HALF_LIFE)
        past += sum(2.0 ** ((t - now) / HALF_LIFE) for t in self.uses)
        return past * self.seconds

    @property
    def can_go(self) -> bool:
        return self.ready and not self.pins and not self.gone


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_agrees_with_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    places = rng.choice([1, 3, 8])
    s = store(places)
    twins: dict[bytes, Twin] = {}
    writing: list[tuple[Snapshot, Twin]] = []
    now, evictions = 0.0, 0
    for step in range(4000):
        now += rng.expovariate(0.2)
        key = str(rng.randrange(14)).encode()
        twin, snapshot = twins.get(key), s.get(key)
        assert (twin is None) == (snapshot is None)
        match rng.randrange(8):
            case 0 | 1 | 2 if twin is None:
                kind, seconds = rng.choice(KINDS), rng.uniform(0.1, 5.0)
                victims = [t for t in twins.values() if t.can_go]
                full = len(twins) + sum(t.gone for _, t in writing) == places
                victim = min(victims, key=lambda t: t.value(now)) if full and victims else None
                new = Twin(-1, kind, seconds, now)
                wins = victim is not None and (kind == "hibernate" or new.value(now) > victim.value(now))
                made = s.order(key, step, kind, seconds_saved=seconds, now=now)
                assert (made is not None) == (not full or wins)
                if made is not None:
                    if full:
                        assert victim is not None and made.place == victim.place
                        twins = {k: t for k, t in twins.items() if t is not victim}
                        evictions += 1
                    new.place = made.place
                    twins[key] = new
                    writing.append((made, new))
            case 3 if writing:
                made, new = writing.pop(rng.randrange(len(writing)))
                if rng.random() < 0.2 and not new.pins:
                    s.cancel(made)
                    twins = {k: t for k, t in twins.items() if t is not new}
                else:
                    s.commit(made)
                    new.ready = True
            case 4 if twin is not None and twin.ready:
                assert s.find(key) is snapshot is not None
                s.use(snapshot, now)
                twin.uses.append(now)
            case 5 if twin is not None and snapshot is not None and twin.pins < 2:
                s.pin(snapshot)
                twin.pins += 1
            case 6 if twin is not None and snapshot is not None and twin.pins:
                s.unpin(snapshot)
                twin.pins -= 1
            case 7:
                s.discard([key, b"unknown"])
                if twin is not None and not twin.pins:
                    twin.gone = True
                    del twins[key]
        s.check()
        assert {k for k in twins if s.find(k)} == {k for k, t in twins.items() if t.ready}
        assert len(s) == len(twins) + sum(t.gone for _, t in writing)
    assert evictions > 20
