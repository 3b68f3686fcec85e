"""The prefix index: what is found, what stays, what goes, and how long it takes."""

import time
from collections.abc import Callable

import numpy as np
from kv.trees import P, ids, index, keys_of, name_of, publish_all

from engine.kv.hashing import PageHasher, PageKeys
from engine.kv.prefix_index import PrefixIndex

MOST = 4
"""Plain loops that a match, or holding a path and letting go, may cost: measured 1.2 to 1.6."""


def test_the_longest_cached_prefix_is_found() -> None:
    tree = index()
    publish_all(tree, [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9], 10)
    found = tree.match(keys_of([1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 1]), ids([1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 1]))
    assert [node.page_id for node in found.nodes] == [10, 11]
    assert found.num_on_device == 2 and not found.marks and found.end == "diverged"


def test_salts_do_not_share() -> None:
    tree = index()
    publish_all(tree, [1, 2, 3, 4, 5], 0, salt="a")
    found = tree.match(keys_of([1, 2, 3, 4, 5], "b"), ids([1, 2, 3, 4, 5]))
    assert not found.nodes and not found.marks and found.end == "salt"


def test_an_incomplete_last_page_is_found_by_its_tokens() -> None:
    tree = index()
    publish_all(tree, [1, 2, 3, 4, 5, 6], 0)
    more = [1, 2, 3, 4, 5, 6, 7]
    (mark,) = tree.match(keys_of(more), ids(more)).marks
    assert (mark.position, mark.holder.page_id, mark.key) == (6, 1, name_of(("", (1, 2, 3, 4, 5, 6))))
    for other in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 7, 6], [9, 2, 3, 4, 5, 6]):
        assert not tree.match(keys_of(other), ids(other)).marks


def test_a_position_inside_a_full_page_is_found_when_it_was_named() -> None:
    tree = index()
    keys = keys_of([1, 2, 3, 4, 5, 6, 7, 8])
    tip = tree.root(keys.root)
    tree.acquire(tip)
    tip = tree.publish(tip, keys, 0, 0.0).node
    tree.publish(tip, keys, 1, 0.0, tails=[ids([5, 6]).tobytes()])
    # Another answer after the same prompt [1 .. 6]: the page that it needs is full of the first answer.
    again = [1, 2, 3, 4, 5, 6, 0, 0, 0]
    found = tree.match(keys_of(again), ids(again))
    assert len(found.nodes) == 1 and [(m.position, m.holder.page_id) for m in found.marks] == [(6, 1)]


def test_positions_that_some_page_has() -> None:
    tree = index(num_host_pages=0)
    keys = keys_of([1, 2, 3, 4])
    assert not tree.has(keys.root, ids([1, 2]).tobytes())
    tip = publish_all(tree, [1, 2, 3, 4, 5, 6], 0)
    assert tree.has(keys.keys[0], b"") and tree.has(keys.keys[0], ids([5, 6]).tobytes())
    assert not tree.has(keys.keys[0], ids([5]).tobytes()) and not tree.has(keys.root, ids([1, 2]).tobytes())
    tree.release(tip, 1.0)
    tree.evict(2)
    assert not tree.has(keys.keys[0], b"")


def test_a_page_that_includes_a_finished_leaf_replaces_it() -> None:
    tree = index()
    leaf = publish_all(tree, [1, 2, 3, 4, 5, 6], 0)
    tree.release(leaf, 1.0)
    keys = keys_of([1, 2, 3, 4, 5, 6, 7, 8])
    base = tree.match(keys, ids([1, 2, 3, 4, 5, 6, 7, 8])).nodes[0]
    tree.acquire(base)
    published = tree.publish(base, keys, 7, 2.0, tails=[ids([5, 6]).tobytes()])
    assert published.freed == [1] and len(tree) == 2
    (mark,) = tree.match(keys, ids([1, 2, 3, 4, 5, 6, 7, 8])).marks
    assert mark.holder is published.node
    tree.check([published.node])


def test_a_leaf_that_a_copy_reads_is_not_replaced() -> None:
    tree = index()
    leaf = publish_all(tree, [1, 2, 3, 4, 5, 6], 0)
    assert leaf.parent is not None
    tree.acquire(leaf.parent)
    tree.release(leaf, 1.0)
    tree.hold(leaf)
    published = tree.publish(leaf.parent, keys_of(range(1, 9)), 7, 2.0, tails=[ids([5, 6]).tobytes()])
    assert published.adopted and not published.freed
    tree.check([published.node])
    tree.seal()
    tree.check([published.node])
    assert tree.evict(9).page_ids == [1]


def test_the_second_to_publish_a_page_keeps_its_own() -> None:
    tree = index()
    first = publish_all(tree, [1, 2, 3, 4], 0)
    keys = keys_of([1, 2, 3, 4])
    root = tree.root(keys.root)
    tree.acquire(root)
    second = tree.publish(root, keys, 5, 1.0)
    assert second.node is first and not second.adopted and first.page_id == 0
    tree.check([first, first])


def test_an_incomplete_page_is_not_kept_beside_one_that_begins_with_it() -> None:
    tree = index()
    longer = publish_all(tree, [1, 2, 3, 4, 5, 6, 7], 0, positions={6})
    keys = keys_of([1, 2, 3, 4, 5, 6])
    assert longer.parent is not None
    tree.acquire(longer.parent)
    again = tree.publish_partial(longer.parent, ids([5, 6]).tobytes(), 9, 1.0)
    assert again.node is longer and not again.adopted
    # Pinned through the shorter one, the position cannot be lost with the longer one.
    tree.pin(again.node)
    tree.release(longer, 2.0)
    tree.release(again.node, 2.0)
    tree.evict(2)
    (mark,) = tree.match(keys, ids([1, 2, 3, 4, 5, 6])).marks
    assert mark.holder is longer
    tree.check([], [longer])


