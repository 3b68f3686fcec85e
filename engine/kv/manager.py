"""Who holds which pages and which slot. No torch, no policy: the scheduler asks, the manager keeps the books.

    num_pages = held (in a request's table) + reserved (promised to an admitted request, not yet taken) + available

A reservation is a number; ids are taken as the request grows. An admitted request can therefore always reach the length
that it was admitted for, whatever its neighbours do. Beyond it a request grows while pages are available.
"""

from dataclasses import dataclass, field

from engine.kv.page_pool import PagePool
from engine.kv.slot_pool import SlotPool
from model.kv_layout import KVLayout


@dataclass(slots=True, kw_only=True, eq=False)
class Grant:
    """What one admitted request holds."""

    request_id: str
    slot: int
    num_reserved_pages: int
    """Pages it is sure to get in all; those in `page_ids` are part of it."""
    page_ids: list[int] = field(default_factory=list)
    """Page i holds tokens [i * page_tokens, (i + 1) * page_tokens)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """Why a request cannot be admitted or grow now, in numbers."""

    pages_wanted: int
    pages_available: int
    slots_available: int


class KVManager:
    """Pages and slots of one engine."""

    def __init__(self, layout: KVLayout, num_pages: int, num_slots: int) -> None:
        self.layout = layout
        self.pages = PagePool(num_pages)
        self.slots = SlotPool(num_slots)
        self._grants: dict[str, Grant] = {}
        self._num_promised = 0

    @property
    def num_available_pages(self) -> int:
        """Pages that are neither held nor promised."""
        return self.pages.num_free - self._num_promised

    @property
    def num_free_slots(self) -> int:
        return self.slots.num_free

    def admit(self, request_id: str, num_tokens: int) -> Grant | Shortage:
        """Give a slot and promise pages for `num_tokens` tokens, or say what is missing."""
        assert request_id not in self._grants, f"{request_id} is admitted twice"
        wanted = self.layout.pages_for(num_tokens)
        if wanted > self.num_available_pages or self.slots.num_free == 0:
            return Shortage(
                pages_wanted=wanted,
                pages_available=self.num_available_pages,
                slots_available=self.slots.num_free,
            )
        grant = Grant(request_id=request_id, slot=self.slots.allocate(request_id), num_reserved_pages=wanted)
        self._num_promised += wanted
        self._grants[request_id] = grant
        return grant

    def extend(self, grant: Grant, num_tokens: int) -> tuple[int, ...] | Shortage:
        """Grow a table until it covers `num_tokens` tokens; returns the pages that were appended.

        Within the reservation there is never a shortage; beyond it the reservation grows while pages are available.
        """
        missing = self.layout.pages_for(num_tokens) - len(grant.page_ids)
        if missing <= 0:
            return ()
        beyond = len(grant.page_ids) + missing - grant.num_reserved_pages
        if beyond > 0:
            if beyond > self.num_available_pages:
                return Shortage(
                    pages_wanted=beyond,
                    pages_available=self.num_available_pages,
                    slots_available=self.slots.num_free,
                )
            grant.num_reserved_pages += beyond
            self._num_promised += beyond
        page_ids = self.pages.allocate(missing)
        grant.page_ids.extend(page_ids)
        self._num_promised -= missing
        return page_ids

    def release(self, grant: Grant) -> None:
        """Take everything back. Only after the last step that may touch it has run."""
        assert self._grants.pop(grant.request_id, None) is grant, f"{grant.request_id} is released twice"
        self._num_promised -= grant.num_reserved_pages - len(grant.page_ids)
        self.pages.free(grant.page_ids)
        self.slots.free(grant.slot, grant.request_id)

    def check(self) -> None:
        """Recompute the books from the grants; AssertionError names the first lie."""
        held = [page_id for grant in self._grants.values() for page_id in grant.page_ids]
        assert len(set(held)) == len(held), "a page has two owners"
        self.pages.check(set(held))
        self.slots.check({grant.slot: grant.request_id for grant in self._grants.values()})
        promised = sum(g.num_reserved_pages - len(g.page_ids) for g in self._grants.values())
        assert promised == self._num_promised, f"{self._num_promised} pages promised, the grants say {promised}"
        assert self.num_available_pages >= 0, "more pages are promised than there are"
