"""How many cached pages could go, kept as three numbers that follow every change of a node."""

from collections.abc import Iterable

from engine.kv.prefix_node import Node


class IdlePages:
    """Pages in no table.

    free        on the device, nobody's: they can be dropped
    pinned      on the device, kept for a hibernated request: they can go to host memory only
    droppable   in host memory, nobody's: they make room there
    """

    __slots__ = ("droppable", "free", "pinned")

    def __init__(self) -> None:
        self.free = 0
        self.pinned = 0
        self.droppable = 0

    def count(self, node: Node, change: int) -> None:
        """Enter a node (1) or take it out (-1); around every change of its refs, pins or place."""
        if node.refs or node.parent is None:
            return
        if node.page_id is None:
            if not node.pins:
                self.droppable += change
        elif node.pins:
            self.pinned += change
        else:
            self.free += change

    def num_evictable(self, num_host_free: int) -> int:
        """Device pages that can be freed now, where host memory has so many free ones."""
        return self.free + min(self.pinned, num_host_free + self.droppable)

    def num_stuck(self, num_host_free: int) -> int:
        """Device pages that stay there for their pins alone."""
        return max(0, self.pinned - num_host_free - self.droppable)

    def beside(self, nodes: Iterable[Node]) -> "IdlePages":
        """The same numbers once a table runs through these nodes and all before them, which are among them."""
        left = IdlePages()
        left.free, left.pinned, left.droppable = self.free, self.pinned, self.droppable
        for node in nodes:
            left.count(node, -1)
        return left

    def check(self, nodes: Iterable[Node]) -> None:
        """Recompute the numbers from all nodes."""
        found = IdlePages()
        for node in nodes:
            found.count(node, 1)
        assert found.free == self.free, "idle pages are miscounted"
        assert found.pinned == self.pinned, "idle pinned pages are miscounted"
        assert found.droppable == self.droppable, "host pages that may go are miscounted"
