"""Running prompts whose pages others may wait for, while a step is built: is waiting sooner than computing as well?"""

from engine.budget import StepBudget
from engine.config import SchedulingConfig
from engine.cost_model import CostModel
from engine.kv.manager import KVManager
from engine.kv.resume import ResumePlan
from engine.policy import LEAST_PREFILL_SHARE, STANDSTILL_SECONDS, longest_prefix_wait
from engine.prefix_waits import PrefixWaits, num_shared_pages
from engine.request import Request
from engine.resume_costs import CopyAndComputeCosts


class Leaders:
    """The leaders of one step, and who begins to wait for them in it."""

    def __init__(
        self,
        *,
        now: float,
        budget: StepBudget,
        costs: CostModel,
        resume_costs: CopyAndComputeCosts,
        config: SchedulingConfig,
        kv: KVManager,
        waits: PrefixWaits,
    ) -> None:
        self._now = now
        self._budget = budget
        self._costs = costs
        self._resume_costs = resume_costs
        self._config = config
        self._kv = kv
        self._waits = waits
        self._leaders: list[Request] = []
        self._ends: dict[str, int] = {}
        """Where the chunks of this step end."""
        self._overlapping: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._leaders)

    def add(self, request: Request) -> None:
        """A prompt runs; without keys its pages have no names and nobody can wait for them."""
        if request.keys is not None:
            self._leaders.append(request)

    def computes(self, request: Request, end: int) -> None:
        """A prompt has a chunk in this step."""
        self._ends[request.request_id] = end

    def overlaps(self, request: Request) -> bool:
        """Whether a waiting request was found to share a prefix in flight."""
        return request.request_id in self._overlapping

    def park(self, request: Request, plan: ResumePlan) -> bool:
        """Let a waiting request wait for a prefix in flight, if that is sooner than to follow `plan` beside it."""
        best: tuple[float, Request, int] | None = None
        for leader in self._leaders:
            position = self._shared_with(leader, request)
            if position <= plan.resume_at:
                continue
            self._overlapping.add(request.request_id)
            gained = self._seconds_gained(leader, position, request, plan.est_seconds)
            if gained > (0.0 if best is None else best[0]):
                best = (gained, leader, position)
        if best is None or (request.wait_until is not None and request.wait_until <= self._now):
            return False
        _, leader, position = best
        if position > self._end_of(leader) and self._kv.snapshots.num_places:
            leader.stops.setdefault(position, "junction")
        if request.wait_until is None:
            longest = longest_prefix_wait(request.service, plan.est_seconds, self._config)
            request.wait_until = self._now + longest
        self._waits.begin(request, leader, position)
        return True

    def _shared_with(self, leader: Request, request: Request) -> int:
        """Position before which a running prompt computes, or has computed, pages that a waiting one needs; 0: none."""
        if leader.priority > request.priority or self._now - leader.last_chunk_time >= STANDSTILL_SECONDS:
            return 0
        assert leader.grant is not None and leader.grant.tip is not None
        assert leader.keys is not None and request.keys is not None
        page_tokens = self._kv.layout.page_tokens
        num_pages = num_shared_pages(leader.keys, request.keys, leader.grant.tip.depth)
        return min(num_pages, (request.num_tokens - 1) // page_tokens) * page_tokens

    def _seconds_gained(self, leader: Request, position: int, request: Request, own: float) -> float:
        """How much sooner a waiting prompt is computed if it waits for the leader to get to a position.

        Both would be computed side by side otherwise: where the leader is served no later, its work comes on top of the
        request's `own` seconds; a long leader takes its share alone.
        """
        left = self._costs.prefill_seconds(self._end_of(leader), position)
        if leader.service <= request.service:
            beside, behind = own + left, left
        elif left:
            share = max(self._config.long_prefill_share, LEAST_PREFILL_SHARE)
            beside, behind = own / (1.0 - self._config.long_prefill_share), left / share
        else:
            beside, behind = own, 0.0
        if left and self._kv.snapshots.num_places:
            behind += self._resume_costs.load_seconds(self._kv.layout.bytes_per_snapshot)
        else:
            behind += self._costs.replay_seconds(position)
        behind += self._budget.predicted_seconds + self._costs.prefill_seconds(position, request.num_tokens)
        return beside - behind

    def _end_of(self, leader: Request) -> int:
        return self._ends.get(leader.request_id, leader.num_computed_tokens)
