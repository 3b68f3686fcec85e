"""What one admitted request holds, what it could not get, and the copies that a step's memory decisions need."""

from dataclasses import dataclass, field

from engine.kv.hashing import PageKeys
from engine.kv.prefix_node import Node
from engine.plan import PageCopy, PageLoad, PageSpill, Replay, SlotRestore, SlotSnapshot


@dataclass(slots=True, kw_only=True, eq=False)
class Grant:
    """What one admitted request holds."""

    request_id: str
    slot: int
    num_reserved_pages: int
    """Pages it is sure to get in all; those in `page_ids` are part of it."""
    num_admitted_pages: int
    """The same when it was admitted; one that has outgrown them has taken more than was reserved for it."""
    page_ids: list[int] = field(default_factory=list)
    """Page i holds tokens [i * page_tokens, (i + 1) * page_tokens)."""
    own_pages: set[int] = field(default_factory=set)
    """Those of `page_ids` that the prefix index does not have: nobody else may read them."""
    keys: PageKeys | None = None
    """None: nothing of this request is looked up or published."""
    tip: Node | None = None
    """End of the published part of the table; the root of the request's salt while nothing is."""
    marks: set[int] = field(default_factory=set)
    """Positions at which the request resumed or left a snapshot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """Why a request cannot be admitted or grow now, in numbers."""

    pages_wanted: int
    pages_available: int
    slots_available: int


@dataclass(slots=True)
class Moves:
    """Copies of the step being planned."""

    page_spills: list[PageSpill] = field(default_factory=list)
    page_loads: list[PageLoad] = field(default_factory=list)
    page_copies: list[PageCopy] = field(default_factory=list)
    slot_restores: list[SlotRestore] = field(default_factory=list)
    replays: list[Replay] = field(default_factory=list)
    slot_snapshots: list[SlotSnapshot] = field(default_factory=list)

    @property
    def num_host_loads(self) -> tuple[int, int]:
        """(pages, snapshots) that are brought from host memory before the rows."""
        return len(self.page_loads), len(self.slot_restores)

    @property
    def num_host_copies(self) -> tuple[int, int]:
        """(pages, snapshots) that cross between device and host."""
        return (
            len(self.page_spills) + len(self.page_loads),
            len(self.slot_restores) + len(self.slot_snapshots),
        )
