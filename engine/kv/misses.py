"""What a lookup finds, and why it finds no more: a bounded memory of what was there, by name only."""

from collections import OrderedDict
from typing import Literal, NamedTuple

from engine.kv.hashing import PageKeys
from engine.kv.prefix_node import Mark, Node

MatchEnd = Literal["cold", "evicted", "salt", "diverged"]
"""Why the next full page is not there: nothing like it was seen, it was dropped, it is another salt's, or other pages
follow the same prefix. "salt" says something about other tenants: it is for metrics, never for a client."""


class Match(NamedTuple):
    """What the index has of a prompt. Valid until the next call that changes the index."""

    nodes: list[Node]
    """Full pages from the start of the prompt."""
    num_on_device: int
    """How many of `nodes`, from the first, are on the device; the others have to be loaded."""
    marks: list[Mark]
    """Positions inside pages, in ascending order."""
    end: MatchEnd | None
    """None: the prompt goes on where everything cached ends."""


class MissMemory:
    """Keys of dropped pages, the oldest forgotten first, and first pages by their name without a salt."""

    def __init__(self, num_ghosts: int) -> None:
        self._num_ghosts = num_ghosts
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()
        self._firsts: dict[bytes, int] = {}

    def entered(self, node: Node, keys: PageKeys) -> None:
        """A full page is cached."""
        self._ghosts.pop(node.key, None)
        if node.depth == 1 and node.unsalted is None:
            node.unsalted = keys.unsalted
            assert node.unsalted is not None
            self._firsts[node.unsalted] = self._firsts.get(node.unsalted, 0) + 1

    def dropped(self, node: Node) -> None:
        self._ghosts[node.key] = None
        if len(self._ghosts) > self._num_ghosts:
            self._ghosts.popitem(last=False)
        if node.unsalted is not None:
            self._firsts[node.unsalted] -= 1
            if not self._firsts[node.unsalted]:
                del self._firsts[node.unsalted]

    def explain(self, nodes: list[Node], keys: PageKeys) -> MatchEnd | None:
        """Why the page after `nodes` is not cached; None when the prompt goes on where everything cached ends."""
        if len(nodes) == len(keys.keys):
            return None
        if keys.keys[len(nodes)] in self._ghosts:
            return "evicted"
        if nodes:
            return "diverged" if nodes[-1].num_children else None
        return "salt" if keys.unsalted in self._firsts else "cold"

    def check(self, nodes: list[Node]) -> None:
        """Recompute the books from all cached pages."""
        firsts: dict[bytes, int] = {}
        for node in nodes:
            if node.unsalted is not None:
                firsts[node.unsalted] = firsts.get(node.unsalted, 0) + 1
        assert firsts == self._firsts, "first pages are miscounted"
        assert len(self._ghosts) <= self._num_ghosts
        assert not any(node.key in self._ghosts for node in nodes), "a cached page counts as dropped"
