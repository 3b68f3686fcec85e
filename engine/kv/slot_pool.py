"""Slots: one for each running request, with its windows and compressor state."""


class SlotPool:
    """Free list over the slots 0 .. num_slots - 1; a slot knows its owner."""

    def __init__(self, num_slots: int) -> None:
        assert num_slots >= 1
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._owner: dict[int, str] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, request_id: str) -> int:
        """Take a slot. The caller knows that there is one."""
        slot = self._free.pop()
        assert slot not in self._owner, f"slot {slot} was on the free list and held"
        self._owner[slot] = request_id
        return slot

    def free(self, slot: int, request_id: str) -> None:
        owner = self._owner.pop(slot, None)
        assert owner == request_id, f"slot {slot} is held by {owner}, not by {request_id}"
        self._free.append(slot)

    def check(self, held: dict[int, str]) -> None:
        """Recompute the books: exactly the slots `held` are out, each with its owner."""
        assert self._owner == held, "slot owners are wrong"
        assert len(set(self._free)) == len(self._free) and not set(self._free) & set(held), "a slot is free twice"
        assert len(self._free) + len(held) == self.num_slots, "slots are lost"
