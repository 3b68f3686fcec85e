"""Two schedulers as other engines have them, behind the production scheduler's face, for comparison in one simulation.

    fcfs           vLLM-like. A token budget for each step (8,192). Running requests first, in the order of admission,
                   each as much of its prompt as the budget leaves; then waiting ones, first come first served.
    prefill-first  SGLang-like. While a prompt is unfinished or waiting (and fits), the step is prompt rows only, at
                   most one chunk of 8,192, the unfinished prompt first; otherwise every running request decodes.

What they are given: pages of 256 tokens, a shared prefix cache with LRU eviction of unreferenced pages, deepest pages
first, and the same virtual machine. They are spared what costs the real engines more: compressor state and windows take
no pages, a cached prefix always resumes (no missing window tails), steps of both kinds mix without penalty of their
own, and planning takes no time. They reserve nothing: when pages run out a victim is preempted and recomputed, the last
admitted (fcfs) or the one with the shortest answer so far and then the longest prompt (prefill-first).
"""

from collections import OrderedDict, deque
from typing import Literal

import msgspec
import numpy as np

from engine.config import ResolvedConfig
from engine.messages import FinishReason, RequestError, StepOutputs
from engine.outputs import OutputColumns
from engine.plan import NewRequest, ScheduledTokens, StepPlan, StepResult
from engine.request import Request, RequestStatus
from engine.stats import Totals
from model.kv_layout import PAGE_TOKENS

BASELINES = ("fcfs", "prefill-first")
STEP_TOKENS = 8192


class PageCache:
    """Numbers of pages, not ids: private ones, and published ones by the hash of everything up to their end."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_private = 0
        self._references: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Published pages that no request holds, the next to be evicted first."""

    @property
    def num_available(self) -> int:
        """Free pages and those that can be evicted."""
        return self.num_pages - self.num_private - len(self._references) + len(self._idle)

    def match(self, keys: list[int]) -> int:
        """Leading keys that are published."""
        for count, key in enumerate(keys):
            if key not in self._references:
                return count
        return len(keys)

    def hold(self, keys: list[int]) -> None:
        for key in keys:
            self._references[key] += 1
            self._idle.pop(key, None)

    def take(self, count: int) -> bool:
        """Make `count` pages private if that many are available; evicts as needed."""
        if count > self.num_available:
            return False
        while self.num_pages - self.num_private - len(self._references) < count:
            del self._references[self._idle.popitem(last=False)[0]]
        self.num_private += count
        return True

    def publish(self, key: int) -> None:
        """A private page becomes a held published one; a copy of one that is there already is given up."""
        self.num_private -= 1
        self._references[key] = self._references.get(key, 0) + 1
        self._idle.pop(key, None)

    def release(self, keys: list[int], num_private: int) -> None:
        """Give back; the deepest page is evicted before those that lead to it."""
        self.num_private -= num_private
        for key in reversed(keys):
            self._references[key] -= 1
            if not self._references[key]:
                self._idle[key] = None

    def check(self, held: list[list[int]], num_private: int) -> None:
        """Recompute the books from the requests' lists of keys and their number of private pages."""
        assert num_private == self.num_private and self.num_private + len(self._references) <= self.num_pages
        counts = dict.fromkeys(self._references, 0)
        for keys in held:
            for key in keys:
                counts[key] += 1
        assert counts == self._references, "references are wrong"
        assert {key for key, count in counts.items() if not count} == set(self._idle), "idle pages are wrong"


class _Entry:
    """A request and its pages."""

    __slots__ = ("keys", "num_pages", "num_published", "request", "was_running")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.keys = page_keys(request.token_ids, [])
        self.num_published = 0
        """Pages held under `keys`."""
        self.num_pages = 0
        """All pages held."""
        self.was_running = False

    @property
    def held_keys(self) -> list[int]:
        return self.keys[: self.num_published]


