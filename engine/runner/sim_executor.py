"""An executor without a model: deterministic tokens, a cost model, and a check of every plan. Torch-free.

A token is a hash of the request's whole history and its seed, so chunking, batching and neighbours cannot change it:
equal requests get equal tokens under every budget. Under a grammar the hash picks one of the tokens that it allows; a
script is taken at its word, and the engine ends the request where that leaves the grammar.

Every plan is compared with the executor's own record of requests, pages and slots: a page is the bytes of the tokens
written to it, a slot and a snapshot are a hash of the whole history. A plan that would read or write the wrong memory
on a device raises AssertionError here.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.config import EngineConfig, MachineFacts, ResolvedConfig, resolve
from engine.grammar.masks import TokenMasks
from engine.messages import ForcedToken, unpack_ids
from engine.plan import (
    NOTHING_LEFT,
    NewRequest,
    PromptLogprobs,
    ScheduledTokens,
    SlotSnapshot,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from model.config import ModelConfig, load_config
from model.kv_layout import PAGE_TOKENS
from model.presets import preset

_SIM_BYTES = 1 << 40
_SIM_CORES = 1024

Script = Callable[[np.ndarray], Sequence[int]]
"""Prompt ids to the tokens of the answer; after the last of them comes EOS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds of a step: base + per row + per (row x tokens of context before it)."""

    base_seconds: float = 0.002
    row_seconds: float = 2e-6
    context_seconds: float = 0.0

    def seconds(self, plan: StepPlan) -> float:
        work = sum(s.num_tokens * s.start for s in plan.scheduled)
        return self.base_seconds + self.row_seconds * plan.num_tokens + self.context_seconds * work


@dataclass(slots=True, kw_only=True)
class Faults:
    """What shall go wrong, for tests."""

    raise_in_step: dict[int, Exception] = field(default_factory=dict)
    """Step id to the exception that leaves `execute`."""
    fail_requests: dict[str, str] = field(default_factory=dict)
    """Request id to the reason; the request fails at its first token."""
    hang_in_step: int | None = None
    """The step that does not return for `hang_seconds`."""
    hang_seconds: float = math.inf


@dataclass(slots=True)
class _Slot:
    """State of one request at a position."""

    position: int
    history: "hashlib.blake2b"
    """Of all tokens before the position."""

    def copy(self) -> "_Slot":
        return _Slot(self.position, self.history.copy())


@dataclass(slots=True)
class _Page:
    content: bytearray = field(default_factory=bytearray)
    """int32 bytes of the tokens whose rows it holds."""
    readers: set[str] = field(default_factory=set)
    """Requests with the page in their tables."""


@dataclass(slots=True, kw_only=True)
class _Record:
    """What a device would remember of one request."""

    new: NewRequest
    sampled: list[int] = field(default_factory=list)
    num_computed: int = 0
    page_ids: list[int] = field(default_factory=list)
    stands: bool = True
    """Whether the slot is that of `num_computed`: False until it is restored or replayed."""

    @property
    def num_tokens(self) -> int:
        return len(self.new.token_ids) + len(self.sampled)

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.new.num_prompt_tokens

    @property
    def output(self) -> list[int]:
        return [*self.new.token_ids[self.new.num_prompt_tokens :].tolist(), *self.sampled]

    def raw_tokens(self, start: int, end: int) -> bytes:
        """Tokens [start, end) as int32 little-endian bytes."""
        known = len(self.new.token_ids)
        head = self.new.token_ids[start:end].astype("<i4").tobytes()
        tail = self.sampled[max(0, start - known) : max(0, end - known)]
        return head + np.asarray(tail, dtype="<i4").tobytes()


class SimExecutor:
    """Implements `engine.executor.Executor`."""

    def __init__(
        self,
        config: ResolvedConfig,
        model: ModelConfig,
        *,
        eos_probability: float = 0.0,
        script: Script | None = None,
        cost: CostModel | None = None,
        sleep: bool = False,
        faults: Faults | None = None,
    ) -> None:
        """`script` replaces the hash. `sleep` really waits as long as the cost model says."""
        self.config = config
        self.model = model
        self.eos_token_id = model.eos_token_id
        self.num_steps = 0
        self._eos_probability = eos_probability
        self._script = script
        self._cost = cost or CostModel()
        self._sleep = sleep
        self._faults = faults or Faults()
        self._records: dict[str, _Record] = {}
        self._pages: dict[int, _Page] = {}
        self._slots: dict[int, _Slot] = {}
        self._snapshots: dict[int, _Slot] = {}
        self._host_pages: dict[int, bytes] = {}
        self._slot_owner: dict[int, str] = {}
        self._last_step_id = 0

    def execute(self, plan: StepPlan) -> StepResult:
        self._forget(plan)
        self._check_step(plan)
        if plan.step_id == self._faults.hang_in_step:
            _hang(self._faults.hang_seconds)
        if plan.step_id in self._faults.raise_in_step:
            raise self._faults.raise_in_step[plan.step_id]
        for new in plan.new:
            self._learn(new)
        self._move(plan)
        sampled: list[tuple[str, int, TokenLogprobs | None]] = []
        allowed, failed = ({}, {}) if plan.masks is None else _allowed(plan.masks)
        prompt_logprobs: dict[str, PromptLogprobs] = {}
        for rows in plan.scheduled:
            record = self._run_rows(rows)
            scores = self._prompt_logprobs(record, rows)
            if scores is not None:
                prompt_logprobs[rows.request_id] = scores
            if not rows.samples:
                continue
            if rows.request_id in self._faults.fail_requests:
                failed[rows.request_id] = self._faults.fail_requests[rows.request_id]
                continue
            if rows.request_id in failed:
                continue
            token_id = self._sample(record, allowed.get(rows.request_id))
            if token_id is None:
                failed[rows.request_id] = NOTHING_LEFT
                continue
            record.sampled.append(token_id)
            sampled.append((rows.request_id, token_id, self._logprobs(record, token_id)))
        for kept in plan.slot_snapshots:
            if not _at_replay(kept, plan):
                self._keep(kept)
        seconds = self._cost.seconds(plan)
        if self._sleep:
            time.sleep(seconds)
        self.num_steps += 1
        return StepResult(
            step_id=plan.step_id,
            request_ids=tuple(s[0] for s in sampled),
            token_ids=tuple(s[1] for s in sampled),
            logprobs=tuple(s[2] for s in sampled),
            prompt_logprobs=prompt_logprobs,
            failed=failed,
            seconds=seconds,
        )

    def close(self) -> None:
        self._records.clear()

    def _forget(self, plan: StepPlan) -> None:
        for request_id in plan.finished:
            record = self._records.pop(request_id, None)
            if record is not None:
                for page_id in record.page_ids:
                    self._pages[page_id].readers.discard(request_id)
                del self._slot_owner[record.new.slot]

    def _check_step(self, plan: StepPlan) -> None:
        assert plan.step_id > self._last_step_id, "step ids grow"
        self._last_step_id = plan.step_id
        assert plan.num_tokens <= self.config.max_num_batched_tokens, f"{plan.num_tokens} rows in one step"
        ids = [s.request_id for s in plan.scheduled]
        assert len(set(ids)) == len(ids), "a request is scheduled twice"
        assert {n.request_id for n in plan.new} <= set(ids), "a new request has no rows"
        places = [s.snapshot for s in plan.slot_snapshots]
        assert len(set(places)) == len(places), "two snapshots in one place"

    def _learn(self, new: NewRequest) -> None:
        assert new.request_id not in self._records, f"{new.request_id} is new twice"
        assert 0 <= new.slot < self.config.max_num_seqs, f"slot {new.slot}"
        assert new.slot not in self._slot_owner, f"slot {new.slot} has two owners"
        assert new.token_ids.dtype == np.int32 and len(new.token_ids) >= new.num_prompt_tokens >= 1
        assert new.sampling.seed is not None, "the engine draws a seed when the request arrives"
        self._slot_owner[new.slot] = new.request_id
        assert 0 <= new.num_computed_tokens < len(new.token_ids)
        record = _Record(new=new, num_computed=new.num_computed_tokens, stands=not new.num_computed_tokens)
        self._records[new.request_id] = record
        if record.stands:
            self._slots[new.slot] = _Slot(0, hashlib.blake2b(digest_size=16))

    def _move(self, plan: StepPlan) -> None:
        """Copies before the first row."""
        for page, host_page in plan.page_spills:
            assert 0 <= host_page < self.config.num_host_pages, f"host page {host_page}"
            self._host_pages[host_page] = bytes(self._page(page).content)
        for host_page, page in plan.page_loads:
            self._fill(page, self._host_pages[host_page])
        for copy in plan.page_copies:
            self._fill(copy.target, bytes(self._page(copy.source).content))
        resumed = {new.slot: new for new in plan.new if new.num_computed_tokens}
        rows = {s.request_id: s for s in plan.scheduled}
        for slot, snapshot, position in plan.slot_restores:
            saved = self._snapshots[snapshot]
            assert saved.position == position, f"snapshot {snapshot} is one of {saved.position}, not of {position}"
            self._slots[slot] = saved.copy()
            self._resume(resumed[slot], position, rows[resumed[slot].request_id])
        for request_id, slot, position in plan.replays:
            assert resumed[slot].request_id == request_id
            assert position % PAGE_TOKENS == 0, "a replay ends with a page"
            content = self._content(rows[request_id].new_page_ids, position)
            self._slots[slot] = _Slot(position, hashlib.blake2b(content, digest_size=16))
            self._resume(resumed[slot], position, rows[request_id])
        for kept in plan.slot_snapshots:
            if _at_replay(kept, plan):
                self._keep(kept)

    def _keep(self, kept: SlotSnapshot) -> None:
        assert 0 <= kept.snapshot < self.config.num_snapshots, f"snapshot {kept.snapshot}"
        slot = self._slots[kept.slot]
        assert slot.position == kept.position, f"slot {kept.slot} stands at {slot.position}, not at {kept.position}"
        self._snapshots[kept.snapshot] = slot.copy()

    def _resume(self, new: NewRequest, position: int, rows: ScheduledTokens) -> None:
        """Check that pages and slot are those of a request's own history up to a position."""
        record = self._records[new.request_id]
        assert new.num_computed_tokens == position and not record.stands
        content = self._content(rows.new_page_ids, position)
        assert content == record.raw_tokens(0, position), f"{new.request_id}: its pages hold other tokens"
        own = hashlib.blake2b(content, digest_size=16).digest()
        assert self._slots[new.slot].history.digest() == own, f"{new.request_id}: its slot is another request's"
        record.stands = True

    def _content(self, page_ids: Sequence[int], position: int) -> bytes:
        """Tokens before a position, as the pages have them."""
        whole = b"".join(bytes(self._page(page_id).content) for page_id in page_ids[: -(-position // PAGE_TOKENS)])
        return whole[: 4 * position]

    def _page(self, page_id: int) -> "_Page":
        assert 0 <= page_id < self.config.num_pages, f"page {page_id}"
        return self._pages.setdefault(page_id, _Page())

    def _fill(self, page_id: int, content: bytes) -> None:
        page = self._page(page_id)
        assert not page.readers, f"page {page_id} is overwritten while {page.readers} read it"
        page.content = bytearray(content)

    def _run_rows(self, rows: ScheduledTokens) -> _Record:
        record = self._records[rows.request_id]
        end = rows.start + rows.num_tokens
        assert rows.start == record.num_computed, f"{rows.request_id}: row {rows.start} after {record.num_computed}"
        assert record.num_computed < end <= record.num_tokens, f"{rows.request_id}: rows of unknown tokens"
        assert rows.samples == (end == record.num_tokens), f"{rows.request_id}: samples is wrong"
        assert end <= self.config.max_model_len
        for page_id in rows.new_page_ids:
            assert page_id not in record.page_ids, f"page {page_id} has two owners"
            self._page(page_id).readers.add(rows.request_id)
            record.page_ids.append(page_id)
        assert len(record.page_ids) * PAGE_TOKENS >= end, f"{rows.request_id}: rows outside its pages"
        slot = self._slots[record.new.slot]
        assert record.stands and slot.position == rows.start, f"{rows.request_id}: its slot stands elsewhere"
        slot.history.update(record.raw_tokens(rows.start, end))
        slot.position = record.num_computed = end
        self._write(record, rows)
        return record

    def _write(self, record: _Record, rows: ScheduledTokens) -> None:
        start, end = rows.start, rows.start + rows.num_tokens
        while start < end:
            stop = min(end, (start // PAGE_TOKENS + 1) * PAGE_TOKENS)
            page_id = record.page_ids[start // PAGE_TOKENS]
            page = self._pages[page_id]
            assert page.readers == {rows.request_id}, f"page {page_id} has two owners"
            first = 4 * (start % PAGE_TOKENS)
            assert len(page.content) >= first, f"page {page_id} has a hole"
            page.content[first:] = record.raw_tokens(start, stop)
            start = stop

    def _sample(self, record: _Record, allowed: np.ndarray | None) -> int | None:
        """The next token, one of the ids in `allowed` if it is not None; None when what the request excludes leaves
        none."""
        sampling = record.new.sampling
        if sampling.forced_token is not None:
            forced = _forced(sampling.forced_token, record.output)
            if forced is not None:
                return forced
        if self._script is not None:
            answer = self._script(record.new.token_ids[: record.new.num_prompt_tokens])
            place = record.num_output
            if sampling.forced_token is not None:
                place = _place(answer, sampling.forced_token, record.output)
            return self._permitted(answer[place] if place < len(answer) else self.eos_token_id, record, set())
        early = record.num_output < sampling.min_tokens
        may_end = not early and not sampling.ignore_eos
        assert sampling.seed is not None
        history = self._slots[record.new.slot].history.copy()
        history.update((sampling.seed % 2**64).to_bytes(8, "little"))
        word = int.from_bytes(history.digest(), "little")
        others = np.empty(0, dtype=np.int64)
        if allowed is not None:
            may_end = may_end and self.eos_token_id in allowed
            others = allowed[allowed != self.eos_token_id]
            if not len(others):
                return self.eos_token_id
        if may_end and (word >> 64) / 2.0**64 < self._eos_probability:
            return self.eos_token_id
        if allowed is not None:
            return int(others[word % len(others)])
        token_id = word % self.model.vocab_size
        masked = {self.eos_token_id, *(sampling.stop_token_ids if early else ())}
        return self._permitted(token_id, record, masked)

    def _permitted(self, token_id: int, record: _Record, masked: set[int]) -> int | None:
        """The first token from `token_id` on that neither `masked` nor the request excludes."""
        sampling = record.new.sampling
        if token_id not in masked and not sampling.bad_words and sampling.allowed_token_ids is None:
            return token_id
        output = record.output if sampling.bad_words else []
        banned = masked | {w[-1] for w in sampling.bad_words if output[len(output) - len(w) + 1 :] == [*w[:-1]]}
        everything = range(self.model.vocab_size)
        allowed = everything if sampling.allowed_token_ids is None else sorted(unpack_ids(sampling.allowed_token_ids))
        left = (t for t in (*(t for t in allowed if t >= token_id), *allowed) if t not in banned)
        found = next(left, None)
        return None if found is None else int(found)

    def _prompt_logprobs(self, record: _Record, rows: ScheduledTokens) -> PromptLogprobs | None:
        """Like `_logprobs`, for the prompt tokens that these rows predict."""
        num_top, prompt = record.new.sampling.prompt_logprobs, record.new.num_prompt_tokens
        first, stop = rows.start + 1, min(rows.start + rows.num_tokens + 1, prompt)
        if num_top is None or first >= stop:
            return None
        token_ids_N = record.new.token_ids[first:stop]
        top_ids_NK = (token_ids_N[:, None] + np.arange(num_top)) % self.model.vocab_size
        halves_K = -np.arange(1, num_top + 1) * math.log(2.0)
        return PromptLogprobs(
            start=first,
            logprobs_N=np.full(len(token_ids_N), math.log(0.5), dtype=np.float32),
            ranks_N=np.ones(len(token_ids_N), dtype=np.int32),
            top_ids_NK=top_ids_NK.astype(np.int32),
            top_logprobs_NK=np.broadcast_to(halves_K, top_ids_NK.shape).astype(np.float32),
        )

    def _logprobs(self, record: _Record, token_id: int) -> TokenLogprobs | None:
        count = record.new.sampling.logprobs
        if count is None:
            return None
        top_ids = tuple((token_id + i) % self.model.vocab_size for i in range(count))
        return TokenLogprobs(
            logprob=math.log(0.5), top_ids=top_ids, top_logprobs=tuple(-(i + 1) * math.log(2.0) for i in range(count))
        )


def create_sim_executor(config: EngineConfig) -> SimExecutor:
    """The executor of `simulate`: sizes from the configuration, waits as the cost model says, answers of ~64 tokens.

    `model_dir` gives the model's configuration; when it is empty the preset `nano` does.

    Raises:
        ConfigError: `config.json` describes a model that Fathom cannot run.
        OSError: there is no `config.json`.
    """
    model = load_config(Path(config.model_dir)) if config.model_dir else preset("nano")
    return SimExecutor(sim_config(config, model), model, eos_probability=1 / 64, sleep=True)


def sim_config(config: EngineConfig, model: ModelConfig) -> ResolvedConfig:
    """Settle every choice on a machine that has enough of everything: nothing is allocated, only the books count.

    Raises:
        EngineConfigError: flags that contradict each other or the model.
    """
    device = "cpu" if config.device == "auto" else config.device
    facts = MachineFacts(device=device, has_bf16=True, free_bytes=_SIM_BYTES, num_cores=_SIM_CORES)
    return resolve(config, model, facts)


def _forced(forced: ForcedToken, output: Sequence[int]) -> int | None:
    """The token that must come next."""
    if len(output) < forced.after or not {forced.token_id, *forced.unless}.isdisjoint(output):
        return None
    return forced.token_id


def _place(answer: Sequence[int], forced: ForcedToken, output: Sequence[int]) -> int:
    """Where a scripted answer goes on; a forced token cuts it short up to its own such token."""
    if len(output) <= forced.after or output[forced.after] != forced.token_id:
        return len(output)
    if forced.token_id not in answer or not {forced.token_id, *forced.unless}.isdisjoint(answer[: forced.after]):
        return len(output)
    return list(answer).index(forced.token_id) + len(output) - forced.after


def _allowed(masks: TokenMasks) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """By request: ids of the tokens that the mask allows, and why there is no mask."""
    mask_NW, failed = masks.wait()
    bits_NV = np.unpackbits(mask_NW.view(np.uint8), axis=1, bitorder="little")
    allowed = {request_id: np.flatnonzero(row) for request_id, row in zip(masks.request_ids, bits_NV, strict=True)}
    return allowed, {masks.request_ids[row]: f"no mask ({why})" for row, why in failed.items()}


def _at_replay(kept: SlotSnapshot, plan: StepPlan) -> bool:
    return any((kept.slot, kept.position) == (replay.slot, replay.position) for replay in plan.replays)


def _hang(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.05)
