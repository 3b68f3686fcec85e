"""The prefix index against dictionaries keyed by whole prefixes, on a device whose pages hold what was written."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from engine.kv.hashing import PageHasher, PageKeys
from engine.kv.prefix_index import PrefixIndex, Published
from engine.kv.prefix_node import Node

P = 4
MOST = 4
"""Plain loops that a match, or holding a path and letting go, may cost: measured 1.2 to 1.6."""
HALF_LIFE = 30.0
HASHER = PageHasher(bytes(32), "test", P)

Prefix = tuple[str, tuple[int, ...]]
"""Salt and tokens: names a page (by the prefix that it ends) or a position."""


def seconds_saved(start: int, end: int) -> float:
    return (end - start) * (1.0 + end / 10)


def index(num_host_pages: int = 8, **more: int) -> PrefixIndex:
    return PrefixIndex(
        page_tokens=P,
        page_bytes=100,
        num_host_pages=num_host_pages,
        seconds_saved=seconds_saved,
        half_life_seconds=HALF_LIFE,
        **more,
    )


def ids(tokens: Sequence[int]) -> np.ndarray:
    return np.asarray(tokens, dtype=np.int32)


def keys_of(tokens: Sequence[int], salt: str = "") -> PageKeys:
    return PageKeys(HASHER, salt, ids(tokens))


def name_of(prefix: Prefix) -> bytes:
    """Key of a node or position."""
    salt, tokens = prefix
    keys, rest = keys_of(tokens, salt), tokens[len(tokens) // P * P :]
    return (keys.keys[-1] if keys.keys else keys.root) + ids(rest).tobytes()


def publish_all(
    tree: PrefixIndex,
    tokens: list[int],
    first_page: int,
    *,
    now: float = 0.0,
    salt: str = "",
    positions: frozenset[int] | set[int] = frozenset(),
) -> Node:
    """Publish every page of `tokens` as the pages first_page, first_page + 1, ...; returns the acquired tip.

    `positions` of the last, incomplete page can be resumed at.
    """
    keys = keys_of(tokens, salt)
    tip = tree.root(keys.root)
    tree.acquire(tip)
    for i in range(len(keys.keys)):
        tip = tree.publish(tip, keys, first_page + i, now).node
    rest = tokens[len(keys.keys) * P :]
    if rest:
        tails = [ids(rest[: p - len(tokens) + len(rest)]).tobytes() for p in positions]
        tip = tree.publish_partial(tip, ids(rest).tobytes(), first_page + len(keys.keys), now, tails).node
    return tip


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


@dataclass(eq=False)
class Page:
    """The twin's record of a cached page."""

    prefix: Prefix
    device: int | None
    host: int | None = None
    born: float = 0.0
    uses: list[float] = field(default_factory=list)
    tails: set[Prefix] = field(default_factory=set)

    @property
    def parent(self) -> Prefix:
        salt, tokens = self.prefix
        return salt, tokens[: (len(tokens) - 1) // P * P]

    @property
    def is_leaf_kind(self) -> bool:
        return len(self.prefix[1]) % P > 0

    def is_before(self, tip: Prefix) -> bool:
        """Whether the page is on the path to `tip`, its last page included."""
        salt, tokens = self.prefix
        on_the_way = not self.is_leaf_kind and salt == tip[0] and tip[1][: len(tokens)] == tokens
        return on_the_way or self.prefix == tip

    def value(self, now: float) -> float:
        end = len(self.prefix[1])
        return sum(2.0 ** ((t - now) / HALF_LIFE) for t in self.uses) * seconds_saved(len(self.parent[1]), end)


@dataclass(eq=False)
class Running:
    """One request as a manager would keep it."""

    salt: str
    tokens: list[int]
    committed: int
    table: list[int]
    tip: Node
    tip_prefix: Prefix
    keys: PageKeys
    positions: set[int]
    private: set[int] = field(default_factory=set)

    def prefix(self, end: int) -> Prefix:
        return self.salt, tuple(self.tokens[:end])


class World:
    """Requests, a device that holds rows as prefixes, the index, and a twin of the index made of dictionaries."""

    def __init__(self, seed: int, num_pages: int, num_host_pages: int) -> None:
        self.rng = random.Random(seed)
        self.tree = index(num_host_pages)
        self.num_pages, self.num_host_pages = num_pages, num_host_pages
        self.free = list(range(num_pages))
        self.now = 0.0
        self.pages: dict[Prefix, Page] = {}
        self.tails: dict[Prefix, Page] = {}
        self.ghosts: set[Prefix] = set()
        self.running: list[Running] = []
        self.asleep: list[tuple[Prefix, Prefix, Node]] = []
        """What was computed, the pinned page and its node."""
        self.history: list[Prefix] = []
        self.device_rows: dict[int, Prefix] = {}
        self.host_rows: dict[int, Prefix] = {}
        self.loading_host: set[int] = set()
        self.held: list[Prefix] = []
        self.spills: list[tuple[int, int]] = []
        self.loads: list[tuple[int, int]] = []
        self.copies: list[tuple[int, int]] = []
        self.counts = dict.fromkeys(("hits", "loads", "copies", "spills", "drops", "wakes", "retired", "same"), 0)

    # What the twin says.

    def in_tables(self, page: Page) -> bool:
        return any(page.is_before(tip) for tip in (*self.held, *(request.tip_prefix for request in self.running)))

    def pinned(self, page: Page) -> bool:
        return any(page.is_before(prefix) for _, prefix, _ in self.asleep)

    def children(self, prefix: Prefix) -> list[Page]:
        return [page for page in self.pages.values() if page.parent == prefix]

    def device_victims(self) -> list[Page]:
        return [
            page
            for page in self.pages.values()
            if page.device is not None
            and not self.in_tables(page)
            and all(child.device is None for child in self.children(page.prefix))
        ]

    def host_victims(self) -> list[Page]:
        return [
            page
            for page in self.pages.values()
            if page.host is not None and not (self.in_tables(page) or self.pinned(page) or self.children(page.prefix))
        ]

    def free_host(self) -> list[int]:
        used = {page.host for page in self.pages.values()} | self.loading_host
        return [i for i in range(self.num_host_pages) if i not in used]

    def drop(self, page: Page) -> set[bytes]:
        del self.pages[page.prefix]
        for tail in page.tails:
            del self.tails[tail]
        lost = {name_of(tail) for tail in page.tails}
        if not page.is_leaf_kind:
            self.ghosts.add(page.prefix)
            lost.add(name_of(page.prefix))
        self.counts["drops"] += 1
        return lost

    def match(self, salt: str, tokens: list[int]) -> tuple[list[Page], list[tuple[int, Page]], str | None]:
        nodes: list[Page] = []
        while (len(nodes) + 1) * P <= len(tokens) and (salt, tuple(tokens[: (len(nodes) + 1) * P])) in self.pages:
            nodes.append(self.pages[salt, tuple(tokens[: (len(nodes) + 1) * P])])
        marks = []
        for position in range(1, min(len(tokens), len(nodes) * P + P - 1) + 1):
            holder = self.tails.get((salt, tuple(tokens[:position])))
            if holder is not None:
                marks.append((position, nodes[position // P] if position // P < len(nodes) else holder))
        end: str | None = None
        if (len(nodes) + 1) * P <= len(tokens) and not (marks and marks[-1][0] > len(nodes) * P):
            first = tuple(tokens[:P])
            if (salt, tuple(tokens[: (len(nodes) + 1) * P])) in self.ghosts:
                end = "evicted"
            elif nodes:
                end = "diverged" if self.children(nodes[-1].prefix) else None
            else:
                end = "salt" if any(t == first for _, t in self.pages) else "cold"
        return nodes, marks, end

    def num_evictable(self) -> int:
        idle = [p for p in self.pages.values() if p.device is not None and not self.in_tables(p)]
        idle_pinned = sum(self.pinned(p) for p in idle)
        droppable = [p for p in self.pages.values() if p.host is not None and not self.in_tables(p)]
        room = len(self.free_host()) + sum(not self.pinned(p) for p in droppable)
        return len(idle) - idle_pinned + min(idle_pinned, room)

    # What is done to both.

    def evict(self, count: int) -> None:
        expected_pages, expected_lost = [], set()
        evicted = self.tree.evict(count)
        spills = iter(evicted.spills)
        while len(expected_pages) < count:
            victims = sorted(self.device_victims(), key=lambda page: page.value(self.now))
            done = None
            for page in victims:
                room, others = self.free_host(), self.host_victims()
                cheapest = min(others, key=lambda other: other.value(self.now), default=None)
                disposable = not self.children(page.prefix) and not self.pinned(page)
                if (
                    not room
                    and cheapest is not None
                    and not (disposable and page.value(self.now) <= cheapest.value(self.now))
                ):
                    expected_lost |= self.drop(cheapest)
                    room = self.free_host()
                done = page
                expected_pages.append(page.device)
                if room:
                    from_page, to_page = next(spills)
                    assert from_page == page.device and to_page in room
                    page.device, page.host = None, to_page
                    self.counts["spills"] += 1
                elif disposable:
                    expected_lost |= self.drop(page)
                else:
                    expected_pages.pop()
                    done = None
                    continue
                break
            if done is None:
                break
        assert evicted.page_ids == expected_pages
        assert set(evicted.lost) == expected_lost and len(evicted.lost) == len(expected_lost)
        assert next(spills, None) is None
        self.spills += evicted.spills
        self.free += evicted.page_ids

    def take(self, count: int) -> list[int] | None:
        available = len(self.free) + self.tree.num_evictable
        if count > available:
            return None
        if count > len(self.free):
            self.evict(count - len(self.free))
        assert len(self.free) >= count, "num_evictable promised more than evict gave"
        return [self.free.pop(self.rng.randrange(len(self.free))) for _ in range(count)]

    def used(self, tip: Prefix) -> None:
        self.now += self.rng.uniform(0.001, 0.01)  # No two pages of one size are worth the same.
        for page in self.pages.values():
            if page.is_before(tip):
                page.uses.append(self.now)

    def new_prompt(self) -> Prefix:
        salt = self.rng.choice(["", "", "b"])
        tokens: tuple[int, ...] = ()
        if self.history and self.rng.random() < 0.8:
            old_salt, tokens = self.rng.choice(self.history[-12:])
            salt = old_salt if self.rng.random() < 0.9 else salt
            if self.rng.random() < 0.4:
                tokens = tokens[: self.rng.randrange(len(tokens) + 1)]
        return salt, tokens + tuple(self.rng.randrange(3) for _ in range(self.rng.randint(1, 7)))

    def probe(self, salt: str, tokens: list[int]) -> None:
        found = self.tree.match(keys_of(tokens, salt), ids(tokens))
        nodes, marks, end = self.match(salt, tokens)
        assert [n.page_id for n in found.nodes] == [p.device for p in nodes]
        assert [n.host_page for n in found.nodes] == [p.host for p in nodes]
        assert found.num_on_device == sum(p.device is not None for p in nodes)
        assert [(m.position, m.holder.page_id, m.holder.host_page) for m in found.marks] == [
            (position, page.device, page.host) for position, page in marks
        ]
        assert [m.key for m in found.marks] == [name_of((salt, tuple(tokens[:position]))) for position, _ in marks]
        assert found.end == end

    def start(self, salt: str, tokens: list[int], must_resume_at: int | None = None) -> bool:
        """Admit a request at a random resumable position (or a given one)."""
        self.probe(salt, tokens)
        keys = keys_of(tokens, salt)
        found = self.tree.match(keys, ids(tokens))
        choices = [m.position for m in found.marks] + [P * (i + 1) for i in range(len(found.nodes))]
        choices = [c for c in choices if c < len(tokens)] + [0]
        resume_at = max(choices) if self.rng.random() < 0.7 else self.rng.choice(choices)
        if must_resume_at is not None:
            assert must_resume_at == 0 or must_resume_at in choices, "a pinned position was lost"
            resume_at = must_resume_at
        depth = resume_at // P
        tip = found.nodes[depth - 1] if depth else self.tree.root(keys.root)
        source = next((m.holder for m in found.marks if m.position == resume_at), None)
        request = Running(salt, list(tokens), resume_at, [], tip, (salt, tuple(tokens[: depth * P])), keys, {resume_at})
        self.tree.acquire(tip)
        self.running.append(request)
        source_page = None
        if source is not None:
            self.tree.hold(source)
            source_page = next(p for p in self.pages.values() if name_of(p.prefix) == source.key)
            self.held.append(source_page.prefix)
        wanted = len(found.nodes[found.num_on_device : depth]) + (source is not None)
        taken = self.take(wanted)
        if taken is None:
            self.running.remove(request)
            self.used(request.tip_prefix)
            self.tree.release(tip, self.now)
            return False
        absent = [page for page in self.match(salt, tokens)[0][:depth] if page.device is None]
        if absent:
            copies = self.tree.load(tip, taken[: len(absent)])
            assert copies == [(page.host, page_id) for page, page_id in zip(absent, taken, strict=False)]
            self.held.append(request.tip_prefix)
            self.loads += copies
            for page, (host_page, page_id) in zip(absent, copies, strict=True):
                page.device, page.host = page_id, None
                self.loading_host.add(host_page)
                self.counts["loads"] += 1
        request.table += [node.page_id for node in found.nodes[:depth] if node.page_id is not None]
        assert len(request.table) == depth
        if source is not None:
            request.private.add(depth)
            request.table.append(taken[-1])
            if source.page_id is None:
                assert source.host_page is not None
                self.loads.append((source.host_page, taken[-1]))
            else:
                self.copies.append((source.page_id, taken[-1]))
            self.counts["copies"] += 1
        self.counts["hits"] += resume_at > 0
        return True

    def run_step(self) -> None:
        """Give running requests pages, run the plan on the device, commit and publish."""
        rows: list[tuple[Running, int]] = []
        for request in self.rng.sample(self.running, self.rng.randint(0, len(self.running))):
            end = min(len(request.tokens), request.committed + self.rng.randint(1, 6))
            taken = self.take(-(-end // P) - len(request.table))
            if taken is not None:
                request.private |= set(range(len(request.table), len(request.table) + len(taken)))
                request.table += taken
                rows.append((request, end))
        self.tree.check([r.tip for r in self.running], [node for _, _, node in self.asleep])
        self.tree.seal()
        self.held, self.loading_host = [], set()
        for source, target in self.spills:
            self.host_rows[target] = self.device_rows[source]
        for source, target in self.loads:
            self.device_rows[target] = self.host_rows[source]
        for source, target in self.copies:
            self.device_rows[target] = self.device_rows[source]
        self.spills, self.loads, self.copies = [], [], []
        for request in self.running:
            self.read(request, request.committed)
        for request, end in rows:
            for i in range(request.committed // P, -(-end // P)):
                assert i in request.private, "a shared page is written"
                self.device_rows[request.table[i]] = request.prefix(min(end, (i + 1) * P))
            if self.rng.random() < 0.3:
                request.positions.add(end)
            self.commit(request, end)

    def read(self, request: Running, end: int) -> None:
        """Every row that attention would read is the request's own or one of an equal prefix."""
        for i in range(-(-end // P)):
            salt, tokens = self.device_rows[request.table[i]]
            row_end = min(end, (i + 1) * P)
            assert (salt, tokens[:row_end]) == request.prefix(row_end), "rows of another prefix"

    def commit(self, request: Running, end: int) -> None:
        before, request.committed = request.committed, end
        if end == len(request.tokens):
            request.tokens.append(self.rng.randrange(3))
            request.keys.extend(ids(request.tokens))
        for i in range(before // P, end // P):
            tails = [p for p in request.positions if i * P < p < (i + 1) * P]
            published = self.tree.publish(
                request.tip, request.keys, request.table[i], self.now, [self.tail(request, p) for p in tails]
            )
            self.published(request, i, (i + 1) * P, tails, published)

    def tail(self, request: Running, position: int) -> bytes:
        return ids(request.tokens[position // P * P : position]).tobytes()

    def published(self, request: Running, i: int, end: int, positions: list[int], published: Published) -> None:
        prefix, freed = request.prefix(end), []
        page = self.tails.get(prefix) if end % P else self.pages.get(prefix)
        unread = page is not None and not self.in_tables(page)
        request.tip, request.tip_prefix = published.node, prefix if page is None else page.prefix
        if page is None or (page.device is None and page.prefix == prefix):
            assert published.adopted
            request.private.discard(i)
            if page is None:
                page = self.pages[prefix] = Page(prefix, request.table[i], born=self.now)
                self.ghosts.discard(prefix)
            else:
                assert page.host is not None
                self.loading_host.add(page.host)
                page.device, page.host = request.table[i], None
                self.counts["same"] += 1
        elif page.prefix == prefix and unread:
            # An equal page that nobody reads makes room for the one in the table.
            assert published.adopted and page.device is not None
            request.private.discard(i)
            freed.append(page.device)
            page.device = request.table[i]
            self.counts["same"] += 1
        else:
            assert not published.adopted
            self.counts["same"] += 1
        for position in positions:
            name = request.prefix(position)
            holder = self.tails.setdefault(name, page)
            if holder is page:
                page.tails.add(name)
            elif holder.prefix == name and not self.in_tables(holder) and not self.pinned(holder):
                for tail in holder.tails:
                    self.tails[tail] = page
                page.tails |= holder.tails
                holder.tails = set()
                freed += [] if holder.device is None else [holder.device]
                self.drop(holder)
                self.counts["retired"] += 1
        assert published.freed == freed
        self.free += freed

    def finish(self, request: Running, *, publish: bool, sleep: bool = False) -> None:
        end, start = request.committed, request.committed // P * P
        if publish and end > start:
            tails = [p for p in request.positions if start < p < end]
            published = self.tree.publish_partial(
                request.tip,
                self.tail(request, end),
                request.table[start // P],
                self.now,
                [self.tail(request, p) for p in tails],
            )
            self.published(request, start // P, end, [*tails, end], published)
        if sleep:
            self.tree.pin(request.tip)
            self.asleep.append((request.prefix(end), request.tip_prefix, request.tip))
        self.used(request.tip_prefix)
        self.running.remove(request)
        self.tree.release(request.tip, self.now)
        self.free += [request.table[i] for i in request.private]
        self.history.append(request.prefix(end))

    def wake(self) -> None:
        sleeper = self.rng.choice(self.asleep)
        (salt, tokens), _, tip = sleeper
        if self.start(salt, [*tokens, 1], must_resume_at=len(tokens)):
            self.asleep.remove(sleeper)
            self.tree.unpin(tip)
            self.counts["wakes"] += 1

    def check(self) -> None:
        self.tree.check([r.tip for r in self.running], [node for _, _, node in self.asleep])
        assert len(self.tree) == len(self.pages)
        assert self.tree.num_evictable == self.num_evictable()
        assert self.tree.num_device_pages == sum(page.device is not None for page in self.pages.values())
        private = sum(len(request.private) for request in self.running)
        assert len(self.free) + private + self.tree.num_device_pages == self.num_pages, "pages are lost"


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_agrees_with_dictionaries(seed: int) -> None:
    rng = random.Random(1000 + seed)
    world = World(seed, num_pages=rng.choice([12, 24, 40]), num_host_pages=rng.choice([0, 3, 10, 40]))
    for _ in range(250):
        world.now += rng.expovariate(0.3)
        for _ in range(rng.randint(0, 2)):
            salt, tokens = world.new_prompt()
            if len(world.running) < 6:
                world.start(salt, list(tokens))
            else:
                world.probe(salt, list(tokens))
        if world.asleep and rng.random() < 0.3:
            world.wake()
        if rng.random() < 0.1:
            world.evict(rng.randint(1, 4))
        world.run_step()
        world.check()
        for request in list(world.running):
            if rng.random() < 0.12:
                sleep = rng.random() < 0.2 and len(world.asleep) < 3
                world.finish(request, publish=sleep or rng.random() < 0.8, sleep=sleep)
                world.check()
    while world.running:
        world.finish(world.running[0], publish=True)
    for _, _, tip in world.asleep:
        world.tree.unpin(tip)
    world.asleep = []
    world.check()
    world.evict(world.num_pages)
    assert len(world.free) == world.num_pages and world.tree.num_device_pages == 0
    assert all(world.counts[name] > 5 for name in ("hits", "copies", "drops")), world.counts
    if world.num_host_pages:
        assert world.counts["spills"] > 5, world.counts


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
