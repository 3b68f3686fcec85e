"""What the scheduler tells the runner and what it hears back: plain data, complete when constructed."""

from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import numpy as np

from engine.grammar.masks import TokenMasks
from engine.messages import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequest:
    """First sight of a request; later plans name it by its id only."""

    request_id: str
    slot: int
    token_ids: np.ndarray
    """int32 [prompt length]: prompt and, for a resumed request, the tokens it had produced."""
    num_prompt_tokens: int
    sampling: SamplingParams
    num_computed_tokens: int = 0
    """Tokens whose pages and slot are not computed again: the first plan of a resumed request restores or replays its
    slot at this position and brings the pages before it (shared, loaded or copied ones first) with its first rows."""


class ScheduledTokens(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Rows of one request in this step: positions start .. start + num_tokens.

    A struct because hundreds are made in each step: a frozen dataclass takes ten times as long.
    """

    request_id: str
    start: int
    num_tokens: int
    new_page_ids: tuple[int, ...]
    """Pages appended to the request's table before the step."""
    samples: bool
    """True when the last row is the last known token: a token is sampled from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCopy:
    """Copy page `source` to page `target` before the step (a shared last page is copied before it is written)."""

    source: int
    target: int


class PageSpill(NamedTuple):
    """Copy a page to a host page; the page may be given away in the same plan."""

    page: int
    host_page: int


class PageLoad(NamedTuple):
    """Copy a host page to a page."""

    host_page: int
    page: int


class SlotRestore(NamedTuple):
    """Make a slot what the snapshot holds; the snapshot was taken at `position`."""

    slot: int
    snapshot: int
    position: int


class Replay(NamedTuple):
    """Rebuild a request's slot at `position` from its tokens and the pages before that position."""

    request_id: str
    slot: int
    position: int


class SlotSnapshot(NamedTuple):
    """Keep a slot, whose request has computed exactly `position` tokens, in a snapshot."""

    slot: int
    position: int
    snapshot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step. Request order is the row order of the batch. Known requests are not sent again.

    Order within a step, whatever the order of the fields:

        finished, new -> page_spills -> page_loads, page_copies, slot_restores -> replays -> scheduled -> slot_snapshots

    except that a snapshot at the position of its slot's replay is taken between the two.

    So a page may be spilled and given away in one plan, and a snapshot sees the position that its step has reached (one
    of a request in `StepResult.failed` holds nothing). A slot may be kept in the plan that finishes its request, unless
    the same plan gives it away.

    A page load that fails fails the step (`StepError`): requests of other plans may count on the page. A page copy or a
    slot restore that fails may fail its own request alone.
    """

    step_id: int
    new: tuple[NewRequest, ...] = ()
    scheduled: tuple[ScheduledTokens, ...] = ()
    finished: tuple[str, ...] = ()
    """Requests the runner forgets before the step (finished, aborted or preempted)."""
    page_copies: tuple[PageCopy, ...] = ()
    page_spills: tuple[PageSpill, ...] = ()
    page_loads: tuple[PageLoad, ...] = ()
    slot_restores: tuple[SlotRestore, ...] = ()
    replays: tuple[Replay, ...] = ()
    """Of requests that are scheduled in this plan."""
    slot_snapshots: tuple[SlotSnapshot, ...] = ()
    masks: TokenMasks | None = None
    """Of the requests that sample in this plan under a grammar. They are still being filled when the step begins."""
    fences: tuple[int, ...] = ()
    """Step ids whose deferred frees are released once this step has run."""

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.scheduled)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log probabilities at one sampled position."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobs:
    """Log probabilities of N consecutive prompt tokens, each given all before it."""

    start: int
    """Position of the first of them, at least 1."""
    logprobs_N: np.ndarray
    """float32."""
    ranks_N: np.ndarray
    """int32; 1: no token was likelier."""
    top_ids_NK: np.ndarray
    """int32: the likeliest tokens, best first, ties by lower id."""
    top_logprobs_NK: np.ndarray
    """float32."""


NOTHING_LEFT = "the sampling parameters leave no token to choose"
"""Reason in `StepResult.failed` that the request itself is to blame for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step produced: sampled tokens of the requests that sample, in plan order."""

    step_id: int
    request_ids: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    prompt_logprobs: dict[str, PromptLogprobs] = field(default_factory=dict)
    """Of the prompt tokens that this step's rows predict, by the requests that asked for them."""
    failed: dict[str, str] = field(default_factory=dict)
    """Requests whose own computation failed (NaN logits, for one) and why; they have no token."""
    lost: bool = False
    """The step failed as a whole: nothing of what it was to write is there."""
    seconds: float = 0.0
    load_seconds: float = 0.0
    """Of `seconds`: copies from host memory, page loads and slot restores, for which the rows wait. 0: not measured."""
    save_seconds: float = 0.0
    """Of `seconds`: copies to host memory, page spills and slot snapshots, as far as the rows wait for them."""
