"""What is kept for a request that was set aside: pins hold it somewhere, and are given up in order."""

import numpy as np
import pytest

from engine.kv.grant import Grant, Shortage
from engine.kv.hashing import PageHasher, PageKeys
from engine.kv.manager import KVManager
from model.kv_layout import KVLayout
from model.presets import preset

PAGE = 256


class TokenCosts:
    """A second for each token; copies are free."""

    def prefill_seconds(self, start: int, end: int) -> float:
        return float(end - start)

    def replay_seconds(self, position: int) -> float:
        return 10.0

    def load_seconds(self, num_bytes: int) -> float:
        return 0.0


class Memory:
    """A manager and requests of tokens of their own."""

    def __init__(self, num_pages: int, num_host_pages: int, num_snapshots: int = 8) -> None:
        layout = KVLayout(config=preset("nano"), row_format="float32", index_format="float32")
        self.kv = KVManager(
            layout, num_pages, 8, costs=TokenCosts(), num_host_pages=num_host_pages, num_snapshots=num_snapshots
        )
        self.hasher = PageHasher(b"k" * 32, "", PAGE)
        self.now = 0.0

    def tokens(self, name: str, count: int) -> np.ndarray:
        return np.random.default_rng(sum(name.encode())).integers(2, 2000, count).astype(np.int32)

    def start(self, name: str, num_tokens: int, computed: int) -> Grant | Shortage:
        """Admit a request of so many tokens and compute the first of them, in a step of its own."""
        ids = self.tokens(name, num_tokens)
        keys = PageKeys(self.hasher, "", ids)
        admitted = self.kv.admit(name, num_tokens, self.kv.probe(keys, ids), keys, ids, self.now)
        if isinstance(admitted, Shortage):
            return admitted
        self.kv.extend(admitted[0], computed)
        self.run()
        self.kv.commit(admitted[0], ids, computed, self.now)
        self.kv.check()
        return admitted[0]

    def hibernate(self, grant: Grant, num_tokens: int, computed: int, priority: int = 0) -> None:
        ids = self.tokens(grant.request_id, num_tokens)
        self.kv.release(grant, ids, computed, self.now, keep="hibernate", priority=priority)

    def run(self, *, lost: bool = False) -> tuple[int, int]:
        """A step; returns (spills, loads)."""
        self.now += 1.0
        moves = self.kv.seal()
        self.kv.settle(set(), moves if lost else None)
        if lost:
            self.kv.forget_lost(moves)
        self.kv.check()
        return len(moves.page_spills), len(moves.page_loads)

    def resumes_at(self, name: str, num_tokens: int) -> int:
        ids = self.tokens(name, num_tokens)
        return self.kv.probe(PageKeys(self.hasher, "", ids), ids).resume_at


def started(memory: Memory, name: str, num_tokens: int, computed: int) -> Grant:
    grant = memory.start(name, num_tokens, computed)
    assert isinstance(grant, Grant)
    return grant


def test_pages_stay_where_they_are_until_somebody_needs_the_bytes() -> None:
    memory = Memory(num_pages=10, num_host_pages=10)
    memory.hibernate(started(memory, "a", 1000, 900), 1000, 900)
    assert memory.run() == (0, 0)
    assert memory.kv.num_available_pages == 10, "they can go to host memory"
    started(memory, "b", 6 * PAGE, 6 * PAGE)
    assert memory.resumes_at("a", 1000) == 900
    ids = memory.tokens("c", 2 * PAGE)
    keys = PageKeys(memory.hasher, "", ids)
    admitted = memory.kv.admit("c", 2 * PAGE, memory.kv.probe(keys, ids), keys, ids)
    assert isinstance(admitted, tuple)
    memory.kv.extend(admitted[0], 2 * PAGE)
    assert memory.run() == (2, 0), "two pages were needed, two went"
    assert memory.resumes_at("a", 1000) == 900


def test_kept_pages_are_loaded_back_and_the_pins_come_off() -> None:
    memory = Memory(num_pages=8, num_host_pages=8)
    memory.hibernate(started(memory, "a", 1000, 900), 1000, 900)
    memory.run()
    other = started(memory, "b", 8 * PAGE, 8 * PAGE)
    memory.kv.release(other, memory.tokens("b", 8 * PAGE), 8 * PAGE, memory.now)
    for name in "cdef":
        grant = started(memory, name, 6 * PAGE, 6 * PAGE)
        memory.kv.release(grant, memory.tokens(name, 6 * PAGE), 6 * PAGE, memory.now)
    assert memory.resumes_at("a", 1000) == 900, "strangers pressed through host memory and took what they could"
    ids = memory.tokens("a", 1000)
    keys = PageKeys(memory.hasher, "", ids)
    admitted = memory.kv.admit("a", 1000, memory.kv.probe(keys, ids), keys, ids)
    assert isinstance(admitted, tuple) and admitted[1] == 900
    assert not len(memory.kv.hibernations)
    _, num_loads = memory.run()
    assert num_loads == 4, "three pages and the one that is not full"
    assert memory.kv.hibernations.num_given_up == 0


