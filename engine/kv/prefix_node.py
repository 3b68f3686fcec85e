"""One cached page in the tree of prefixes, and the positions inside pages."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

TOKEN_BYTES = 4


class Node:
    """A page and the prefix that it ends. A root stands for an empty prefix and has no page.

    A full page's key is its hash. An incomplete last page is a leaf that keeps its own tokens; its key is the parent's
    key followed by them. In the same way `key + tail` names any position inside the page that follows a node.
    """

    __slots__ = (
        "depth",
        "held_tails",
        "hits",
        "host_page",
        "key",
        "last_use",
        "num_children",
        "num_device_children",
        "page_id",
        "parent",
        "pins",
        "refs",
        "tails",
        "ticket",
        "tokens",
        "unsalted",
        "uses",
    )

    def __init__(self, key: bytes, parent: "Node | None", tokens: bytes = b"") -> None:
        self.key = key
        self.parent = parent
        self.depth: int = 0 if parent is None else parent.depth + 1
        """Pages of the prefix, this one included."""
        self.tokens = tokens
        """int32 bytes of an incomplete page; empty for a full one."""
        self.page_id: int | None = None
        self.host_page: int | None = None
        """A cached page has exactly one of the two, a dropped one neither."""
        self.refs = 0
        """Tables that run through the node, and copies of the step being planned that read it."""
        self.pins = 0
        """Hibernated requests that need the page back."""
        self.hits = 0
        self.uses = 0.0
        """Past uses, faded to `last_use`."""
        self.last_use = 0.0
        self.num_children = 0
        self.num_device_children = 0
        self.tails = Tails()
        """Positions in the pages that follow."""
        self.held_tails: list[bytes] = []
        """Tails of the parent that stand in this page."""
        self.unsalted: bytes | None = None
        """Of a first page: its name without a salt."""
        self.ticket = 0

    @property
    def may_leave_device(self) -> bool:
        return self.page_id is not None and not self.refs and not self.num_device_children

    @property
    def may_be_dropped(self) -> bool:
        """From host memory, where pages are without copies."""
        return self.host_page is not None and not self.refs and not self.pins and not self.num_children

    def path(self) -> "Iterator[Node]":
        """This node, the one before it, ... and the root."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent


class Mark(NamedTuple):
    """A position inside a page at which some request left a state worth coming back to."""

    position: int
    key: bytes
    """Name of the position: the key of the last full page before it and the tokens that follow."""
    holder: Node
    """Its page has the rows up to the position (and perhaps others after it)."""


class Tails:
    """The positions in the pages after one node: first tokens of a page -> the page that holds their rows.

    Grouped by length, so that a lookup takes one step for each length and not for each of a thousand continuations.
    """

    __slots__ = ("by_length",)

    def __init__(self) -> None:
        self.by_length: dict[int, dict[bytes, Node]] = {}

    def __iter__(self) -> Iterator[tuple[bytes, Node]]:
        return (item for group in self.by_length.values() for item in group.items())

    def matching(self, following: bytes) -> list[tuple[bytes, Node]]:
        """Tails with which the int32 bytes `following` begin, the shortest first."""
        found = []
        for length in sorted(self.by_length):
            tail = following[:length]
            holder = self.by_length[length].get(tail)
            if holder is not None:
                found.append((tail, holder))
        return found

    def holder(self, tail: bytes) -> Node | None:
        return self.by_length.get(len(tail), {}).get(tail)

    def put(self, tail: bytes, holder: Node) -> None:
        """Let `holder`'s page stand for a tail, instead of another page if there was one."""
        group = self.by_length.setdefault(len(tail), {})
        before = group.get(tail)
        if before is not holder:
            if before is not None:
                before.held_tails.remove(tail)
            group[tail] = holder
            holder.held_tails.append(tail)

    def remove(self, tail: bytes) -> None:
        group = self.by_length[len(tail)]
        group.pop(tail).held_tails.remove(tail)
        if not group:
            del self.by_length[len(tail)]


def count_paths(tips: Iterable[Node]) -> dict[Node, int]:
    """How many of the paths to `tips` run through each node."""
    counts: dict[Node, int] = {}
    for tip in tips:
        for node in tip.path():
            counts[node] = counts.get(node, 0) + 1
    return counts
