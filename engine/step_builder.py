"""Builds one step: decode rows, then prompt chunks while rows and predicted seconds are left.

Prompts that run and prompts that wait are one line, in the order of the policy; a waiting one starts when its turn has
come and there is room for it. The favoured prompt has a share of the seconds kept for it wherever it stands in line.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from engine.admission_order import AdmissionOrder
from engine.budget import StepBudget
from engine.config import SchedulingConfig
from engine.cost_model import CostModel
from engine.fairness import FavouredShare, TenantClock
from engine.kv.grant import Shortage
from engine.kv.manager import KVManager
from engine.kv.resume import MissReason, ResumePlan
from engine.leaders import Leaders
from engine.plan import NewRequest, ScheduledTokens
from engine.policy import (
    LEAST_CHUNK,
    MOST_BEGUN,
    MOST_CHUNKS,
    MOST_PARKED,
    MOST_SHORTAGES,
    PERIODIC_SNAPSHOT_TOKENS,
    OrderKey,
    ServiceClass,
    is_pressed,
    long_seconds,
    order_key,
    prefill_seconds,
    slack,
    step_seconds,
)
from engine.request import Request, RequestStatus
from engine.resume_costs import CopyAndComputeCosts
from engine.stats import Totals
from engine.waiting import Scan


class StepBuilder:
    """One step under construction: `rows` of the plan and the requests that it starts."""

    def __init__(
        self,
        *,
        step_id: int,
        now: float,
        budget: StepBudget,
        costs: CostModel,
        resume_costs: CopyAndComputeCosts,
        config: SchedulingConfig,
        kv: KVManager,
        tenants: TenantClock,
        share: FavouredShare,
        admission: AdmissionOrder,
        running: dict[str, Request],
        totals: Totals,
    ) -> None:
        """`running` is the scheduler's own; requests that start are added to it."""
        self.rows: list[ScheduledTokens] = []
        self.new: list[NewRequest] = []
        self.backlog_seconds = 0.0
        """Work of the prompts that were running when the step began, as it was predicted when they were queued."""
        self.drained_seconds = 0.0
        """What of that and of the queue the step does, in the same predictions: they may be old, but they agree."""
        self._step_id = step_id
        self._now = now
        self._budget = budget
        self._costs = costs
        self._resume_costs = resume_costs
        self._config = config
        self._kv = kv
        self._tenants = tenants
        self._share = share
        self._admission = admission
        self._running = running
        self._totals = totals
        self._plans: dict[str, ResumePlan] = {}
        """Ways into the waiting requests that were looked at, until memory changes hands."""
        self._brought: dict[str, tuple[int, ...]] = {}
        """Pages that a starting request brings: they are named with its first rows."""
        self._line: dict[str, tuple[float, Request]] = {}
        """Running prompts that have no chunk in this step yet, with their seconds to go."""
        self._leaders = Leaders(
            now=now,
            budget=budget,
            costs=costs,
            resume_costs=resume_costs,
            config=config,
            kv=kv,
            waits=admission.prefixes,
        )
        self._num_begun: Counter[int] = Counter()
        """Prompts that are begun and will not be finished in this step, by priority."""
        self._decoding: set[ServiceClass] = set()
        self._favoured: Request | None = None
        self._favoured_seconds = 0.0
        self._prompt_seconds = 0.0
        self._long_seconds = 0.0
        self._gives_first_tokens = False
        """Whether an interactive prompt is computed to its end, or to the stop before it: its first token waits for
        this step and the next one then."""

    def add_decodes(self, requests: Sequence[Request], grown: Mapping[str, tuple[int, ...]]) -> None:
        """One row each; `grown` has the pages that were appended to their tables."""
        context = 0
        for request in requests:
            request_id, start = request.request_id, request.num_computed_tokens
            context += start + 1
            request.last_step_id = self._step_id
            self.rows.append(
                ScheduledTokens(
                    request_id=request_id,
                    start=start,
                    num_tokens=1,
                    new_page_ids=grown.get(request_id, ()),
                    samples=True,
                )
            )
        self._decoding = {request.service for request in requests}
        seconds = self._budget.add_decodes(len(self.rows), context)
        for tenant, count in Counter([request.tenant for request in requests]).items():
            self._tenants.charge(tenant, seconds * count / len(self.rows))

    def add_prompts(self, prompts: Iterable[Request]) -> None:
        """Chunks of the running prompts and of waiting ones."""
        for request in prompts:
            left = self._costs.prefill_seconds(request.num_computed_tokens, request.num_tokens)
            self._line[request.request_id] = (left, request)
            self._num_begun[request.priority] += 1
            self._leaders.add(request)
            self.backlog_seconds += request.prefill_seconds * request.num_uncomputed_tokens / request.num_tokens
        alone = len(self._line) + len(self._admission.waiting) == 1
        seconds = step_seconds(self._decoding, self._is_pressed(), self._config, alone=alone, spread=self._costs.spread)
        self._budget.open_prefill(prefill_seconds(seconds, self._budget.predicted_seconds))
        seconds_kept = self._favour()
        self._serve_line(seconds_kept)
        if self._favoured is not None:
            if self._favoured.request_id in self._line:
                self._take(self._favoured, self._rows_for(self._favoured))
            self._share.settle(favoured_seconds=self._favoured_seconds, all_seconds=self._prompt_seconds)

    def _serve_line(self, seconds_kept: float) -> None:
        rows_kept = int(self._budget.rows_left * seconds_kept / self._budget.prefill_seconds)
        scan = self._admission.waiting.scan()
        first = self._admission.first()
        num_chunks = num_passed = num_parked = 0
        while num_chunks < MOST_CHUNKS:
            may_look = num_passed < MOST_SHORTAGES and num_parked < MOST_PARKED
            request = self._head(scan if may_look else None, first)
            if request is None:
                return
            if request is not first:
                if self._is_hopeless(request):
                    num_passed += 1
                    scan.skip()
                    continue
                if self._parks(request):
                    num_parked += 1
                    continue
            is_favoured = request is self._favoured
            num_rows = self._rows_for(request, 0.0 if is_favoured else seconds_kept, 0 if is_favoured else rows_kept)
            if not num_rows:
                return
            if request.status is RequestStatus.RUNNING or self._start(request, num_rows):
                self._take(request, num_rows)
                num_chunks += 1
            else:
                num_passed += 1
                if request is not first:
                    scan.skip()
            if request is first:
                first = None

    def _head(self, scan: Scan | None, first: Request | None) -> Request | None:
        """Who is served next: a running prompt or, with a scan, a waiting one; `first` leads all of its priority."""
        heads: list[tuple[OrderKey, Request]] = [
            (self._order(request, left), request) for left, request in self._line.values()
        ]
        if self._kv.num_free_slots:
            waiting = None if scan is None else scan.head()
            if waiting is not None:
                heads.append(waiting)
            if first is not None:
                heads.append(((first.priority, -1, 0.0, 0.0, 0.0, 0), first))
        return min(heads)[1] if heads else None

    def _order(self, request: Request, left_seconds: float) -> OrderKey:
        return order_key(
            priority=request.priority,
            service=request.service,
            tenant_seconds=self._tenants[request.tenant],
            work_seconds=left_seconds,
            arrival=request.arrival_time,
            order=request.order,
        )

    def _favour(self) -> float:
        """Settle which prompt has the share; returns the seconds kept for it.

        One that waits begins at once, with its share: it may find no slot otherwise while shorter ones keep coming.
        """
        seconds_kept = self._share.allowance(self._budget.prefill_seconds)
        for request in self._pressing():
            if request.status is RequestStatus.RUNNING:
                self._favoured = request
                return seconds_kept
            if not self._kv.num_free_slots or self._is_hopeless(request) or self._parks(request):
                continue
            num_rows = self._rows_for(request, self._budget.seconds_left - seconds_kept)
            if num_rows and self._start(request, num_rows):
                self._favoured = request
                self._take(request, num_rows)
                return 0.0
        self._share.forget()
        return 0.0

    def _pressing(self) -> Iterator[Request]:
        """Who may have the share, best first: the running long prompt with the least slack; without one the long
        prompt that waits; without that any prompt that cannot be in time any more.
        """
        waiting = self._admission.waiting
        running = {s: [entry for entry in self._line.values() if entry[1].service is s] for s in ServiceClass}
        if running[ServiceClass.LONG]:
            yield min(running[ServiceClass.LONG], key=self._pressure)[1]
            return
        long = waiting.most_urgent(ServiceClass.LONG)
        if long is not None:
            yield long
        late = [(self._pressure(entry), entry[1]) for entry in running[ServiceClass.INTERACTIVE]]
        short = waiting.most_urgent(ServiceClass.INTERACTIVE)
        if short is not None:
            late.append(((short.priority, short.latest_start - self._now, short.order), short))
        late = [(pressure, request) for pressure, request in late if pressure[1] < 0.0]
        if late:
            yield min(late)[1]

    def _is_pressed(self) -> bool:
        """Whether any prompt, running or waiting, may come late."""
        for entry in self._line.values():
            if is_pressed(self._pressure(entry)[1], entry[1].service, self._config):
                return True
        for service in ServiceClass:
            waiting = self._admission.waiting.most_urgent(service)
            if waiting is not None and is_pressed(waiting.latest_start - self._now, service, self._config):
                return True
        return False

    def _pressure(self, entry: tuple[float, Request]) -> tuple[int, float, int]:
        left, request = entry
        seconds = slack(self._now, request.arrival_time, request.service, request.prefill_seconds, left, self._config)
        return (request.priority, seconds, request.order)

    def _rows_for(self, request: Request, seconds_kept: float = 0.0, rows_kept: int = 0) -> int:
        start = request.num_computed_tokens
        replayed = 0.0
        if request.status is RequestStatus.QUEUED:
            plan = self._plan_for(request)
            start = plan.resume_at
            # The first prompt of a step begins even if its replay alone takes longer than a step.
            if plan.replay and self._budget.features.num_prefill_rows:
                replayed = self._costs.replay_seconds(start)
        wanted = request.limit_after(start) - start
        if request.service is ServiceClass.LONG:
            allowed = long_seconds(self._budget.prefill_seconds, self._gives_first_tokens, self._config)
            seconds_kept = max(seconds_kept, self._budget.seconds_left - (allowed - self._long_seconds))
        return self._budget.rows_for(start, wanted, seconds_kept=seconds_kept + replayed, rows_kept=rows_kept)

    def _is_full(self, priority: int) -> bool:
        """Whether so many prompts are begun that one of this priority starts only if it is finished in this step."""
        return sum(n for p, n in self._num_begun.items() if p <= priority) >= MOST_BEGUN

    def _is_hopeless(self, request: Request) -> bool:
        """Whether a waiting request was found not to fit lately, or not to be short enough, and nothing has changed."""
        if not self._running or request.status is not RequestStatus.QUEUED:
            return False
        if self._admission.is_short(request, self._step_id):
            return True
        seconds = self._budget.seconds_left
        return self._is_full(request.priority) and self._admission.is_held_back(request, seconds, self._step_id)

    def _parks(self, request: Request) -> bool:
        """Let a waiting request wait for a prefix in flight if that is sooner than computing it as well."""
        if request.status is not RequestStatus.QUEUED or request.num_preemptions:
            return False
        if request.lookup_keys is None or not self._leaders:
            return False
        return self._leaders.park(request, self._plan_for(request))

    def _plan_for(self, request: Request) -> ResumePlan:
        """The way into a waiting request as memory stands."""
        plan = self._plans.get(request.request_id)
        if plan is None:
            plan = self._plans[request.request_id] = self._kv.probe(request.lookup_keys, request.token_ids)
        return plan

    def _start(self, request: Request, num_rows: int) -> bool:
        """Admit a waiting request that would get `num_rows` rows now."""
        plan = self._plan_for(request)
        finishes = num_rows == request.num_tokens - plan.resume_at
        if not finishes and self._is_full(request.priority):
            self._admission.hold_back(request, plan.est_seconds, self._step_id)
            return False
        admitted = self._admission.admit(request, self._running.values(), plan, self._now, self._step_id)
        if admitted is None:
            return False
        self._plans.clear()
        grant, resume_at = admitted
        if plan.replay and resume_at:
            self._budget.add_replay(resume_at)
            if resume_at == plan.junction:
                # The next one that leaves the cached prompt here is restored.
                self._kv.order_snapshot(grant, request.token_ids, resume_at, "junction", self._now)
        self._budget.spend(self._load_seconds(plan) if resume_at == plan.resume_at else 0.0)
        self._resume(request, plan, resume_at)
        request.grant = grant
        self._brought[request.request_id] = tuple(grant.page_ids)
        request.status = RequestStatus.RUNNING
        request.start(self._now)
        self._running[request.request_id] = request
        self._num_begun[request.priority] += 1
        self._leaders.add(request)
        self.new.append(
            NewRequest(
                request_id=request.request_id,
                slot=grant.slot,
                token_ids=request.token_ids,
                num_prompt_tokens=request.num_prompt_tokens,
                sampling=request.sampling_due,
                num_computed_tokens=resume_at,
            )
        )
        return True

    def _miss_of(self, request: Request, plan: ResumePlan) -> MissReason | None:
        if request.prompt_logprobs is not None:
            return "prompt_logprobs"
        return "in_flight" if self._leaders.overlaps(request) else plan.miss

    def _load_seconds(self, plan: ResumePlan) -> float:
        """Of the copies from host memory that a way in takes."""
        layout = self._kv.layout
        num_bytes = plan.num_loads * layout.bytes_per_page
        num_bytes += layout.bytes_per_snapshot if plan.snapshot is not None else 0
        return self._resume_costs.load_seconds(num_bytes)

    def _resume(self, request: Request, plan: ResumePlan, resume_at: int) -> None:
        """Let a starting request go on at a position, and settle where it leaves snapshots."""
        if request.first_scheduled_time is None:
            request.num_cached_tokens = resume_at
            if request.keys is not None:
                request.miss_reason = self._miss_of(request, plan)
                self._totals.count_start(num_tokens=request.num_tokens, num_cached=resume_at, miss=request.miss_reason)
        elif resume_at:
            self._totals.num_wakes += 1
        request.num_computed_tokens = resume_at
        request.num_ever_computed = max(request.num_ever_computed, resume_at)
        if request.keys is None or not self._kv.snapshots.num_places:
            return
        if plan.junction is not None and resume_at < plan.junction < request.num_tokens:
            request.stops.setdefault(plan.junction, "junction")
        if request.num_prompt_tokens - resume_at > 2 * PERIODIC_SNAPSHOT_TOKENS:
            first = (resume_at // PERIODIC_SNAPSHOT_TOKENS + 1) * PERIODIC_SNAPSHOT_TOKENS
            for position in range(first, request.num_prompt_tokens, PERIODIC_SNAPSHOT_TOKENS):
                request.stops.setdefault(position, "periodic")

    def _take(self, request: Request, num_rows: int) -> None:
        if not num_rows:
            return
        assert request.grant is not None
        start = request.num_computed_tokens
        num_rows = min(num_rows, request.limit_after(start) - start)
        end = start + num_rows
        page_ids = self._kv.extend(request.grant, end)
        assert not isinstance(page_ids, Shortage), "the pages of a prompt are reserved"
        if page_ids:
            self._plans.clear()
        page_ids = self._brought.pop(request.request_id, ()) + page_ids
        seconds = self._budget.take(start, num_rows)
        kind = request.stops.get(end)
        if kind is not None:
            self._kv.order_snapshot(request.grant, request.token_ids, end, kind, self._now)
        self._tenants.charge(request.tenant, seconds)
        self._prompt_seconds += seconds
        self.drained_seconds += request.prefill_seconds * num_rows / request.num_tokens
        if request is self._favoured:
            self._favoured_seconds += seconds
        self._line.pop(request.request_id, None)
        if request.service is ServiceClass.LONG:
            self._long_seconds += seconds
        if end == request.num_tokens:
            self._num_begun[request.priority] -= 1
        if request.num_tokens - end < LEAST_CHUNK:
            self._gives_first_tokens |= request.service is ServiceClass.INTERACTIVE
        request.last_step_id = self._step_id
        request.last_chunk_time = self._now
        self._leaders.computes(request, end)
        self.rows.append(
            ScheduledTokens(
                request_id=request.request_id,
                start=start,
                num_tokens=num_rows,
                new_page_ids=page_ids,
                samples=end == request.num_tokens,
            )
        )