def test_the_slot_is_kept_although_no_place_is_free() -> None:
    """Snapshots of more value give way to a hibernating request's, and cannot take its place afterwards."""
    memory = Memory(num_pages=20, num_host_pages=20, num_snapshots=1)
    grant = started(memory, "a", 700, 600)
    memory.kv.order_snapshot(grant, memory.tokens("a", 700), 512, "prompt_end", memory.now)
    memory.run()
    memory.hibernate(grant, 700, 600)
    memory.run()
    (kept,) = memory.kv.hibernations
    assert kept.snapshot is not None and kept.snapshot.position == 600 and kept.snapshot.pins == 1
    other = started(memory, "b", 2000, 1900)
    memory.kv.release(other, memory.tokens("b", 2000), 1900, memory.now, keep="turn_end")
    memory.run()
    assert memory.resumes_at("a", 700) == 600


def test_where_host_memory_is_full_the_pins_of_the_least_important_are_given_up() -> None:
    memory = Memory(num_pages=9, num_host_pages=1, num_snapshots=0)
    for name, priority in (("a", -1), ("b", 1), ("c", 0)):
        grant = started(memory, name, 3 * PAGE, 2 * PAGE + 10)
        memory.hibernate(grant, 3 * PAGE, 2 * PAGE + 10, priority)
    memory.run()
    assert memory.kv.num_available_pages == 1, "one may go to host memory"
    memory.kv.unpin_until(3)
    assert [h.request_id for h in memory.kv.hibernations] == ["a", "c"]
    assert memory.kv.num_available_pages == 4
    memory.kv.unpin_until(4)
    assert [h.request_id for h in memory.kv.hibernations] == ["a", "c"], "it was enough"
    memory.kv.unpin_until(7)
    assert [h.request_id for h in memory.kv.hibernations] == ["a"]
    assert memory.kv.hibernations.num_given_up == 2
    memory.kv.check()


def test_where_nobody_runs_somebody_is_always_admitted() -> None:
    """Four hibernate on a device that they fill, without host memory: whoever asks gets its pages."""
    memory = Memory(num_pages=8, num_host_pages=0, num_snapshots=0)
    grants = [started(memory, name, 2 * PAGE, PAGE + 50) for name in "abcd"]
    for grant in grants:
        memory.hibernate(grant, 2 * PAGE, PAGE + 50)
    memory.run()
    assert memory.kv.num_available_pages == 0
    grant = started(memory, "b", 8 * PAGE, 8 * PAGE)
    assert len(grant.page_ids) == 8 and not len(memory.kv.hibernations)


def test_while_somebody_runs_nobodys_pins_are_given_up_for_a_newcomer() -> None:
    memory = Memory(num_pages=8, num_host_pages=0, num_snapshots=0)
    started(memory, "runs", PAGE, PAGE)
    memory.hibernate(started(memory, "a", 6 * PAGE, 6 * PAGE - 1), 6 * PAGE, 6 * PAGE - 1)
    memory.run()
    assert isinstance(memory.start("b", 3 * PAGE, PAGE), Shortage)
    assert memory.resumes_at("a", 6 * PAGE) == 5 * PAGE


@pytest.mark.parametrize("lost", [False, True])
def test_what_a_lost_step_was_to_keep_is_not_counted_on(lost: bool) -> None:
    memory = Memory(num_pages=6, num_host_pages=6)
    memory.hibernate(started(memory, "a", 700, 600), 700, 600)
    memory.run(lost=lost)
    (kept,) = memory.kv.hibernations
    assert (kept.snapshot is None) == lost
    assert memory.resumes_at("a", 700) == (512 if lost else 600)
    ids = memory.tokens("b", 6 * PAGE)
    keys = PageKeys(memory.hasher, "", ids)
    admitted = memory.kv.admit("b", 6 * PAGE, memory.kv.probe(keys, ids), keys, ids)
    assert isinstance(admitted, tuple)
    memory.kv.extend(admitted[0], 6 * PAGE)
    if lost:
        memory.kv.release(admitted[0])
    memory.run(lost=lost)
    assert memory.resumes_at("a", 700) == (0 if lost else 600), "its pages were on their way to host memory"
    assert len(memory.kv.hibernations) == (0 if lost else 1) and memory.kv.hibernations.num_given_up == lost


def test_two_that_share_their_pages_keep_them_once() -> None:
    """A pin for each: the first to go does not take the pages away from the second."""
    memory = Memory(num_pages=8, num_host_pages=0, num_snapshots=0)
    ids = memory.tokens("a", 3 * PAGE)
    keys = PageKeys(memory.hasher, "", ids)
    grant = started(memory, "a", 3 * PAGE, 2 * PAGE)
    again = memory.kv.admit("other", 3 * PAGE, memory.kv.probe(keys, ids), keys, ids)
    assert isinstance(again, tuple) and again[1] == 2 * PAGE
    memory.run()
    memory.kv.release(grant, ids, 2 * PAGE, memory.now, keep="hibernate")
    memory.kv.release(again[0], ids, 2 * PAGE, memory.now, keep="hibernate")
    memory.run()
    assert memory.kv.num_available_pages == 6
    memory.kv.forget("a")
    assert memory.kv.num_available_pages == 6
    memory.kv.forget("other")
    assert memory.kv.num_available_pages == 8
    memory.kv.check()
