"""Whatever becomes of a request's slot and pages, its tokens and log probabilities are those of the cold run.

Plans are made by hand, the way an engine with a prefix cache would: snapshots, replays, copies of partial pages, spills
and loads, other slots, other pages, and strangers who dirty everything that was given away.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.messages import SamplingParams
from engine.plan import (
    NewRequest,
    PageCopy,
    PageLoad,
    PageSpill,
    Replay,
    ScheduledTokens,
    SlotRestore,
    SlotSnapshot,
    StepPlan,
    StepResult,
)
from model.kv_layout import PAGE_TOKENS

GREEDY = SamplingParams(temperature=0.0, max_tokens=1000, logprobs=20)
NUM_PAGES, NUM_SLOTS, NUM_HOST_PAGES, NUM_SNAPSHOTS = 12, 3, 8, 40
PROMPT, COUNT = 500, 12


class Machine:
    """An executor with everything that moves, and the bookkeeping of free places."""

    def __init__(self, lab: Any, *, batched_tokens: int = 4096, snapshots: int = NUM_SNAPSHOTS) -> None:
        resolved = lab.resolved(max_num_batched_tokens=batched_tokens, max_num_seqs=NUM_SLOTS)
        resolved = replace(
            resolved,
            num_pages=NUM_PAGES,
            num_host_pages=NUM_HOST_PAGES,
            num_snapshots=snapshots,
            max_model_len=2048,
        )
        self.executor = lab.executor(resolved)
        self.free_pages = list(range(NUM_PAGES))
        self.free_slots = list(range(NUM_SLOTS))
        self.step_id = 0
        self.finished: list[str] = []
        self.names = 0

    def execute(self, **fields: Any) -> StepResult:
        self.step_id += 1
        plan = StepPlan(step_id=self.step_id, finished=tuple(self.finished), **fields)
        self.finished = []
        return self.executor.execute(plan)

    def stranger(self, slot: int, page: int, **fields: Any) -> None:
        """Somebody else's whole life in a slot and a page; the plan of its first step carries `fields`."""
        self.names += 1
        name, ids = f"stranger-{self.names}", np.random.default_rng(self.names).integers(2, 300, 150).astype(np.int32)
        new = NewRequest(request_id=name, slot=slot, token_ids=ids, num_prompt_tokens=150, sampling=GREEDY)
        rows = ScheduledTokens(request_id=name, start=0, num_tokens=149, new_page_ids=(page,), samples=False)
        self.execute(new=(new,), scheduled=(rows,), **fields)
        self.finished.append(name)


