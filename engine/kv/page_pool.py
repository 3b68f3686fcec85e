"""Pages: identical pieces of KV memory with one id each, so that nothing can fragment."""


class PagePool:
    """Free list over the ids 0 .. num_pages - 1. O(1) for each page."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 0
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._held = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> tuple[int, ...]:
        """Take `count` pages. The caller knows that they are there."""
        assert 0 <= count <= len(self._free), f"{count} pages wanted, {len(self._free)} free"
        page_ids = tuple(self._free.pop() for _ in range(count))
        for page_id in page_ids:
            assert not self._held[page_id], f"page {page_id} was on the free list and held"
            self._held[page_id] = 1
        return page_ids

    def free(self, page_ids: list[int]) -> None:
        """Give pages back; the last one is the next one taken."""
        for page_id in page_ids:
            assert self._held[page_id], f"page {page_id} freed twice"
            self._held[page_id] = 0
            self._free.append(page_id)

    def check(self, held: set[int]) -> None:
        """Recompute the books: exactly the pages `held` are out and every page is somewhere once."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is on the free list twice"
        assert not free & held, f"pages {sorted(free & held)} are free and held"
        assert len(free) + len(held) == self.num_pages, "pages are lost"
        assert {i for i, flag in enumerate(self._held) if flag} == held, "the held marks are wrong"
