"""Decides which rows run in the next step and commits what came back. Pure: the clock comes in as an argument.

    add, abort            any time
    schedule(now)         -> StepPlan     every due decode row, then prompt chunks, within rows and predicted seconds
    update(plan, result)  -> StepOutputs  commit, stop, free, learn what the step took

The opinions are in `policy`, the line of prompts in `step_builder`, who may start in `admission_order`. When running
answers need more pages than there are, `victims` names those that go back to the queue.

What a finished request held is freed once the last step that may touch it has been committed (its fence). The runner is
told to forget the request at the start of the next plan, before anything in that plan can use the pages or slot again.
"""

import logging
import secrets
from collections import Counter

from engine import policy, victims
from engine.admission_order import AdmissionOrder
from engine.budget import StepBudget
from engine.config import ResolvedConfig
from engine.cost_model import CostModel, StepFeatures, cost_prior
from engine.fairness import FavouredShare, TenantClock
from engine.grammar.active import ActiveGrammars
from engine.kv.grant import Moves, Shortage
from engine.kv.hashing import PageHasher, PageKeys
from engine.kv.manager import KVManager
from engine.messages import EngineStats, FinishReason, RequestError, StepOutputs
from engine.outputs import OutputColumns
from engine.plan import NOTHING_LEFT, StepPlan, StepResult, TokenLogprobs
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
        self._tenants.enter(request.tenant)
        if request.keys is None and self.hasher is not None:
            request.keys = PageKeys(self.hasher, request.cache_salt, request.token_ids)
        self._queue(request)
        excess = self._never_fits(request)
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
        grown = self._make_room(now)
        decodes, prompts = self._due()
        budget = StepBudget(self.costs, self.config.max_num_batched_tokens)
        step = StepBuilder(
            step_id=self.totals.step_id + 1,
            now=now,
            budget=budget,
            costs=self.costs,
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
        # Neither replays nor the head over whole prompts are what the model of costs knows.
        if plan.scheduled and result.seconds > 0.0 and not plan.replays and not result.prompt_logprobs:
            self._learn(plan.num_tokens, result.seconds)
        self._release_fenced(now)
        if result.lost:
            self.kv.forget_lost(moves)
        else:
            self._count_moves(moves)
        news, self._news = self._news, OutputColumns()
        return news.pack(self.stats())

    def stats(self) -> EngineStats:
        waiting = self._admission.waiting
        return self.totals.frame(
            num_running=len(self._running),
            num_running_long=sum(r.service is policy.ServiceClass.LONG for r in self._running.values()),
            num_waiting=len(waiting),
            num_waiting_long=waiting.count(policy.ServiceClass.LONG),
            num_waiting_tokens=waiting.num_tokens,
            num_free_pages=self.kv.num_available_pages,
            num_free_slots=self.kv.num_free_slots,
            num_bypasses=self._admission.num_bypasses,
            num_cached_pages=self.kv.index.num_device_pages,
            num_host_pages_used=self.kv.index.host.num_pages - self.kv.index.host.num_free,
            num_snapshots_used=len(self.kv.snapshots),
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
        assert all(r.grant is None and r.status is RequestStatus.QUEUED for r in waiting)
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

    def _make_room(self, now: float) -> dict[str, tuple[int, ...]]:
        """Give every answer the page that its next row needs, from victims where there is a shortage; returns the
        pages by request.
        """
        grown: dict[str, tuple[int, ...]] = {}
        page_tokens = self.kv.layout.page_tokens
        for request in list(self._running.values()):
            if request.num_uncomputed_tokens != 1:
                continue
            while request.grant is not None and request.num_tokens > page_tokens * len(request.grant.page_ids):
                pages = self.kv.extend(request.grant, request.num_tokens)
                if isinstance(pages, Shortage):
                    self._preempt(pages.pages_wanted - pages.pages_available, now)
                else:
                    grown[request.request_id] = pages
        return grown

    def _preempt(self, pages_needed: int, now: float) -> None:
        """Send running requests back to the queue until that many pages are available; no plan is in flight."""
        chosen = victims.choose([self._as_victim(r) for r in self._running.values()], pages_needed)
        assert chosen, "pages are missing and nobody holds any"
        for request_id in chosen:
            request = self._running.pop(request_id)
            assert request.grant is not None and request.last_step_id <= self._committed_step_id
            departing = self.kv.num_departing
            self.kv.release(request.grant, request.token_ids, request.num_computed_tokens, now, keep="hibernate")
            self.totals.num_hibernations += self.kv.num_departing - departing
            self._forget.append(request_id)
            request.preempt()
            self._queue(request)
            self.totals.num_preemptions += 1

    def _as_victim(self, request: Request) -> victims.RunningRequest:
        assert request.grant is not None
        return victims.RunningRequest(
            request_id=request.request_id,
            priority=request.priority,
            service=request.service,
            pages_freed=request.grant.num_reserved_pages,
            restore_seconds=self._restore_seconds(request.num_computed_tokens),
            order=request.order,
        )

    def _restore_seconds(self, position: int) -> float:
        """To bring a request back to a position: from host memory where there is any, else from its first token."""
        if not (self.kv.snapshots.num_places and self.kv.index.host.num_pages):
            return self.costs.prefill_seconds(0, position)
        layout = self.kv.layout
        return self._resume_costs.load_seconds(layout.bytes_for(position) + layout.bytes_per_snapshot)

    def _count_moves(self, moves: Moves) -> None:
        num_pages, num_slots = moves.num_host_copies
        layout = self.kv.layout
        self.totals.moved_bytes += num_pages * layout.bytes_per_page + num_slots * layout.bytes_per_snapshot

    def _due(self) -> tuple[list[Request], list[Request]]:
        """Running requests with one row to go, and those with more."""
        decodes: list[Request] = []
        prompts: list[Request] = []
        for request in self._running.values():
            (decodes if request.num_tokens - request.num_computed_tokens == 1 else prompts).append(request)
        # Each of them had a row in the last step, so they fit into this one.
        assert len(decodes) <= self.config.max_num_batched_tokens
        return decodes, prompts

    def _learn(self, num_tokens: int, seconds: float) -> None:
        features, predicted = self._predicted
        self.totals.count_step(num_tokens=num_tokens, seconds=seconds, predicted=predicted)
        self.costs.observe(features, seconds)

    def _commit_rows(self, plan: StepPlan, failed: set[str], now: float) -> dict[str, Request]:
        """Count the rows of a step; returns the live requests that a token is due for."""
        awaited: dict[str, Request] = {}
        for row in plan.scheduled:
            request = self.requests.get(row.request_id)
            if request is None or request.grant is None:
                continue
            end = row.start + row.num_tokens
            seen = request.num_ever_computed
            if row.start < max(seen, request.num_prompt_tokens):
                self.totals.prompt_tokens += max(0, min(end, request.num_prompt_tokens) - max(row.start, seen))
                self.totals.num_recomputed_tokens += max(0, min(end, seen) - row.start)
            request.num_computed_tokens = end
            if row.request_id not in failed:
                self.kv.commit(request.grant, request.token_ids, end, now)
            if end > seen:
                request.num_ever_computed = end
            if row.samples:
                awaited[row.request_id] = request
        return awaited

    def _commit_token(self, request: Request, token_id: int, logprobs: TokenLogprobs | None) -> None:
        request.append(token_id)
        self.totals.generation_tokens += 1
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
        sampling = request.sampling
        stops = (token_id == self._eos_token_id and not sampling.ignore_eos) or token_id in sampling.stop_token_ids
        if stops and request.num_output_tokens > sampling.min_tokens:
            return "stop"
        # Where nothing can follow, the grammar ends the answer whatever ignore_eos and min_tokens say.
        if self.grammars.has_ended(request.request_id):
            return "stop"
        if request.num_output_tokens >= sampling.max_tokens or request.num_tokens >= self.config.max_model_len:
            return "length"
        return None

    def _never_fits(self, request: Request) -> str | None:
        limit = self.config.max_model_len
        if request.num_prompt_tokens >= limit:
            return f"The prompt has {request.num_prompt_tokens} tokens; at most {limit - 1} leave room for an answer."
        num_tokens = min(request.num_prompt_tokens + request.sampling.max_tokens, limit)
        wanted = self.kv.layout.pages_for(num_tokens)
        if wanted > self.config.num_pages:
            page_tokens = self.kv.layout.page_tokens
            return (
                f"Prompt and answer may need {num_tokens} tokens ({wanted} pages of {page_tokens}); "
                f"the memory holds {self.config.num_pages * page_tokens} ({self.config.num_pages} pages)."
            )
        return None

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
        if request.status is RequestStatus.QUEUED:
            self._admission.remove(request)
        else:
            del self._running[request.request_id]
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
