"""Pages and slots: the books balance under any order of operations, and the pools refuse to lie."""

import random

import pytest

from engine.kv.grant import Grant, Shortage
from engine.kv.manager import KVManager
from engine.kv.page_pool import PagePool
from engine.kv.slot_pool import SlotPool
from model.kv_layout import KVLayout
from model.presets import preset


class TokenCosts:
    """A second for each token; copies are free."""

    def prefill_seconds(self, start: int, end: int) -> float:
        return float(end - start)

    def replay_seconds(self, position: int) -> float:
        return 10.0

    def load_seconds(self, num_bytes: int) -> float:
        return 0.0


COSTS = TokenCosts()
LAYOUT = KVLayout(config=preset("nano"), row_format="float32", index_format="float32")


def admit(manager: KVManager, request_id: str, num_tokens: int) -> Grant:
    admitted = manager.admit(request_id, num_tokens)
    assert isinstance(admitted, tuple)
    return admitted[0]


def test_a_page_cannot_be_freed_twice() -> None:
    pool = PagePool(4)
    page_ids = list(pool.allocate(2))
    pool.free(page_ids)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(page_ids[:1])


def test_more_pages_than_there_are_is_an_error_of_the_caller() -> None:
    pool = PagePool(4)
    with pytest.raises(AssertionError, match="5 pages wanted, 4 free"):
        pool.allocate(5)


def test_a_slot_is_freed_by_its_owner_only() -> None:
    pool = SlotPool(2)
    slot = pool.allocate("a")
    with pytest.raises(AssertionError, match="held by a, not by b"):
        pool.free(slot, "b")


def test_shortage_says_what_is_missing() -> None:
    manager = KVManager(LAYOUT, num_pages=4, num_slots=2, costs=COSTS)
    assert isinstance(manager.admit("a", 600), tuple)
    assert manager.admit("b", 257) == Shortage(pages_wanted=2, pages_available=1, slots_available=1)
    assert isinstance(manager.admit("b", 256), tuple)
    assert manager.admit("c", 1) == Shortage(pages_wanted=1, pages_available=0, slots_available=0)


def test_a_promise_is_kept_and_exceeded_only_while_pages_are_free() -> None:
    manager = KVManager(LAYOUT, num_pages=3, num_slots=2, costs=COSTS)
    grant = admit(manager, "a", 600)
    assert manager.num_available_pages == 0 and manager.pages.num_free == 3
    assert len(manager.extend(grant, 1)) == 1
    assert manager.extend(grant, 256) == ()
    assert len(manager.extend(grant, 768)) == 2
    assert manager.extend(grant, 769) == Shortage(pages_wanted=1, pages_available=0, slots_available=1)
    manager.release(grant)
    manager.check()
    with pytest.raises(AssertionError, match="released twice"):
        manager.release(grant)


def test_check_notices_a_lie() -> None:
    manager = KVManager(LAYOUT, num_pages=8, num_slots=2, costs=COSTS)
    a, b = [admit(manager, i, 512) for i in "ab"]
    manager.extend(a, 512)
    manager.extend(b, 256)
    b.page_ids[0] = a.page_ids[0]
    b.own_pages = set(b.page_ids)
    with pytest.raises(AssertionError, match="two owners"):
        manager.check()


@pytest.mark.parametrize("seed", range(3))
def test_the_books_balance_after_every_operation(seed: int) -> None:
    rng = random.Random(seed)
    manager = KVManager(LAYOUT, num_pages=23, num_slots=5, costs=COSTS)
    alive: dict[str, tuple[Grant, int]] = {}
    for i in range(1500):
        choice = rng.random()
        if choice < 0.3:
            num_tokens = rng.randrange(1, 2500)
            fits = LAYOUT.pages_for(num_tokens) <= manager.num_available_pages and len(alive) < 5
            admitted = manager.admit(str(i), num_tokens)
            assert isinstance(admitted, tuple) == fits
            if isinstance(admitted, tuple):
                grant, _ = admitted
                alive[str(i)] = (grant, num_tokens)
        elif alive:
            grant, num_tokens = alive[rng.choice(list(alive))]
            if choice < 0.8:
                wanted = rng.randrange(num_tokens + 1)
                manager.extend(grant, wanted)
                assert len(grant.page_ids) >= LAYOUT.pages_for(wanted)
            else:
                manager.release(alive.pop(grant.request_id)[0])
        manager.check()
    for grant, _ in alive.values():
        manager.release(grant)
    manager.check()
    assert manager.num_available_pages == 23 and manager.num_free_slots == 5
