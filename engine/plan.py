"""What the scheduler tells the runner and what it hears back: plain data, complete when constructed."""

from dataclasses import dataclass, field

import msgspec
import numpy as np

from engine.messages import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequest:
    """First sight of a request; later plans name it by its id only."""

    request_id: str
    slot: int
    token_ids: np.ndarray
    """int32 [prompt length]: prompt and, for a resumed request, the tokens it had produced."""
    num_prompt_tokens: int
    sampling: SamplingParams


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


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step. Request order is the row order of the batch. Known requests are not sent again."""

    step_id: int
    new: tuple[NewRequest, ...] = ()
    scheduled: tuple[ScheduledTokens, ...] = ()
    finished: tuple[str, ...] = ()
    """Requests the runner forgets before the step (finished, aborted or preempted)."""
    page_copies: tuple[PageCopy, ...] = ()
    slot_restores: tuple[tuple[int, int], ...] = ()
    """(slot, snapshot id); filled by the prefix cache and by preemption."""
    slot_snapshots: tuple[tuple[int, int, int], ...] = ()
    """(slot, position, snapshot id)."""
    page_loads: tuple[tuple[int, int], ...] = ()
    """(host page, page)."""
    page_spills: tuple[tuple[int, int], ...] = ()
    """(page, host page)."""
    fences: tuple[int, ...] = ()
    """Step ids whose deferred frees are released once this step has run."""
    layer_row_starts: tuple[tuple[int, ...], ...] = ()
    """For each scheduled request the first row computed in each layer; empty means all rows in every layer."""

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
class StepResult:
    """What a step produced: sampled tokens of the requests that sample, in plan order."""

    step_id: int
    request_ids: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)
    """Requests whose own computation failed (NaN logits, for one) and why; they have no token."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequest:
    request_id: str
    reason: FinishReason
