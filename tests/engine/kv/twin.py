"""The prefix index beside dictionaries keyed by whole prefixes, on a device whose pages hold what was written."""

import random
from dataclasses import dataclass, field

from kv.trees import HALF_LIFE, P, Prefix, ids, index, keys_of, name_of, seconds_saved

from engine.kv.hashing import PageKeys
from engine.kv.prefix_index import Published
from engine.kv.prefix_node import Node


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
