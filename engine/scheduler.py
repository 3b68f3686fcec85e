"""Decides which rows run in the next step and commits what came back. Pure: the clock comes in as an argument.

    add, abort            any time
    schedule(now)         -> StepPlan     every due decode row, then prompt chunks, within rows and predicted seconds
    update(plan, result)  -> StepOutputs  commit, stop, free, learn what the step took

The opinions are in `policy`, the line of prompts in `step_builder`, who may start in `admission_order`, what happens
when running answers need more pages than there are in `preemption`.

What a finished request held is freed once the last step that may touch it has been committed (its fence). The runner is
told to forget the request at the start of the next plan, before anything in that plan can use the pages or slot again.
"""

import logging
import secrets
from collections import Counter

from engine import policy
from engine.admission_order import AdmissionOrder
from engine.budget import StepBudget
from engine.config import ResolvedConfig
from engine.cost_model import CostModel, StepFeatures, cost_prior
from engine.fairness import FavouredShare, TenantClock
from engine.grammar.active import ActiveGrammars
from engine.kv.grant import Moves
from engine.kv.hashing import PageHasher, PageKeys
from engine.kv.manager import KVManager
from engine.messages import EngineStats, FinishReason, RequestError, StepOutputs
from engine.outputs import OutputColumns
from engine.plan import NOTHING_LEFT, StepPlan, StepResult, TokenLogprobs
from engine.preemption import Preemption
from engine.request import Request, RequestStatus
from engine.resume_costs import CopyAndComputeCosts
from engine.stats import DrainMeter, Totals
from engine.step_builder import StepBuilder
from model.kv_layout import KVLayout

logger = logging.getLogger(__name__)