class Journey:
    """One request that leaves and comes back in every way."""

    def __init__(self, machine: Machine, prompt: list[int]) -> None:
        self.machine = machine
        self.tokens = list(prompt)
        self.num_prompt = len(prompt)
        self.logprobs: dict[int, Any] = {}
        """Of the token at each position."""
        self.snapshots: dict[int, int] = {}
        self.computed = 0
        self.pages: list[int] = []
        self.visits = 0
        self.slot = -1
        self.arrive(0, [], {})

    @property
    def name(self) -> str:
        return f"visit-{self.visits}"

    def arrive(self, position: int, pages: list[int], moves: dict[str, Any]) -> None:
        """Come back at `position`, with these pages, by the moves of the next plan."""
        self.visits += 1
        self.slot = self.slot if self.slot >= 0 else self.machine.free_slots.pop()
        self.computed, self.pages, self.brought = position, [], list(pages)
        new = NewRequest(
            request_id=self.name,
            slot=self.slot,
            token_ids=np.array(self.tokens, dtype=np.int32),
            num_prompt_tokens=self.num_prompt,
            sampling=GREEDY,
            num_computed_tokens=position,
        )
        self.moves = {"new": (new,), **moves}

    def advance(self, count: int, *, keep: bool = False) -> None:
        """A step of at most `count` rows; `keep` takes a snapshot behind it."""
        machine = self.machine
        count = min(count, len(self.tokens) - self.computed)
        start, end = self.computed, self.computed + count
        missing = -(-end // PAGE_TOKENS) - len(self.pages) - len(self.brought)
        new_pages = self.brought + [machine.free_pages.pop(0) for _ in range(missing)]
        self.pages, self.brought = self.pages + new_pages, []
        samples = end == len(self.tokens)
        rows = ScheduledTokens(
            request_id=self.name, start=start, num_tokens=count, new_page_ids=tuple(new_pages), samples=samples
        )
        kept: tuple[SlotSnapshot, ...] = ()
        if keep and end not in self.snapshots:
            self.snapshots[end] = len(self.snapshots)
            kept = (SlotSnapshot(self.slot, end, self.snapshots[end]),)
        result = machine.execute(scheduled=(rows,), slot_snapshots=kept, **self.moves)
        self.moves = {}
        self.computed = end
        assert bool(result.token_ids) == samples
        if samples:
            self.logprobs[end] = result.logprobs[0]
            self.tokens += result.token_ids

    def leave(self) -> tuple[int, int]:
        """The next plan forgets the request; its slot goes to somebody else. Returns (slot, computed)."""
        self.machine.finished.append(self.name)
        left = self.slot
        self.slot = self.machine.free_slots.pop(0)
        self.machine.free_slots.append(left)
        return left, self.computed

    def fork(self, position: int) -> tuple[list[int], tuple[PageCopy, ...]]:
        """Pages to go on from `position`: whole ones are shared, a partial one is copied. The rest is given away."""
        whole = position // PAGE_TOKENS
        kept, partial = self.pages[:whole], ()
        if position % PAGE_TOKENS:
            copy = PageCopy(source=self.pages[whole], target=self.machine.free_pages.pop(0))
            kept, partial = [*kept, copy.target], (copy,)
        self.machine.free_pages += self.pages[whole:]
        return kept, partial

    def hibernate(self, shuffle: int) -> None:
        """Snapshot and spill everything, give slot and pages away in the same plan, wake up elsewhere."""
        machine = self.machine
        if self.computed == 0:
            return
        position = self.computed
        if position not in self.snapshots:
            self.snapshots[position] = len(self.snapshots)
            machine.execute(slot_snapshots=(SlotSnapshot(self.slot, position, self.snapshots[position]),))
        slot, _ = self.leave()
        host = np.random.default_rng(shuffle).permutation(NUM_HOST_PAGES)[: len(self.pages)].tolist()
        spills = tuple(PageSpill(page, to) for page, to in zip(self.pages, host, strict=True))
        machine.stranger(slot, self.pages[0], page_spills=spills)
        machine.free_pages = np.random.default_rng(shuffle).permutation(machine.free_pages + self.pages).tolist()
        pages = [machine.free_pages.pop(0) for _ in host]
        loads = tuple(PageLoad(source, page) for source, page in zip(host, pages, strict=True))
        restore = SlotRestore(self.slot, self.snapshots[position], position)
        self.arrive(position, pages, {"page_loads": loads, "slot_restores": (restore,)})

    def rewind(self, position: int) -> None:
        """Preempted, and replayed at `position`; everything behind it is computed again."""
        position = min(position, self.computed)
        slot, _ = self.leave()
        pages, copies = self.fork(position) if position else self.fork(0)
        # The stranger overwrites what was given away, but the partial page only after it was copied.
        spare = self.machine.free_pages[-1]
        if copies and spare == copies[0].source:
            spare = self.machine.free_pages[0]
        self.machine.stranger(slot, spare)
        replays = {"replays": (Replay(f"visit-{self.visits + 1}", self.slot, position),)} if position else {}
        self.arrive(position, pages, {"page_copies": copies, **replays})

    def restore(self, choice: int) -> None:
        """Preempted, and back at one of the snapshots."""
        positions = sorted(p for p in self.snapshots if p <= self.computed)
        if not positions:
            return
        position = positions[choice % len(positions)]
        slot, _ = self.leave()
        pages, copies = self.fork(position)
        self.machine.stranger(slot, self.machine.free_pages[0])
        restore = SlotRestore(self.slot, self.snapshots[position], position)
        self.arrive(position, pages, {"page_copies": copies, "slot_restores": (restore,)})


@pytest.fixture(scope="module")
def prompt(short_lab: Any) -> list[int]:
    return short_lab.prompt(PROMPT, seed=3)


@pytest.fixture(scope="module")
def cold(short_lab: Any, prompt: list[int]) -> Journey:
    journey = Journey(Machine(short_lab), prompt)
    journey.advance(PROMPT)
    while len(journey.tokens) < PROMPT + COUNT:
        journey.advance(1)
    return journey


OPERATIONS = st.one_of(
    st.tuples(st.just("advance"), st.integers(1, 200)),
    st.tuples(st.just("advance"), st.integers(1, 12)),
    st.tuples(st.just("keep"), st.integers(1, 200)),
    st.tuples(st.just("hibernate"), st.integers(0, 99)),
    st.tuples(st.just("rewind"), st.integers(0, PROMPT + COUNT)),
    st.tuples(st.just("restore"), st.integers(0, 99)),
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(operations=st.lists(OPERATIONS, min_size=2, max_size=14), batched=st.sampled_from([4096, 61, 16]))
def test_any_journey_is_the_cold_run(
    short_lab: Any, prompt: list[int], cold: Journey, operations: list[tuple[str, int]], batched: int
) -> None:
    journey = Journey(Machine(short_lab, batched_tokens=batched), prompt)
    journey.advance(260)
    for name, number in operations:
        if name in ("advance", "keep"):
            journey.advance(number, keep=name == "keep")
        elif not journey.moves:  # it has arrived
            getattr(journey, name)(number)
    while len(journey.tokens) < PROMPT + COUNT:
        journey.advance(10**6)
    assert journey.tokens == cold.tokens
    assert journey.logprobs and all(journey.logprobs[p] == cold.logprobs[p] for p in journey.logprobs)


def test_the_cold_run_is_worth_comparing(cold: Journey) -> None:
    assert len(set(cold.tokens[PROMPT:])) > COUNT // 2
    assert len({row.logprob for row in cold.logprobs.values()}) == COUNT


@pytest.fixture(scope="module")
def long_answer(short_lab: Any) -> Journey:
    """A short prompt and an answer across a whole page, with a snapshot behind every token."""
    journey = Journey(Machine(short_lab, snapshots=300), short_lab.prompt(250, seed=4))
    journey.advance(250, keep=True)
    while journey.computed < 2 * PAGE_TOKENS:
        journey.advance(1, keep=True)
    return journey


@pytest.mark.parametrize(("way", "stride"), [("snapshot", 1), ("replay", 5)])
def test_resume_at_every_residue(long_answer: Journey, way: str, stride: int) -> None:
    """Mod 4, 128 and 256: a second request goes on from each position of the first, with a copy of its last page.

    (Replays are tested at every residue, to the bit, in the tests of the model.)
    """
    machine, slot, page = long_answer.machine, 0, NUM_PAGES - 1
    copies = (PageCopy(source=long_answer.pages[1], target=page),)
    for position in range(PAGE_TOKENS, 2 * PAGE_TOKENS, stride):
        new = NewRequest(
            request_id="other",
            slot=slot,
            token_ids=np.array(long_answer.tokens[: position + 1], dtype=np.int32),
            num_prompt_tokens=position,
            sampling=GREEDY,
            num_computed_tokens=position,
        )
        rows = ScheduledTokens(
            request_id="other",
            start=position,
            num_tokens=1,
            new_page_ids=(long_answer.pages[0], page),
            samples=True,
        )
        moves: dict[str, Any] = {"slot_restores": (SlotRestore(slot, long_answer.snapshots[position], position),)}
        if way == "replay":
            moves = {"replays": (Replay("other", slot, position),)}
        result = machine.execute(new=(new,), page_copies=copies, scheduled=(rows,), **moves)
        machine.finished.append("other")
        assert result.token_ids == (long_answer.tokens[position + 1],), position
        assert result.logprobs[0] == long_answer.logprobs[position + 1], position


def test_a_slot_that_was_not_restored_is_not_computed_with(short_lab: Any, prompt: list[int]) -> None:
    journey = Journey(Machine(short_lab), prompt)
    journey.advance(300)
    journey.leave()
    journey.arrive(256, journey.pages[:1], {})
    with pytest.raises(AssertionError, match="its slot stands at -1"):
        journey.advance(10)


def test_a_snapshot_is_of_the_position_that_the_step_has_reached(short_lab: Any, prompt: list[int]) -> None:
    journey = Journey(Machine(short_lab), prompt)
    journey.advance(300)
    with pytest.raises(AssertionError, match="stands at 300, not at 299"):
        journey.machine.execute(slot_snapshots=(SlotSnapshot(journey.slot, 299, 0),))
    journey.machine.execute(slot_snapshots=(SlotSnapshot(journey.slot, 300, 0),))
    with pytest.raises(AssertionError, match="one of position 300, not 299"):
        journey.machine.execute(slot_restores=(SlotRestore(journey.slot, 0, 299),))
    with pytest.raises(AssertionError, match="place 40 of 40"):
        journey.machine.execute(slot_snapshots=(SlotSnapshot(journey.slot, 300, 40),))


def test_a_slot_is_kept_in_the_plan_that_finishes_its_request(short_lab: Any, prompt: list[int], cold: Journey) -> None:
    """At its turn's end, when nothing else is to be computed; another request goes on from there."""
    machine = Machine(short_lab)
    first = Journey(machine, prompt)
    first.advance(PROMPT)
    first.advance(1)
    slot, position = first.leave()
    machine.execute(slot_snapshots=(SlotSnapshot(slot, position, 5),))
    machine.stranger(slot, 9)
    first.arrive(position, first.pages, {"slot_restores": (SlotRestore(first.slot, 5, position),)})
    while len(first.tokens) < PROMPT + COUNT:
        first.advance(1)
    assert first.tokens == cold.tokens and first.logprobs == cold.logprobs


def test_a_page_is_spilled_and_reused_in_one_plan(short_lab: Any, prompt: list[int]) -> None:
    """Spills come before loads, copies and rows; places keep their bytes."""
    machine = Machine(short_lab)
    journey = Journey(machine, prompt)
    journey.advance(PROMPT)
    cache = machine.executor._runner.cache

    def content(page: int) -> bytes:
        row = torch.empty(cache.layout.bytes_per_page, dtype=torch.uint8)
        cache.pack_page(page, row)
        return row.numpy().tobytes()

    first, second = (content(page) for page in journey.pages)
    assert first != second
    machine.execute(page_spills=(PageSpill(journey.pages[1], 6),))
    machine.execute(
        page_spills=(PageSpill(journey.pages[0], 3),),
        page_loads=(PageLoad(6, journey.pages[0]),),
        page_copies=(PageCopy(source=journey.pages[1], target=9),),
    )
    assert (content(journey.pages[0]), content(9)) == (second, second)
    machine.execute(page_loads=(PageLoad(3, 10), PageLoad(6, 11), PageLoad(3, 4)))
    assert (content(10), content(11), content(4)) == (first, second, first)


def test_places_outside_the_budget_do_not_exist(short_lab: Any, prompt: list[int]) -> None:
    machine = Machine(short_lab)
    journey = Journey(machine, prompt)
    journey.advance(300)
    with pytest.raises(AssertionError, match="place 8 of 8"):
        machine.execute(page_spills=(PageSpill(0, 8),))


def test_memory_of_the_host_is_counted_and_fixed(short_lab: Any, prompt: list[int]) -> None:
    machine = Machine(short_lab)
    runner, layout = machine.executor._runner, machine.executor.config.layout(machine.executor.model)
    assert runner.snapshots.allocated_bytes == NUM_SNAPSHOTS * layout.bytes_per_snapshot
    assert runner.host_pages.allocated_bytes == NUM_HOST_PAGES * layout.bytes_per_page
    line = machine.executor.describe_memory()
    assert f"{NUM_SNAPSHOTS} snapshots x {layout.bytes_per_snapshot} = {runner.snapshots.allocated_bytes} bytes" in line
    assert f"{NUM_HOST_PAGES} pages = {runner.host_pages.allocated_bytes} bytes" in line
    places = runner.snapshots._places, runner.host_pages._places
    before = [block.data_ptr() for place in places for block in place._blocks]
    journey = Journey(machine, prompt)
    journey.advance(300, keep=True)
    journey.hibernate(1)
    journey.advance(10)
    assert [block.data_ptr() for place in places for block in place._blocks] == before