def test_pages_in_tables_stay_and_leaves_go_first() -> None:
    tree = index(num_host_pages=0)
    tip = publish_all(tree, [1, 2, 3, 4, 5, 6, 7, 8, 9], 0)
    assert tree.num_evictable == 0 and tree.evict(3).page_ids == []
    tree.release(tip, 1.0)
    assert tree.num_evictable == 3
    evicted = tree.evict(2)
    assert evicted.page_ids == [2, 1] and not evicted.spills
    assert set(evicted.lost) == {name_of(("", tuple(range(1, 10)))), name_of(("", tuple(range(1, 9))))}
    found = tree.match(keys_of([1, 2, 3, 4, 5, 6, 7, 8]), ids([1, 2, 3, 4, 5, 6, 7, 8]))
    assert len(found.nodes) == 1 and found.end == "evicted"
    tree.check([])


def test_pinned_pages_are_spilled_and_never_dropped() -> None:
    tree = index(num_host_pages=2)
    tip = publish_all(tree, [1, 2, 3, 4, 5, 6, 7, 8, 9], 0)
    tree.pin(tip)
    tree.release(tip, 1.0)
    assert tree.num_evictable == 2
    evicted = tree.evict(3)
    assert evicted.page_ids == [2, 1] and not evicted.lost
    assert tree.num_evictable == 0
    tree.check([], [tip])
    tree.unpin(tip)
    assert tree.num_evictable == 1 and tree.evict(1).page_ids == [0]
    tree.check([])


def test_what_a_copy_of_the_same_plan_reads_stays_until_the_plan_is_sealed() -> None:
    tree = index(num_host_pages=1)
    tip = publish_all(tree, [1, 2, 3, 4], 0)
    tree.release(tip, 1.0)
    tree.evict(1)
    tree.acquire(tip)
    ((host_page, _),) = tree.load(tip, [9])
    tree.release(tip, 2.0)
    assert tree.host.num_free == 0 and tree.evict(1).page_ids == []
    tree.check([])
    tree.seal()
    assert tree.evict(1).spills == [(9, host_page)]
    tree.check([])


def test_the_root_of_a_salt_goes_with_its_last_page() -> None:
    tree = index(num_host_pages=0)
    for i in range(50):
        tree.release(publish_all(tree, [1, 2, 3, 4], i, salt=f"salt {i}"), float(i))
    tree.evict(49)
    tree.check([])
    found = [bool(tree.match(keys_of([1, 2, 3, 4], f"salt {i}"), ids([1, 2, 3, 4])).nodes) for i in range(50)]
    assert found == [False] * 49 + [True]


def test_dropped_names_are_remembered_up_to_a_bound() -> None:
    tree = index(num_host_pages=0, num_ghosts=3)
    for i in range(6):
        tree.release(publish_all(tree, [i, 0, 0, 0], i), float(i))
    tree.evict(6)
    ends = [tree.match(keys_of([i, 0, 0, 0]), ids([i, 0, 0, 0])).end for i in range(6)]
    assert ends == ["cold"] * 3 + ["evicted"] * 3
    tree.check([])


def test_a_cached_million_tokens_are_matched_in_little_time(
    against_plain_python: Callable[[Callable[[], object]], float],
) -> None:
    num_pages, page_tokens = 4096, 256
    tree = PrefixIndex(page_tokens=page_tokens, page_bytes=1, num_host_pages=0, seconds_saved=lambda s, e: 1.0)
    tokens = np.random.default_rng(0).integers(0, 129280, num_pages * page_tokens, dtype=np.int32)
    keys = PageKeys(PageHasher(bytes(32), "", page_tokens), "", tokens)
    tip = tree.root(keys.root)
    tree.acquire(tip)
    for page_id in range(num_pages):
        tail = [tokens[page_id * page_tokens :][:9].tobytes()] if page_id % 100 == 0 else []
        tip = tree.publish(tip, keys, page_id, 0.0, tail).node
    again = PageKeys(PageHasher(bytes(32), "", page_tokens), "", tokens)
    found = tree.match(again, tokens)
    assert len(found.nodes) == found.num_on_device == num_pages and len(found.marks) == 41

    def hold() -> None:
        tree.acquire(tip)
        tree.release(tip, 0.0)

    for run in (lambda: tree.match(again, tokens), hold):
        ratio = against_plain_python(run)
        assert ratio < MOST, f"{ratio:.1f}"


def test_evictions_do_not_slow_down_with_the_number_of_pages() -> None:
    def seconds_for_500(num_pages: int) -> float:
        tree = PrefixIndex(page_tokens=P, page_bytes=1, num_host_pages=0, seconds_saved=lambda s, e: 1.0)
        for i in range(num_pages // 2):
            tree.release(publish_all(tree, [i % 50, i // 50, 0, 0, 1, 1, 1, 1], 2 * i, now=float(i)), float(i))
        start = time.thread_time()
        assert len(tree.evict(500).page_ids) == 500
        return time.thread_time() - start

    small, large = (min(seconds_for_500(n) for _ in range(3)) for n in (2000, 40000))
    assert large < 5 * small + 0.001, (small, large)
