"""Which prefixes are cached, and where: a tree of pages found through one dictionary.

    root(salt) -- page -- page -- page -- page                    full pages, key = hash of the whole prefix
                              \\-- page -- page (n < 256 tokens)   an incomplete last page is a leaf with its own tokens

Along every path pages on the device come first, then pages in host memory: a page is never there without the pages
before it, and both spilling and dropping begin at the leaves. A table that runs through a node protects it. Copies
ordered in the step being planned hold what they read until `seal`, because a plan spills first, then loads, then
copies: whatever a load or a copy reads must not be given away in the same plan.

The index owns the host pages. Device pages belong to it once published; the caller's pool gets them back from `Evicted`
and `Published`. No clocks, no randomness: the same calls give the same books.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np

from engine.kv.hashing import PageKeys
from engine.kv.idle_pages import IdlePages
from engine.kv.misses import Match, MissMemory
from engine.kv.page_pool import PagePool
from engine.kv.prefix_node import TOKEN_BYTES, Mark, Node, count_paths
from engine.kv.victims import Evicted, VictimHeap, fade, rank_of


class Published(NamedTuple):
    node: Node
    """The caller's table now runs through it."""
    adopted: bool
    """Whether the index has taken the page; otherwise an equal one was there and the caller keeps its own."""
    freed: list[int]
    """Device pages of leaves that the new page has made superfluous."""


