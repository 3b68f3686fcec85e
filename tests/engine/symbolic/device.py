"""A device whose rows are tags: it computes nothing and asserts every row that a real one would read.

One layer of each class stands for all of them:

    slot   window ring | CSA overlap, CSA accumulator, the same of the index keys | HCA accumulator
    page   64 CSA entries | 64 index keys | 2 HCA entries

A row is written with the tag of the history that it depends on (`tags`). Before row t of a request is computed, the
ring must hold the rows t - W + 1 .. t - 1 of this history, the accumulators must have taken exactly t tokens of it,
and all entries that the row may see must be in the pages of its table. Copies carry tags along, so a wrong page, a
wrong order or a lost copy is found by the first reader. What a failed step or request was writing is NOTHING
afterwards.
"""

import random
from collections.abc import Callable, Iterable

import numpy as np
from symbolic import tags
from symbolic.exact_replay import replay_is_exact
from symbolic.faults import PAGES_MOVE, SLOTS_KEPT, Faults
from symbolic.live import CSA_ROWS, HIDDEN, NUM_ACCUMULATORS, PAGE_ROWS, Live
from symbolic.tags import MASK, NOTHING

from engine.config import ResolvedConfig
from engine.executor import StepError
from engine.plan import NewRequest, ScheduledTokens, StepPlan, StepResult
from model.config import CSA_RATIO, HCA_RATIO, ModelConfig
from model.kv_layout import PAGE_TOKENS, LayerReplay, replay_layers


