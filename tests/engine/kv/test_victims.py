"""Ranks against their definition, and the heap against a sorted list."""

import random
from dataclasses import dataclass
from itertools import count

import pytest

from engine.kv.victims import VictimHeap, fade, rank_of


@dataclass(eq=False)
class Item:
    rank: float
    wanted: bool = True
    ticket: int = 0


def heap() -> VictimHeap[Item]:
    return VictimHeap(lambda item: item.wanted, count(1))


def test_ranks_order_as_faded_values_do_at_any_time() -> None:
    rng = random.Random(0)
    items = [(rng.uniform(0.1, 9), rng.uniform(0, 500), rng.uniform(1e-9, 1e-3)) for _ in range(200)]
    by_rank = sorted(items, key=lambda i: rank_of(*i, 60.0))
    for now in (500.0, 1000.0):
        assert by_rank == sorted(items, key=lambda i: fade(i[0], i[1], now, 60.0) * i[2])


def test_a_half_life_halves() -> None:
    assert fade(8.0, 100.0, 160.0, 60.0) == pytest.approx(4.0)
    assert rank_of(8.0, 100.0, 1.0, 60.0) == pytest.approx(rank_of(4.0, 160.0, 1.0, 60.0))


def test_values_of_nothing_have_a_rank() -> None:
    assert rank_of(0.0, 0.0, 0.0, 60.0) < rank_of(1e-9, 0.0, 1e-9, 60.0)


def test_equal_ranks_leave_in_the_order_of_their_offers() -> None:
    h, items = heap(), [Item(1.0) for _ in range(20)]
    for item in items:
        h.offer(item, item.rank)
    assert [h.pop() for _ in items] == items and h.pop() is None and h.lowest() is None


def test_thousands_of_offers_agree_with_a_sorted_list() -> None:
    rng, h = random.Random(1), heap()
    items = [Item(0.0) for _ in range(300)]
    offered: set[Item] = set()
    for _ in range(20_000):
        item = rng.choice(items)
        match rng.randrange(4):
            case 0 | 1:
                item.rank, item.wanted = rng.random(), True
                h.offer(item, item.rank)
                offered.add(item)
            case 2:
                # It is not a victim any more; it has to be offered again to become one.
                item.wanted = False
                offered.discard(item)
            case 3:
                least = min(offered, key=lambda i: i.rank, default=None)
                lowest = h.lowest()
                assert lowest == (None if least is None else (least.rank, least))
                if rng.random() < 0.5:
                    assert h.pop() is least
                    if least is not None:
                        offered.discard(least)
        assert len(h._heap) <= 2 * len(items) + 1025, "void entries pile up"
    assert {item for _, item in h.live()} == offered