class BaselineScheduler:
    """`engine.simulation.clock.Planner` with one of the `BASELINES` policies."""

    def __init__(
        self, config: ResolvedConfig, policy: Literal["fcfs", "prefill-first"], *, step_tokens: int = STEP_TOKENS
    ) -> None:
        assert policy in BASELINES, f"{policy} is not a baseline"
        self.pages = PageCache(config.num_pages)
        self.totals = Totals()
        self.num_preemptions = 0
        self._config = config
        self._policy = policy
        self._step_tokens = step_tokens
        self._entries: dict[str, _Entry] = {}
        self._waiting: deque[_Entry] = deque()
        self._running: list[_Entry] = []
        self._forget: list[str] = []
        self._news = OutputColumns()
        self._free_slots = list(range(config.max_num_seqs))
        self._slots: dict[str, int] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._entries or self._forget or self._news)

    def add(self, request: Request) -> None:
        entry = self._entries[request.request_id] = _Entry(request)
        self._waiting.append(entry)
        most = min(request.num_prompt_tokens + request.sampling.max_tokens, self._config.max_model_len)
        if request.num_prompt_tokens >= self._config.max_model_len or -(-most // PAGE_TOKENS) > self._config.num_pages:
            request.error = RequestError("too_large", "The request can never fit.")
            self._finish(entry, "error")

    def abort(self, request_id: str) -> None:
        entry = self._entries.get(request_id)
        if entry is not None:
            self._finish(entry, "abort")

    def schedule(self, now: float) -> StepPlan:
        new: list[NewRequest] = []
        rows = self._mixed_step(new, now) if self._policy == "fcfs" else self._pure_step(new, now)
        # A victim may have had rows before its pages were needed.
        rows = [r for r in rows if self._entries[r.request_id].request.status is RequestStatus.RUNNING]
        if not rows and not self._forget:
            return StepPlan(step_id=self.totals.step_id)
        self.totals.step_id += 1
        kept = {r.request_id for r in rows}
        plan = StepPlan(
            step_id=self.totals.step_id,
            new=tuple(n for n in new if n.request_id in kept),
            scheduled=tuple(rows),
            finished=tuple(self._forget),
        )
        self._forget.clear()
        return plan

    def update(self, plan: StepPlan, result: StepResult, now: float) -> StepOutputs:
        sampled = dict(zip(result.request_ids, result.token_ids, strict=True))
        for row in plan.scheduled:
            entry = self._entries.get(row.request_id)
            if entry is None:
                continue
            request = entry.request
            end = row.start + row.num_tokens
            self.totals.prompt_tokens += max(0, min(end, request.num_prompt_tokens) - row.start)
            request.num_computed_tokens = end
            self._publish(entry)
            if row.samples:
                self._commit_token(entry, sampled[row.request_id])
        news, self._news = self._news, OutputColumns()
        frame = self.totals.frame(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_free_pages=self.pages.num_available,
            num_free_slots=len(self._free_slots),
        )
        return news.pack(msgspec.structs.replace(frame, num_preemptions=self.num_preemptions))

    def check(self) -> None:
        """Recompute the books; for tests."""
        held = [entry.held_keys for entry in self._entries.values()]
        self.pages.check(held, sum(e.num_pages - e.num_published for e in self._entries.values()))
        assert len(self._running) + len(self._waiting) == len(self._entries)
        assert set(self._slots) == {e.request.request_id for e in self._running}
        assert len(self._slots) + len(self._free_slots) == self._config.max_num_seqs

    def _mixed_step(self, new: list[NewRequest], now: float) -> list[ScheduledTokens]:
        budget = self._step_tokens
        preempted = self.num_preemptions
        rows: list[ScheduledTokens] = []
        for entry in list(self._running):
            row = self._grow(entry, budget) if budget and _runs(entry) else None
            if row is not None:
                rows.append(row)
                budget -= row.num_tokens
        if self.num_preemptions == preempted:
            rows += self._start_waiting(budget, new, now)
        return rows

    def _pure_step(self, new: list[NewRequest], now: float) -> list[ScheduledTokens]:
        budget = self._step_tokens
        preempted = self.num_preemptions
        rows: list[ScheduledTokens] = []
        for entry in [e for e in self._running if e.request.num_uncomputed_tokens > 1]:
            row = self._grow(entry, budget) if budget and _runs(entry) else None
            if row is not None:
                rows.append(row)
                budget -= row.num_tokens
        if self.num_preemptions == preempted:
            rows += self._start_waiting(budget, new, now)
        if rows:
            return rows
        for entry in list(self._running):
            row = self._grow(entry, 1) if _runs(entry) else None
            if row is not None:
                rows.append(row)
        return rows

    def _start_waiting(self, budget: int, new: list[NewRequest], now: float) -> list[ScheduledTokens]:
        """Rows of waiting requests, first come first served, until one does not fit."""
        rows: list[ScheduledTokens] = []
        while budget and self._waiting:
            row = self._start(budget, new, now)
            if row is None:
                break
            rows.append(row)
            budget -= row.num_tokens
        return rows

    def _grow(self, entry: _Entry, budget: int) -> ScheduledTokens | None:
        """Rows of a running request; preempts others, and at last itself, when pages are short."""
        request = entry.request
        end = request.num_computed_tokens + min(request.num_uncomputed_tokens, budget)
        while not self._cover(entry, end):
            victim = self._victim()
            self._preempt(victim)
            if victim is entry:
                return None
        return _rows(request, end)

    def _start(self, budget: int, new: list[NewRequest], now: float) -> ScheduledTokens | None:
        """Rows of the first waiting request, if a slot and pages for them are there."""
        entry = self._waiting[0]
        request = entry.request
        if not self._free_slots:
            return None
        matched = min(self.pages.match(entry.keys), (request.num_tokens - 1) // PAGE_TOKENS)
        self.pages.hold(entry.keys[:matched])
        entry.num_published = entry.num_pages = matched
        request.num_computed_tokens = matched * PAGE_TOKENS
        end = request.num_computed_tokens + min(request.num_uncomputed_tokens, budget)
        if not self._cover(entry, end):
            self._free(entry)
            return None
        if not entry.was_running:
            request.num_cached_tokens = matched * PAGE_TOKENS
            request.start(now)
        entry.was_running = True
        self._waiting.popleft()
        self._running.append(entry)
        request.status = RequestStatus.RUNNING
        self._slots[request.request_id] = self._free_slots.pop()
        new.append(
            NewRequest(
                request_id=request.request_id,
                slot=self._slots[request.request_id],
                token_ids=request.token_ids,
                num_prompt_tokens=request.num_prompt_tokens,
                sampling=request.sampling,
            )
        )
        return _rows(request, end)

    def _cover(self, entry: _Entry, num_tokens: int) -> bool:
        missing = -(-num_tokens // PAGE_TOKENS) - entry.num_pages
        if missing > 0:
            if not self.pages.take(missing):
                return False
            entry.num_pages += missing
        return True

    def _victim(self) -> _Entry:
        if self._policy == "fcfs":
            return self._running[-1]
        return min(self._running, key=lambda e: (e.request.num_output_tokens, -e.request.num_prompt_tokens))

    def _preempt(self, entry: _Entry) -> None:
        """Throw its rows away and let it wait at the head."""
        self.num_preemptions += 1
        self._stop_running(entry)
        entry.request.status = RequestStatus.QUEUED
        entry.request.num_computed_tokens = 0
        entry.keys = page_keys(entry.request.token_ids, entry.keys)
        self._waiting.appendleft(entry)

    def _publish(self, entry: _Entry) -> None:
        """Full pages of computed rows become shareable; those of the answer too."""
        request = entry.request
        full = request.num_computed_tokens // PAGE_TOKENS
        if full > len(entry.keys):
            entry.keys = page_keys(request.token_ids, entry.keys)
        for key in entry.keys[entry.num_published : full]:
            self.pages.publish(key)
        entry.num_published = max(entry.num_published, full)

    def _commit_token(self, entry: _Entry, token_id: int) -> None:
        request = entry.request
        request.append(token_id)
        self.totals.generation_tokens += 1
        if request.num_output_tokens >= request.sampling.max_tokens or request.num_tokens >= self._config.max_model_len:
            self._finish(entry, "length", (token_id,))
        else:
            self._news.add(request, (token_id,))

    def _finish(self, entry: _Entry, reason: FinishReason, token_ids: tuple[int, ...] = ()) -> None:
        request = entry.request
        if request.status is RequestStatus.RUNNING:
            self._stop_running(entry)
        else:
            self._waiting.remove(entry)
        del self._entries[request.request_id]
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        self._news.add(request, token_ids)

    def _stop_running(self, entry: _Entry) -> None:
        self._running.remove(entry)
        self._forget.append(entry.request.request_id)
        self._free_slots.append(self._slots.pop(entry.request.request_id))
        self._free(entry)

    def _free(self, entry: _Entry) -> None:
        self.pages.release(entry.held_keys, entry.num_pages - entry.num_published)
        entry.num_published = entry.num_pages = 0


def page_keys(token_ids: np.ndarray, known: list[int]) -> list[int]:
    """A hash for each full page, over all tokens up to its end; `known` are those of the first pages."""
    keys = list(known)
    raw = np.ascontiguousarray(token_ids, dtype=np.int32).tobytes()
    size = 4 * PAGE_TOKENS
    for i in range(len(keys), len(token_ids) // PAGE_TOKENS):
        keys.append(hash((keys[-1] if keys else 0, raw[i * size : (i + 1) * size])))
    return keys


def _runs(entry: _Entry) -> bool:
    """False for one that was preempted earlier in the same step."""
    return entry.request.status is RequestStatus.RUNNING


def _rows(request: Request, end: int) -> ScheduledTokens:
    start = request.num_computed_tokens
    return ScheduledTokens(
        request_id=request.request_id,
        start=start,
        num_tokens=end - start,
        new_page_ids=(),
        samples=end == request.num_tokens,
    )