class Scheduler:
    """All requests of one engine. One plan is in flight at most."""

    def __init__(
        self, config: ResolvedConfig, layout: KVLayout, *, eos_token_id: int, costs: CostModel | None = None
    ) -> None:
        """`costs` predicts steps and learns from them; None: one that starts from the model's arithmetic."""
        self.config = config
        self.costs = costs or CostModel(layout.config, cost_prior(layout.config, config.device))
        self._resume_costs = CopyAndComputeCosts(self.costs, config.device)
        self.kv = KVManager(
            layout,
            config.num_pages,
            config.max_num_seqs,
            costs=self._resume_costs,
            num_host_pages=config.num_host_pages if config.enable_prefix_cache else 0,
            num_snapshots=config.num_snapshots if config.enable_prefix_cache else 0,
        )
        self.hasher: PageHasher | None = None
        """Names pages; None: nothing is cached."""
        if config.enable_prefix_cache:
            self.hasher = PageHasher(secrets.token_bytes(32), _model_epoch(config), layout.page_tokens)
        self.totals = Totals()
        self.grammars = ActiveGrammars()
        """Of `requests`; a matcher is added with its request."""
        self.requests: dict[str, Request] = {}
        """Queued and running, by id."""
        self._eos_token_id = eos_token_id
        self._tenants = TenantClock()
        self._share = FavouredShare(config.scheduling.long_prefill_share)
        self._admission = AdmissionOrder(config, self.kv, self._tenants)
        self._running: dict[str, Request] = {}
        self._news = OutputColumns()
        self._forget: list[str] = []
        self._fenced: list[Request] = []
        self._in_flight: StepPlan | None = None
        self._preemption = Preemption(
            self.kv, self._resume_costs, self._running, self.totals, set_aside=self._set_aside
        )
        self._moves = Moves()
        """Of the plan in flight."""
        self._predicted = (StepFeatures(), 0.0)
        """Of the plan in flight."""
        self._drain = DrainMeter()
        self._committed_step_id = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do or say anything."""
        return bool(self.requests or self._forget or self._news)

    @property
    def predicted_features(self) -> StepFeatures:
        """What the newest plan contains, as the cost model sees it."""
        return self._predicted[0]

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._admission.waiting)

    def add(self, request: Request) -> None:
        """Queue a request; one that can never fit ends at once with `too_large`. Ids of live requests are unique."""
        assert request.request_id not in self.requests, f"{request.request_id} is known"
        self.requests[request.request_id] = request
        request.service = policy.service_class(request.num_prompt_tokens, self.config.scheduling)
        request.most_tokens = min(request.most_tokens, self.config.max_model_len)
        if not request.sampling.ignore_eos:
            request.stop_ids |= {self._eos_token_id}
        self._tenants.enter(request.tenant)
        if request.keys is None and self.hasher is not None:
            request.keys = PageKeys(self.hasher, request.cache_salt, request.token_ids)
        self._queue(request)
        excess = self._admission.never_fits(request)
        if excess is not None:
            self._finish(request, "error", error=RequestError("too_large", excess))

    def refuse(self, request_id: str, message: str | None) -> None:
        """Answer a request that could not be taken in; without a message it was aborted first."""
        self._news.refuse(request_id, None if message is None else RequestError("internal", message))

    def abort(self, request_id: str) -> None:
        """End a request wherever it stands. Unknown and finished ids are ignored."""
        request = self.requests.get(request_id)
        if request is not None:
            self._finish(request, "abort")
            self._release_fenced(request.arrival_time)

    def schedule(self, now: float) -> StepPlan:
        """Plan the next step. It is empty (its id that of the last step) when there is nothing to run or forget."""
        assert self._in_flight is None, "the last plan has not been committed"
        self._refuse_late(now)
        self._admission.prefixes.release_overdue(now)
        decodes, prompts, full = self._due()
        grown = self._preemption.make_room(full, now)
        if len(decodes) + len(prompts) > len(self._running):
            decodes, prompts, _ = self._due()
        budget = StepBudget(self.costs, self.config.max_num_batched_tokens)
        step = StepBuilder(
            step_id=self.totals.step_id + 1,
            now=now,
            budget=budget,
            costs=self.costs,
            resume_costs=self._resume_costs,
            config=self.config.scheduling,
            kv=self.kv,
            tenants=self._tenants,
            share=self._share,
            admission=self._admission,
            running=self._running,
            totals=self.totals,
        )
        step.add_decodes(decodes, grown)
        step.add_prompts(prompts)
        self._drain.note(now, step.backlog_seconds + self._admission.waiting.backlog_seconds, step.drained_seconds)
        moves = self._moves = self.kv.seal()
        if not step.rows and not self._forget:
            assert moves == Moves(), "copies for nobody"
            return StepPlan(step_id=self.totals.step_id)
        self.totals.step_id += 1
        plan = StepPlan(
            step_id=self.totals.step_id,
            new=tuple(step.new),
            scheduled=tuple(step.rows),
            finished=tuple(self._forget),
            page_copies=tuple(moves.page_copies),
            page_spills=tuple(moves.page_spills),
            page_loads=tuple(moves.page_loads),
            slot_restores=tuple(moves.slot_restores),
            replays=tuple(moves.replays),
            slot_snapshots=tuple(moves.slot_snapshots),
            masks=self.grammars.fill([row.request_id for row in step.rows if row.samples]),
        )
        self._forget.clear()
        self._in_flight = plan
        self._predicted = (budget.features, budget.predicted_seconds)
        return plan

    def update(self, plan: StepPlan, result: StepResult, now: float) -> StepOutputs:
        """Commit a step: count its rows, take its tokens, end what has ended, free what is fenced no longer."""
        assert result.step_id == plan.step_id, f"result of step {result.step_id} for plan {plan.step_id}"
        assert self._in_flight is None or self._in_flight is plan
        self._in_flight = None
        self._committed_step_id = plan.step_id
        moves, self._moves = self._moves, Moves()
        self.kv.settle(set(result.failed), moves if result.lost else None)
        awaited = self._commit_rows(plan, set(result.failed), now)
        for request_id, chunk in result.prompt_logprobs.items():
            computed = self.requests.get(request_id)
            if computed is not None and computed.prompt_logprobs is not None:
                computed.prompt_logprobs.append(chunk)
        for request_id, token_id, logprobs in zip(result.request_ids, result.token_ids, result.logprobs, strict=True):
            request = awaited.pop(request_id, None)
            if request is None or request_id in result.failed:
                self.totals.num_dropped_results += 1
            else:
                self._commit_token(request, token_id, logprobs)
        for request_id, why in result.failed.items():
            awaited.pop(request_id, None)
            self._fail(request_id, why)
        for request_id in awaited:
            self._fail(request_id, "the step returned no token")
        # The head over whole prompts is not what the model of costs knows.
        if plan.scheduled and result.seconds > 0.0 and not result.prompt_logprobs:
            self._learn(result, moves)
        self._release_fenced(now)
        if result.lost:
            self.kv.forget_lost(moves)
        else:
            self.totals.moved_bytes += self._bytes_of(moves.num_host_copies)
        news, self._news = self._news, OutputColumns()
        return news.pack(self.stats())

    def stats(self) -> EngineStats:
        waiting = self._admission.waiting
        return self.totals.frame(
            num_running=len(self._running),
            num_running_long=[r.service for r in self._running.values()].count(policy.ServiceClass.LONG),
            num_waiting=len(waiting),
            num_waiting_long=waiting.count(policy.ServiceClass.LONG),
            num_waiting_tokens=waiting.num_tokens,
            num_free_pages=self.kv.num_available_pages,
            num_free_slots=self.kv.num_free_slots,
            num_bypasses=self._admission.num_bypasses,
            num_parked=len(self._admission.prefixes),
            num_prefix_waits=self._admission.prefixes.num_waits,
            num_cached_pages=self.kv.index.num_device_pages,
            num_host_pages_used=self.kv.index.host.num_pages - self.kv.index.host.num_free,
            num_snapshots_used=len(self.kv.snapshots),
            num_hibernated=len(self.kv.hibernations),
            num_recompute_preemptions=self.totals.num_recompute_preemptions + self.kv.hibernations.num_given_up,
            backlog_seconds=self._drain.backlog_seconds,
            drain_seconds=self._drain.drain_seconds,
        )

    def check(self) -> None:
        """Recompute the books; for tests after every operation, and cheap enough when idle."""
        self.kv.check()
        self._admission.check()
        waiting = list(self._admission.waiting)
        queued = {r.request_id for r in waiting}
        assert not queued & set(self._running), "a request is in two queues"
        assert queued | set(self._running) == set(self.requests), "a request is in no queue"
        assert self.grammars.request_ids <= set(self.requests), "a grammar of nobody"
        assert len(waiting) == len(self._admission.waiting) == len(queued), "the waiting are miscounted"
        assert all(r.grant is None and r.status is not RequestStatus.RUNNING for r in waiting)
        self._admission.prefixes.check(self._running)
        hibernated = {h.request_id for h in self.kv.hibernations}
        assert hibernated <= queued, "pages are pinned for nobody"
        self._tenants.check(dict(Counter(r.tenant for r in self.requests.values())))
        for request in self._running.values():
            grant = request.grant
            assert request.status is RequestStatus.RUNNING and grant is not None
            assert request.num_computed_tokens < request.num_tokens <= self.config.max_model_len
            covered = self.kv.layout.page_tokens * len(grant.page_ids)
            assert request.num_computed_tokens <= covered, f"{request.request_id} has rows outside its pages"
        holders = len(self._running) + len(self._fenced) + self.kv.num_departing
        assert self.config.max_num_seqs - self.kv.num_free_slots == holders, "a slot is held by nobody"

    def _queue(self, request: Request) -> None:
        """Predict a request's work and let it wait."""
        scheduling = self.config.scheduling
        if request.keys is not None:
            request.keys.extend(request.token_ids)
        request.prefill_seconds = self.kv.probe(request.lookup_keys, request.token_ids).est_seconds
        answer = self._admission.outputs.quantile(request.service, request.tenant, policy.EXPECTED_QUANTILE)
        num_left = min(
            policy.UNKNOWN_ANSWER if answer is None else answer, request.sampling.max_tokens - request.num_output_tokens
        )
        request.total_seconds = request.prefill_seconds + num_left * self.costs.decode_seconds(request.num_tokens)
        request.latest_start = policy.latest_start(
            request.arrival_time, request.service, request.prefill_seconds, scheduling
        )
        self._admission.waiting.add(request)

    def _refuse_late(self, now: float) -> None:
        for late in self._admission.waiting.expired(now):
            waited = (
                f"The request waited {now - late.arrival_time:.1f} s and its deadline passed before it could start."
            )
            self._finish(late, "error", error=RequestError("deadline_exceeded", waited))

    def _set_aside(self, request: Request) -> None:
        """A preempted request waits again."""
        assert request.last_step_id <= self._committed_step_id
        self._forget.append(request.request_id)
        self._admission.prefixes.left(request.request_id)
        self._queue(request)

    def _bytes_of(self, num_copies: tuple[int, int]) -> int:
        """Of so many pages and snapshots."""
        num_pages, num_snapshots = num_copies
        return num_pages * self.kv.layout.bytes_per_page + num_snapshots * self.kv.layout.bytes_per_snapshot

    def _due(self) -> tuple[list[Request], list[Request], list[Request]]:
        """Running requests with one row to go, those with more, and those of the first whose pages are full."""
        decodes: list[Request] = []
        prompts: list[Request] = []
        full: list[Request] = []
        page_tokens = self.kv.layout.page_tokens
        for request in self._running.values():
            if request.num_tokens - request.num_computed_tokens > 1:
                prompts.append(request)
                continue
            decodes.append(request)
            assert request.grant is not None
            if request.num_tokens > page_tokens * len(request.grant.page_ids):
                full.append(request)
        # Each of them had a row in the last step, so they fit into this one.
        assert len(decodes) <= self.config.max_num_batched_tokens
        return decodes, prompts, full

    def _learn(self, result: StepResult, moves: Moves) -> None:
        """What a step took: its rows and its copies, each for itself."""
        features, predicted = self._predicted
        loaded = self._bytes_of(moves.num_host_loads)
        predicted += self._resume_costs.load_seconds(loaded)
        self.totals.count_step(num_tokens=features.num_rows, seconds=result.seconds, predicted=predicted)
        self.costs.observe(features, result.seconds - result.load_seconds - result.save_seconds)
        self._resume_costs.observe_load(loaded, result.load_seconds)

    def _commit_rows(self, plan: StepPlan, failed: set[str], now: float) -> dict[str, Request]:
        """Count the rows of a step; returns the live requests that a token is due for."""
        awaited: dict[str, Request] = {}
        page_tokens = self.kv.layout.page_tokens
        for row in plan.scheduled:
            request_id, start = row.request_id, row.start
            request = self._running.get(request_id)
            if request is None:
                continue
            end = start + row.num_tokens
            if start < request.num_ever_computed or start < request.num_prompt_tokens:
                self._count_rows(request, start, end)
            request.num_computed_tokens = end
            request.num_ever_computed = max(request.num_ever_computed, end)
            if end // page_tokens > start // page_tokens and request_id not in failed:
                assert request.grant is not None
                self.kv.commit(request.grant, request.token_ids, end, now)
                self._admission.prefixes.reached(request_id, end)
            if row.samples:
                awaited[request_id] = request
        return awaited

    def _count_rows(self, request: Request, start: int, end: int) -> None:
        """Rows of a prompt, and rows that were computed before."""
        seen = request.num_ever_computed
        self.totals.prompt_tokens += max(0, min(end, request.num_prompt_tokens) - max(start, seen))
        self.totals.num_recomputed_tokens += max(0, min(end, seen) - start)

    def _commit_token(self, request: Request, token_id: int, logprobs: TokenLogprobs | None) -> None:
        request.append(token_id)
        self.totals.generation_tokens += 1
        is_plain = not len(self.grammars) and request.prompt_logprobs is None
        if is_plain and token_id not in request.stop_ids and request.num_tokens < request.most_tokens:
            self._news.add(request, (token_id,), logprobs)
            return
        if request.prompt_logprobs is not None:
            self._news.add_prompt_logprobs(request.request_id, request.prompt_logprobs)
            request.prompt_logprobs = None
        if not self.grammars.advance(request.request_id, token_id):
            self._fail(request.request_id, "a token outside the grammar")
            return
        reason = self._stop_reason(request, token_id)
        if reason is None:
            self._news.add(request, (token_id,), logprobs)
        else:
            self._finish(
                request,
                reason,
                stop_token_id=token_id if reason == "stop" else None,
                token_ids=(token_id,),
                logprobs=logprobs,
            )

    def _stop_reason(self, request: Request, token_id: int) -> FinishReason | None:
        if token_id in request.stop_ids and request.num_output_tokens > request.sampling.min_tokens:
            return "stop"
        # Where nothing can follow, the grammar ends the answer whatever ignore_eos and min_tokens say.
        if self.grammars.has_ended(request.request_id):
            return "stop"
        return "length" if request.num_tokens >= request.most_tokens else None

    def _fail(self, request_id: str, why: str) -> None:
        request = self.requests.get(request_id)
        if request is not None:
            if why == NOTHING_LEFT:
                error = RequestError("no_token_left", "What this request excludes leaves no token to choose.")
            else:
                logger.error("request %s failed: %s", request_id, why)
                complaint = self.grammars.complaint(request_id) or "The engine could not compute this request."
                error = RequestError("internal", complaint)
            self._finish(request, "error", error=error)

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        *,
        error: RequestError | None = None,
        stop_token_id: int | None = None,
        token_ids: tuple[int, ...] = (),
        logprobs: TokenLogprobs | None = None,
    ) -> None:
        """The one way out for every request that was added."""
        if request.status is not RequestStatus.RUNNING:
            self._admission.remove(request)
            self.kv.forget(request.request_id)
        else:
            del self._running[request.request_id]
            self._admission.prefixes.left(request.request_id)
            self._forget.append(request.request_id)
            self._fenced.append(request)
            request.settled = request.last_step_id <= self._committed_step_id and reason != "error"
        del self.requests[request.request_id]
        self.grammars.remove(request.request_id)
        self._tenants.leave(request.tenant)
        if reason in ("stop", "length"):
            self._admission.outputs.observe(request.service, request.tenant, request.num_output_tokens)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.error = error
        request.stop_token_id = stop_token_id
        self._news.add(request, token_ids, logprobs)

    def _release_fenced(self, now: float) -> None:
        still: list[Request] = []
        for request in self._fenced:
            if request.last_step_id > self._committed_step_id:
                still.append(request)
            else:
                assert request.grant is not None
                self.kv.release(
                    request.grant,
                    request.token_ids,
                    request.num_computed_tokens,
                    now,
                    keep="turn_end" if request.settled else None,
                )
                request.grant = None
        self._fenced = still


def _model_epoch(config: ResolvedConfig) -> str:
    """All that cached rows depend on beside tokens."""
    parts = (config.model_dir, config.device, config.dtype, config.numerics, config.row_format, config.index_format)
    return "\0".join((*parts, str(config.deterministic)))