class PrefixIndex:
    """Nodes by key, their places, and the order in which they go."""

    def __init__(
        self,
        *,
        page_tokens: int,
        page_bytes: int,
        num_host_pages: int,
        seconds_saved: Callable[[int, int], float],
        half_life_seconds: float = 600.0,
        num_ghosts: int = 65536,
    ) -> None:
        """`seconds_saved(start, end)` is what computing these tokens again would take; `num_ghosts` dropped pages are
        remembered by name to explain misses.
        """
        self.page_tokens = page_tokens
        self.host = PagePool(num_host_pages)
        self._page_bytes = page_bytes
        self._seconds_saved = seconds_saved
        self._half_life = half_life_seconds
        self._roots: dict[bytes, Node] = {}
        self._nodes: dict[bytes, Node] = {}
        self._misses = MissMemory(num_ghosts)
        tickets = count(1)
        self._device_victims = VictimHeap[Node](lambda node: node.may_leave_device, tickets)
        self._host_victims = VictimHeap[Node](lambda node: node.may_be_dropped, tickets)
        self._held: list[Node] = []
        self._unsealed_host_pages: list[int] = []
        self._num_on_device = 0
        self._idle = IdlePages()

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def num_device_pages(self) -> int:
        """Device pages that the index owns, those in tables included."""
        return self._num_on_device

    @property
    def num_evictable(self) -> int:
        """Device pages that `evict` can free now: in no table, and pinned ones only where host memory has room."""
        return self._idle.num_evictable(self.host.num_free)

    @property
    def num_stuck(self) -> int:
        """Device pages that stay there for their pins alone: host memory has no room for them."""
        return self._idle.num_stuck(self.host.num_free)

    def num_evictable_beside(self, nodes: Iterable[Node]) -> int:
        """`num_evictable` once a table runs through these nodes and all before them, which are among them."""
        return self._idle.beside(nodes).num_evictable(self.host.num_free)

    def root(self, key: bytes) -> Node:
        """The node of an empty prefix; acquire it before anything is published below it."""
        node = self._roots.get(key)
        if node is None:
            node = self._roots[key] = Node(key, None)
        return node

    def match(self, keys: PageKeys, token_ids: np.ndarray) -> Match:
        """Walk down as far as pages are there; `token_ids` int32 [num_tokens] are the tokens that `keys` name."""
        assert token_ids.dtype == np.dtype("<i4")
        root = self._roots.get(keys.root)
        nodes: list[Node] = []
        bases = [root] if root is not None else []
        find = self._nodes.get
        for key in keys.keys if root is not None else ():
            node = find(key)
            if node is None:
                break
            nodes.append(node)
            if node.tails.by_length:
                bases.append(node)
        marks: list[Mark] = []
        for base in bases:
            marks += self._marks_in(base, nodes, token_ids)
        num_on_device = bisect_left(nodes, True, key=lambda node: node.page_id is None)
        goes_on = bool(marks) and marks[-1].position > len(nodes) * self.page_tokens
        return Match(nodes, num_on_device, marks, None if goes_on else self._misses.explain(nodes, keys))

    def has(self, key: bytes, tail: bytes) -> bool:
        """Whether a page holds the position that is named by a full prefix and the tokens after it."""
        base = self._nodes.get(key) or self._roots.get(key)
        return base is not None and (not tail or base.tails.holder(tail) is not None)

    def acquire(self, tip: Node) -> None:
        """A table runs through `tip` and all before it: none of them is evicted until `release`."""
        node: Node | None = tip
        while node is not None:
            if not node.refs:
                self._idle.count(node, -1)
            node.refs += 1
            node.hits += 1
            node = node.parent

    def release(self, tip: Node, now: float) -> None:
        """The table is gone. This is the moment that counts as the use of its pages."""
        node: Node | None = tip
        last_use, faded = now, 1.0
        while node is not None:
            if node.last_use != last_use:
                last_use = node.last_use
                faded = fade(1.0, last_use, now, self._half_life)
            node.uses = node.uses * faded + 1.0
            node.last_use = now
            node.refs -= 1
            if not node.refs:
                self._idle.count(node, 1)
                if not node.num_device_children:
                    self._offer(node)
            assert node.refs >= 0, "a table is released twice"
            last, node = node, node.parent
        self._forget_idle_root(last)

    def pin(self, tip: Node) -> None:
        """Keep `tip` and all before it somewhere until `unpin`; they may be spilled, never dropped."""
        self._repin(tip, 1)

    def unpin(self, tip: Node) -> None:
        self._repin(tip, -1)

    def hold(self, node: Node) -> None:
        """A copy in the step being planned reads the node's page; nothing moves it before `seal`."""
        for before in node.path():
            if not before.refs:
                self._idle.count(before, -1)
            before.refs += 1
        self._held.append(node)

    def load(self, tip: Node, page_ids: Sequence[int]) -> list[tuple[int, int]]:
        """Bring all host pages on the way to `tip`, which is in a table, to the device pages `page_ids`.

        Returns (host page, page) copies for the step being planned, in the order of the pages. Host pages are free
        again after `seal`, and until then nothing moves what is loaded.
        """
        assert tip.refs > 0
        absent: list[Node] = []
        for node in tip.path():
            if node.host_page is None:
                break
            absent.append(node)
        absent.reverse()
        copies = []
        for node, page_id in zip(absent, page_ids, strict=True):
            assert node.host_page is not None
            copies.append((node.host_page, page_id))
            self._unsealed_host_pages.append(node.host_page)
            self._move_to_device(node, page_id)
        self.hold(tip)
        return copies

    def seal(self) -> None:
        """The plan is complete: what its copies read may go from the next plan on."""
        held, self._held = self._held, []
        for tip in held:
            for node in tip.path():
                node.refs -= 1
                if not node.refs:
                    self._idle.count(node, 1)
                    if not node.num_device_children:
                        self._offer(node)
            self._forget_idle_root(node)
        self.host.free(self._unsealed_host_pages)
        self._unsealed_host_pages = []

    def publish(self, parent: Node, keys: PageKeys, page_id: int, now: float, tails: Iterable[bytes] = ()) -> Published:
        """Enter the full page after `parent`, which ends the caller's table so far; the table then ends with the node.

        Only rows of committed steps are published (T8). `tails` are beginnings of the page's tokens (int32 bytes) at
        which somebody may resume.
        """
        published = self._publish(parent, keys.keys[parent.depth], b"", page_id, now, tails)
        self._misses.entered(published.node, keys)
        return published

    def publish_partial(
        self, parent: Node, tokens: bytes, page_id: int, now: float, tails: Iterable[bytes] = ()
    ) -> Published:
        """Enter an incomplete last page with its own tokens (int32 bytes): a leaf, resumed by copying.

        Where another page that begins with these tokens already stands for their end, the table ends with that one.
        """
        assert 0 < len(tokens) < TOKEN_BYTES * self.page_tokens and not len(tokens) % TOKEN_BYTES
        return self._publish(parent, parent.key + tokens, tokens, page_id, now, (*tails, tokens))

    def evict(self, num_pages: int) -> Evicted:
        """Free device pages, least value first: to host memory where there is room or something of less value, else
        away. Returns fewer than `num_pages` only when no more can go (`num_evictable`).
        """
        evicted = Evicted()
        stuck: list[Node] = []
        while len(evicted.page_ids) < num_pages:
            node = self._device_victims.pop()
            if node is None:
                break
            host_page = self._host_page_for(node, evicted)
            if host_page is not None:
                self._spill(node, host_page, evicted)
            elif not node.num_children and not node.pins:
                self._drop(node, evicted)
            else:
                stuck.append(node)
        for node in stuck:
            self._offer(node)
        return evicted

    def discard(self, host_pages: set[int], page_ids: set[int]) -> Evicted:
        """Drop the pages in these places, whose content was lost, and all that follow them. None is in a table."""
        evicted = Evicted()
        lost = [n for n in self._nodes.values() if n.host_page in host_pages or n.page_id in page_ids]
        roots = set(lost)
        below = [n for n in self._nodes.values() if any(before in roots for before in n.path())]
        for node in sorted(below, key=lambda n: -n.depth):
            self._drop(node, evicted)
        return evicted

    def device_pages(self) -> set[int]:
        """Device pages that the index owns; for checks."""
        return {node.page_id for node in self._nodes.values() if node.page_id is not None}

    def check(self, tips: Iterable[Node], pinned: Iterable[Node] = ()) -> None:
        """Recompute the books from the tips of all tables and pins; AssertionError names the first lie."""
        nodes = [*self._roots.values(), *self._nodes.values()]
        refs, pins = count_paths([*tips, *self._held]), count_paths(pinned)
        children, on_device = dict.fromkeys(nodes, 0), dict.fromkeys(nodes, 0)
        for key, node in self._nodes.items():
            parent = node.parent
            assert parent in children and node.key == key and not parent.tokens, "a page hangs from nothing"
            assert (node.page_id is None) != (node.host_page is None), "a page has no place, or two"
            assert node.page_id is None or parent.parent is None or parent.page_id is not None, "a prefix is not there"
            assert node.key == parent.key + node.tokens or not node.tokens
            children[parent] += 1
            on_device[parent] += node.page_id is not None
            assert all(parent.tails.holder(tail) is node for tail in node.held_tails), "a tail has another page"
        for node in nodes:
            assert node.refs == refs.get(node, 0), f"{node.refs} tables and copies counted, {refs.get(node, 0)} found"
            assert node.pins == pins.get(node, 0), "pins are wrong"
            assert (node.num_children, node.num_device_children) == (children[node], on_device[node])
            assert all(h.parent is node and tail in h.held_tails for tail, h in node.tails), "a tail is lost"
        assert all(root.refs or root.pins or root.num_children for root in self._roots.values()), "an idle root stays"
        device = [n.page_id for n in self._nodes.values() if n.page_id is not None]
        assert len(set(device)) == len(device) == self._num_on_device
        host = [n.host_page for n in self._nodes.values() if n.host_page is not None] + self._unsealed_host_pages
        assert len(set(host)) == len(host), "a host page has two owners"
        self.host.check(set(host))
        self._idle.check(self._nodes.values())
        for heap, victims in (
            (self._device_victims, {n for n in nodes if n.may_leave_device}),
            (self._host_victims, {n for n in nodes if n.may_be_dropped}),
        ):
            assert {node for _, node in heap.live()} == victims, "a victim is in no heap"
        self._misses.check(list(self._nodes.values()))

    def _marks_in(self, base: Node, nodes: list[Node], token_ids: np.ndarray) -> list[Mark]:
        """Tails of `base` with which the prompt goes on."""
        start = base.depth * self.page_tokens
        after = token_ids[start : start + self.page_tokens].tobytes()
        next_node = nodes[base.depth] if base.depth < len(nodes) else None
        return [
            Mark(start + len(tail) // TOKEN_BYTES, base.key + tail, next_node or holder)
            for tail, holder in base.tails.matching(after)
        ]

    def _publish(
        self, parent: Node, key: bytes, tokens: bytes, page_id: int, now: float, tails: Iterable[bytes]
    ) -> Published:
        assert parent.refs > 0 and not parent.tokens, "a page is published where no table ends"
        assert parent.parent is None or parent.page_id is not None
        # An incomplete page is not kept beside one that begins with the same tokens: a position has one holder.
        node = parent.tails.holder(tokens) if tokens else self._nodes.get(key)
        adopted, freed = False, Evicted()
        if node is None:
            node = self._nodes[key] = Node(key, parent, tokens)
            node.page_id, node.last_use, adopted = page_id, now, True
            parent.num_children += 1
            parent.num_device_children += 1
            self._num_on_device += 1
        elif not node.refs:
            self._idle.count(node, -1)
            if node.page_id is not None and node.key == key:
                # Nobody reads the page that is there: an equal one in a table takes its place, and memory is not
                # held twice.
                freed.page_ids.append(node.page_id)
                node.page_id, adopted = page_id, True
        node.refs += 1
        if node.page_id is None and node.key == key:
            assert node.host_page is not None
            self.host.free([node.host_page])
            self._move_to_device(node, page_id)
            adopted = True
        for tail in tails:
            self._add_tail(parent, tail, node, freed)
        return Published(node, adopted, freed.page_ids)

    def _add_tail(self, base: Node, tail: bytes, node: Node, freed: Evicted) -> None:
        """Let `node` hold a position. An idle leaf that ends there is superfluous then: its rows are in `node` too."""
        holder = base.tails.holder(tail)
        if holder is None:
            base.tails.put(tail, node)
        elif holder is not node and holder.tokens == tail and not holder.refs and not holder.pins:
            for held in list(holder.held_tails):
                base.tails.put(held, node)
            self._drop(holder, freed)

    def _move_to_device(self, node: Node, page_id: int) -> None:
        """The caller gives the host page back."""
        parent = node.parent
        assert node.refs and parent is not None
        node.page_id, node.host_page = page_id, None
        parent.num_device_children += 1
        self._num_on_device += 1

    def _host_page_for(self, node: Node, evicted: Evicted) -> int | None:
        """A place, if need be that of a page dropped for it; None when there is none or the node is worth less."""
        if not self.host.num_free:
            lowest = self._host_victims.lowest()
            if lowest is None:
                return None
            rank, victim = lowest
            if not node.num_children and not node.pins and self._rank(node) <= rank:
                return None
            self._drop(victim, evicted)
        return self.host.allocate(1)[0]

    def _spill(self, node: Node, host_page: int, evicted: Evicted) -> None:
        page_id, parent = node.page_id, node.parent
        assert page_id is not None and parent is not None and not node.refs
        self._idle.count(node, -1)
        node.page_id, node.host_page = None, host_page
        self._idle.count(node, 1)
        parent.num_device_children -= 1
        self._num_on_device -= 1
        evicted.spills.append((page_id, host_page))
        evicted.page_ids.append(page_id)
        self._offer(node)
        self._offer(parent)

    def _drop(self, node: Node, evicted: Evicted) -> None:
        parent = node.parent
        assert parent is not None and not node.refs and not node.pins and not node.num_children
        self._idle.count(node, -1)
        del self._nodes[node.key]
        parent.num_children -= 1
        if node.page_id is not None:
            parent.num_device_children -= 1
            self._num_on_device -= 1
            evicted.page_ids.append(node.page_id)
        else:
            assert node.host_page is not None
            self.host.free([node.host_page])
        node.page_id = node.host_page = None
        for tail in list(node.held_tails):
            parent.tails.remove(tail)
            evicted.lost.append(parent.key + tail)
        if not node.tokens:
            evicted.lost.append(node.key)
            self._misses.dropped(node)
        self._offer(parent)
        self._forget_idle_root(parent)

    def _repin(self, tip: Node, change: int) -> None:
        for node in tip.path():
            self._idle.count(node, -1)
            node.pins += change
            assert node.pins >= 0, "a pin is taken off twice"
            self._idle.count(node, 1)
        self._offer(tip)
        self._forget_idle_root(node)

    def _forget_idle_root(self, root: Node) -> None:
        if root.parent is None and not (root.refs or root.pins or root.num_children):
            self._roots.pop(root.key, None)

    def _offer(self, node: Node) -> None:
        if node.may_leave_device:
            self._device_victims.offer(node, self._rank(node))
        elif node.may_be_dropped:
            self._host_victims.offer(node, self._rank(node))

    def _rank(self, node: Node) -> float:
        end = node.depth * self.page_tokens
        start = end - self.page_tokens
        if node.tokens:
            end = start + len(node.tokens) // TOKEN_BYTES
        seconds_per_byte = self._seconds_saved(start, end) / self._page_bytes
        return rank_of(node.uses, node.last_use, seconds_per_byte, self._half_life)