class SymbolicDevice:
    """Implements `engine.executor.Executor`."""

    def __init__(
        self,
        config: ResolvedConfig,
        model: ModelConfig,
        *,
        salt_of: Callable[[str], str] = lambda request_id: "",
        faults: Faults | None = None,
        replay: Callable[[ModelConfig, int], tuple[LayerReplay, ...]] = replay_layers,
    ) -> None:
        """`salt_of` says in whose cache a request's rows may be found: plans do not carry it."""
        self.config = config
        self.model = model
        self.eos_token_id = model.eos_token_id
        self.num_steps = 0
        self.num_orders: dict[str, int] = dict.fromkeys(
            ("copies", "spills", "loads", "restores", "replays", "snapshots"), 0
        )
        self._salt_of = salt_of
        self._faults = faults or Faults()
        self._replay_rows = replay
        self._exact: dict[int, bool] = {}
        layout = config.layout(model)
        self._window, self._ring = model.sliding_window, layout.window_ring
        self._places = np.arange(config.max_model_len + 1) % self._ring
        self._page_rows = np.full((config.num_pages, PAGE_ROWS), NOTHING, dtype=np.uint64)
        self._page_filled = np.zeros(config.num_pages, dtype=bool)
        self._page_tables = [0] * config.num_pages
        """How many tables hold a page."""
        self._host_rows = np.full((config.num_host_pages, PAGE_ROWS), NOTHING, dtype=np.uint64)
        self._host_filled = np.zeros(config.num_host_pages, dtype=bool)
        self._slots = np.full((config.max_num_seqs, self._ring + NUM_ACCUMULATORS), NOTHING, dtype=np.uint64)
        self._slot_live: list[Live | None] = [None] * config.max_num_seqs
        """Whose state a slot holds; it stays when the request is forgotten, until another one takes the slot."""
        width = self._window - 1 + NUM_ACCUMULATORS
        self._snapshots = np.full((config.num_snapshots, width), NOTHING, dtype=np.uint64)
        self._snapshot_positions = [-1] * config.num_snapshots
        self._live: dict[str, Live] = {}
        self._taken: set[int] = set()
        self._unlearned: set[str] = set()
        """Requests whose only step failed before the device learned of them."""
        self._last_step_id = 0

    @property
    def num_live(self) -> int:
        return len(self._live)

    def table(self, request_id: str) -> list[int]:
        """Pages of a live request."""
        return self._live[request_id].page_ids

    def execute(self, plan: StepPlan) -> StepResult:
        draw = random.Random(self._faults.seed * 1_000_003 + plan.step_id)
        self._forget(plan)
        self._check_plan(plan)
        chance = self._faults.step
        if plan.page_spills or plan.page_loads:
            chance *= PAGES_MOVE
        elif plan.slot_snapshots:
            chance *= SLOTS_KEPT
        failing = draw.choice(("start", "moved", "computed")) if draw.random() < chance else None
        if failing == "start":
            self._unlearned |= {new.request_id for new in plan.new}
            self._fail_step(plan)
        for new in plan.new:
            self._learn(new)
        self._move(plan)
        for rows in plan.scheduled:
            self._append_pages(rows)
        if failing == "moved":
            self._fail_step(plan)
        failed = self._lose_copy(plan, draw)
        kept = {(slot, position): snapshot for slot, position, snapshot in plan.slot_snapshots}
        for request_id, slot, position in plan.replays:
            self._replay(self._live[request_id], slot, position, lost=request_id in failed)
            if (slot, position) in kept:
                self._save(slot, position, kept.pop((slot, position)))
        for rows in plan.scheduled:
            if rows.request_id not in failed:
                self._check_rows(rows)
        for rows in plan.scheduled:
            self._write_rows(self._live[rows.request_id], rows.start, rows.start + rows.num_tokens)
        chance = self._faults.request * (SLOTS_KEPT if plan.slot_snapshots else 1)
        if plan.scheduled and draw.random() < chance:
            failed[draw.choice(plan.scheduled).request_id] = "not a number"
        for rows in plan.scheduled:
            if failing == "computed" or rows.request_id in failed:
                self._spoil(rows)
        if failing == "computed":
            self._fail_step(plan)
        sampled = [(s.request_id, self._sample(s)) for s in plan.scheduled if s.samples and s.request_id not in failed]
        for (slot, position), snapshot in kept.items():
            self._save(slot, position, snapshot)
        self.num_steps += 1
        self._count(plan)
        seconds = 0.001 + 2e-5 * plan.num_tokens
        if draw.random() < self._faults.slow:
            seconds *= 100.0
        return StepResult(
            step_id=plan.step_id,
            request_ids=tuple(request_id for request_id, _ in sampled),
            token_ids=tuple(token_id for _, token_id in sampled),
            logprobs=(None,) * len(sampled),
            failed=failed,
            seconds=seconds,
        )

    def close(self) -> None:
        self._live.clear()

    def _forget(self, plan: StepPlan) -> None:
        assert len(set(plan.finished)) == len(plan.finished), "a request is forgotten twice"
        for request_id in plan.finished:
            live = self._live.pop(request_id, None)
            if live is None:
                assert request_id in self._unlearned, f"{request_id} is not known"
                self._unlearned.remove(request_id)
                continue
            self._taken.remove(live.new.slot)
            for page in live.page_ids:
                self._page_tables[page] -= 1

    def _check_plan(self, plan: StepPlan) -> None:
        """What can be said of a plan without looking at any row."""
        assert plan.step_id > self._last_step_id, "step ids grow"
        self._last_step_id = plan.step_id
        assert plan.num_tokens <= self.config.max_num_batched_tokens, f"{plan.num_tokens} rows in one step"
        ids = [s.request_id for s in plan.scheduled]
        assert len(set(ids)) == len(ids), "a request is scheduled twice"
        new = {n.request_id: n for n in plan.new}
        assert len(new) == len(plan.new) and new.keys() <= set(ids), "a new request has no rows"
        resumed = sorted((n.slot, n.num_computed_tokens) for n in plan.new if n.num_computed_tokens)
        rebuilt = [(slot, position) for slot, _, position in plan.slot_restores]
        for request_id, slot, position in plan.replays:
            assert new[request_id].slot == slot, f"{request_id} is not in slot {slot}"
            rebuilt.append((slot, position))
        assert sorted(rebuilt) == resumed, f"slots {resumed} are resumed, {sorted(rebuilt)} are rebuilt"
        targets = [load.page for load in plan.page_loads] + [copy.target for copy in plan.page_copies]
        assert len(set(targets)) == len(targets), "two copies go to one page"
        assert not set(targets) & {copy.source for copy in plan.page_copies} - {
            load.page for load in plan.page_loads
        }, "a page is copied while it is written"
        places = [snapshot for _, _, snapshot in plan.slot_snapshots]
        assert len(set(places)) == len(places), "two snapshots go to one place"

    def _learn(self, new: NewRequest) -> None:
        assert new.request_id not in self._live, f"{new.request_id} is new twice"
        assert new.slot not in self._taken, f"slot {new.slot} has two owners"
        known = len(new.token_ids)
        assert new.token_ids.dtype == np.int32 and known >= new.num_prompt_tokens >= 1
        assert 0 <= new.num_computed_tokens < known, "at least the last known token is computed"
        most = min(new.num_prompt_tokens + new.sampling.max_tokens, self.config.max_model_len)
        live = Live.learn(new, tags.root(self._salt_of(new.request_id)), max(most, known))
        self._taken.add(new.slot)
        self._live[new.request_id] = live
        self._slot_live[new.slot] = live
        if not new.num_computed_tokens:
            self._slots[new.slot] = NOTHING

    def _move(self, plan: StepPlan) -> None:
        """Spills, then loads, copies and restores."""
        for page, host_page in plan.page_spills:
            assert self._page_filled[page], f"page {page} is spilled and holds nothing"
            self._spill(page, host_page)
        for host_page, page in plan.page_loads:
            assert self._host_filled[host_page], f"host page {host_page} is loaded and holds nothing"
            self._check_unused(page)
            self._load(host_page, page)
        for copy in plan.page_copies:
            assert self._page_filled[copy.source], f"page {copy.source} is copied and holds nothing"
            self._check_unused(copy.target)
            self._copy(copy.source, copy.target)
        for slot, snapshot, position in plan.slot_restores:
            found = self._snapshot_positions[snapshot]
            assert found == position, f"snapshot {snapshot} is one of position {found}, not {position}"
            self._restore(slot, snapshot, position)
            live = self._slot_live[slot]
            assert live is not None
            live.num_computed = position

    def _check_unused(self, page: int) -> None:
        assert not self._page_tables[page], f"page {page} is overwritten, and a table holds it"

    def _spill(self, page: int, host_page: int) -> None:
        self._host_rows[host_page] = self._page_rows[page]
        self._host_filled[host_page] = True

    def _load(self, host_page: int, page: int) -> None:
        self._page_rows[page] = self._host_rows[host_page]
        self._page_filled[page] = True

    def _copy(self, source: int, target: int) -> None:
        self._page_rows[target] = self._page_rows[source]
        self._page_filled[target] = True

    def _save(self, slot: int, position: int, snapshot: int) -> None:
        live = self._slot_live[slot]
        assert live is not None, f"slot {slot} is kept and holds nothing"
        assert live.num_computed == position, f"slot {slot} stands at {live.num_computed}, not at {position}"
        first = max(0, position - (self._window - 1))
        row = self._snapshots[snapshot]
        row[:] = NOTHING
        row[: position - first] = self._slots[slot, self._places[first:position]]
        row[self._window - 1 :] = self._slots[slot, self._ring :]
        # What a failed request was computing is no position of anybody.
        self._snapshot_positions[snapshot] = -1 if live.ended else position

    def _restore(self, slot: int, snapshot: int, position: int) -> None:
        first = max(0, position - (self._window - 1))
        state, row = self._slots[slot], self._snapshots[snapshot]
        state[: self._ring] = NOTHING
        state[self._places[first:position]] = row[: position - first]
        state[self._ring :] = row[self._window - 1 :]

    def _append_pages(self, rows: ScheduledTokens) -> None:
        """Take pages into the table. Those before the first row are somebody's; one with rows of this request to come
        is its own, and a page that begins behind the first row holds nothing yet."""
        live = self._live[rows.request_id]
        first = rows.start
        for page in rows.new_page_ids:
            assert live.num_pages < len(live.table_P), f"{rows.request_id} has more pages than it can ever fill"
            assert page not in live.page_ids, f"{rows.request_id} holds page {page} twice"
            begin = live.num_pages * PAGE_TOKENS
            if begin + PAGE_TOKENS > first:
                self._check_unused(page)
            if begin >= first:
                self._page_rows[page] = NOTHING
                self._page_filled[page] = False
            self._page_tables[page] += 1
            live.table_P[live.num_pages] = page
            live.page_ids.append(page)
            live.num_pages += 1

    def _replay(self, live: Live, slot: int, position: int, *, lost: bool) -> None:
        """The rows of a replay read all entries before its position, and no row of the slot."""
        name = live.new.request_id
        assert live.num_computed == -1 and live.new.slot == slot, f"{name} is replayed where it stands"
        if not lost:
            self._check_entries(live, position)
        if position not in self._exact:
            self._exact[position] = replay_is_exact(self.model, position, self._replay_rows(self.model, position))
        live.num_computed = position
        self._slots[slot] = NOTHING
        if self._exact[position]:
            self._write_slot(live, max(0, position - (self._window - 1)), position)

    def _check_rows(self, rows: ScheduledTokens) -> None:
        live, start, end = self._live[rows.request_id], rows.start, rows.start + rows.num_tokens
        name, slot = rows.request_id, live.new.slot
        assert not live.ended, f"{name} has failed and goes on"
        assert start == live.num_computed, f"{name}: row {start}, but its slot stands at {live.num_computed}"
        assert start < end <= live.num_tokens, f"{name}: rows of unknown tokens"
        assert rows.samples == (end == live.num_tokens), f"{name}: samples is wrong"
        assert live.num_pages * PAGE_TOKENS >= end, f"{name}: rows outside its pages"
        self._check_entries(live, start)
        for page in live.page_ids[start // PAGE_TOKENS : -(-end // PAGE_TOKENS)]:
            assert self._page_tables[page] == 1, f"{name} writes to page {page}, which is in another table"
        first = max(0, start - (self._window - 1))
        ring = self._slots[slot, self._places[first:start]]
        assert (ring == live.tags_N[first:start]).all(), f"{name}: the window before row {start} is not its own"
        found = self._slots[slot, self._ring :].tolist()
        assert found == self._accumulators(live, start), f"{name}: the accumulators do not stand at {start}"

    def _check_entries(self, live: Live, position: int) -> None:
        """All entries before a position are in the pages of the table."""
        whole, rest = divmod(position, PAGE_TOKENS)
        name = live.new.request_id
        assert live.num_pages * PAGE_TOKENS >= position, f"{name}: history outside its pages"
        if whole:
            same = self._page_rows[live.table_P[:whole]] == live.rows_PR[:whole]
            assert same.all(), f"{name}: entries before row {position} are not its own: page {_first_lie(same)}"
        if rest >= CSA_RATIO:
            entries = rest // CSA_RATIO
            found, expected = self._page_rows[live.table_P[whole]], live.rows_PR[whole]
            same = (found == expected) | HIDDEN[entries]
            assert same.all(), f"{name}: entries of the last page before row {position} are not its own"

    def _accumulators(self, live: Live, position: int) -> list[int]:
        return live.accumulators(position)

    def _write_rows(self, live: Live, start: int, end: int) -> None:
        self._write_slot(live, start, end)
        live.num_computed = end
        for index in range(start // PAGE_TOKENS, -(-end // PAGE_TOKENS)):
            page, begin = live.page_ids[index], index * PAGE_TOKENS
            a, b = max(0, start - begin), min(PAGE_TOKENS, end - begin)
            target, source = self._page_rows[page], live.rows_PR[index]
            self._page_filled[page] = True
            for base, ratio in ((0, CSA_RATIO), (CSA_ROWS, CSA_RATIO), (2 * CSA_ROWS, HCA_RATIO)):
                low, high = base + a // ratio, base + b // ratio
                if low < high:
                    target[low:high] = source[low:high]

    def _write_slot(self, live: Live, start: int, end: int) -> None:
        state, first = self._slots[live.new.slot], max(start, end - self._ring)
        state[self._places[first:end]] = live.tags_N[first:end]
        state[self._ring :] = self._accumulators(live, end)

    def _lose_copy(self, plan: StepPlan, draw: random.Random) -> dict[str, str]:
        """Let one copy fail now and then; returns the request that cannot be computed without it."""
        lost = [("load", load.page) for load in plan.page_loads]
        lost += [("copy", copy.target) for copy in plan.page_copies]
        lost += [("slot", restore.slot) for restore in plan.slot_restores]
        if not lost or draw.random() >= self._faults.copy:
            return {}
        kind, number = draw.choice(lost)
        if kind == "slot":
            self._slots[number] = NOTHING
        else:
            self._page_rows[number] = NOTHING
        if kind == "load":
            self._fail_step(plan)
        return {
            name: "a copy did not arrive"
            for name in (s.request_id for s in plan.scheduled)
            if (number in self.table(name) if kind == "copy" else self._live[name].new.slot == number)
        }

    def _spoil(self, rows: ScheduledTokens) -> None:
        """What a request has computed in this step is worthless, and so is its slot."""
        live, start = self._live[rows.request_id], rows.start
        live.ended = True
        self._slots[live.new.slot] = NOTHING
        for index in range(start // PAGE_TOKENS, live.num_pages):
            kept = ~HIDDEN[max(0, start - index * PAGE_TOKENS) // CSA_RATIO]
            self._page_rows[live.page_ids[index]] *= kept

    def _fail_step(self, plan: StepPlan) -> None:
        for rows in plan.scheduled:
            live = self._live.get(rows.request_id)
            if live is not None:
                live.ended = True
        raise StepError("the device has had enough")

    def _sample(self, rows: ScheduledTokens) -> int:
        live = self._live[rows.request_id]
        position, new = live.num_tokens, live.new
        tag = (int(live.tags_N[position - 1]) - live.root) & MASK
        token_id = tags.sample(
            tag,
            new.sampling,
            position - new.num_prompt_tokens,
            eos_token_id=self.eos_token_id,
            vocab_size=self.model.vocab_size,
        )
        if position < len(live.tags_N):
            live.append((tag + tags.step(token_id, position) + live.root) & MASK)
        return token_id

    def _count(self, plan: StepPlan) -> None:
        orders: Iterable[tuple[str, int]] = (
            ("copies", len(plan.page_copies)),
            ("spills", len(plan.page_spills)),
            ("loads", len(plan.page_loads)),
            ("restores", len(plan.slot_restores)),
            ("replays", len(plan.replays)),
            ("snapshots", len(plan.slot_snapshots)),
        )
        for name, count in orders:
            self.num_orders[name] += count


def _first_lie(same: np.ndarray) -> int:
    return int(np.argmin(same.all(axis=1)))
