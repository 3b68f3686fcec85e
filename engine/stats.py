"""Running totals of one engine, the pace of its queue, and the frame of gauges made of them."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from engine.messages import EngineStats
from engine.policy import MISPREDICTED

DRAIN_MEMORY_SECONDS = 10.0
LEAST_PACE = 0.01
"""A queue that seems to stand still is not told to wait for ever."""


@dataclass(slots=True, kw_only=True)
class Totals:
    """Counted since the engine started."""

    prompt_tokens: int = 0
    """Prompt rows computed, each once."""
    generation_tokens: int = 0
    num_dropped_results: int = 0
    """Tokens that came back for requests that had ended meanwhile."""
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    """Rows computed again after a preemption."""
    num_mispredicted_steps: int = 0
    num_hibernations: int = 0
    num_recompute_preemptions: int = 0
    """Preemptions of which nothing was kept."""
    num_wakes: int = 0
    moved_bytes: int = 0
    hit_tokens: int = 0
    queried_tokens: int = 0
    miss_counts: Counter[str] = field(default_factory=Counter)
    step_id: int = 0
    step_seconds: float = 0.0
    step_tokens: int = 0
    predicted_step_seconds: float = 0.0

    def count_step(self, *, num_tokens: int, seconds: float, predicted: float) -> None:
        """A step has run: what it took and what had been predicted."""
        self.step_tokens = num_tokens
        self.step_seconds = seconds
        self.predicted_step_seconds = predicted
        if abs(predicted - seconds) > MISPREDICTED * seconds:
            self.num_mispredicted_steps += 1

    def count_start(self, *, num_tokens: int, num_cached: int, miss: str | None) -> None:
        """A request has started for the first time."""
        self.hit_tokens += num_cached
        self.queried_tokens += num_tokens
        self.miss_counts[miss or "none"] += 1

    def frame(self, **gauges: Any) -> EngineStats:
        """The totals and the gauges of the moment, which the scheduler gives by name."""
        return EngineStats(
            step_id=self.step_id,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            num_preemptions=self.num_preemptions,
            num_recomputed_tokens=self.num_recomputed_tokens,
            num_mispredicted_steps=self.num_mispredicted_steps,
            num_hibernations=self.num_hibernations,
            num_wakes=self.num_wakes,
            moved_bytes=self.moved_bytes,
            hit_tokens=self.hit_tokens,
            queried_tokens=self.queried_tokens,
            miss_counts=dict(self.miss_counts),
            step_seconds=self.step_seconds,
            step_tokens=self.step_tokens,
            predicted_step_seconds=self.predicted_step_seconds,
            **gauges,
        )


class DrainMeter:
    """How fast prompt work goes away: predicted seconds of it for each second of the clock, while there is any.

    The unit of the predictions cancels out, so they may all be wrong by the same factor.
    """

    def __init__(self) -> None:
        self.backlog_seconds = 0.0
        # Decayed sums; before anything is measured predictions are taken at their word.
        self._work = 1.0
        self._time = 1.0
        self._planned: tuple[float, float] | None = None
        """When the last step was planned, and the work that it did; None: it left nothing."""

    @property
    def drain_seconds(self) -> float:
        """Until the backlog is done, at the pace of the last ten seconds or so."""
        return self.backlog_seconds / max(self.pace, LEAST_PACE)

    @property
    def pace(self) -> float:
        return self._work / self._time

    def note(self, now: float, backlog_seconds: float, drained_seconds: float) -> None:
        """A step has been planned: the work there was before it, and what it will do of it."""
        if self._planned is not None:
            began, drained = self._planned
            if now > began:
                kept = math.exp((began - now) / DRAIN_MEMORY_SECONDS)
                self._work = kept * self._work + drained
                self._time = kept * self._time + now - began
        self.backlog_seconds = max(0.0, backlog_seconds - drained_seconds)
        # A step that leaves nothing says how much there was, not how fast it could have gone.
        self._planned = (now, drained_seconds) if self.backlog_seconds > 0.0 else None
