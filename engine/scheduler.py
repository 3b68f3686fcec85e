"""Decides which rows run in the next step and commits what came back. Pure: the clock comes in as an argument.

    add, abort            any time
    schedule(now)         -> StepPlan     every due decode row, then prompt chunks in queue order, under the row budget
    update(plan, result)  -> StepOutputs  commit, stop, free

What a finished request held is freed once the last step that may touch it has been committed (its fence). The runner is
told to forget the request at the start of the next plan, before anything in that plan can use the pages or slot again.
"""

import logging
from bisect import insort

from engine.budget import TokenBudget
from engine.config import ResolvedConfig
from engine.kv.manager import KVManager, Shortage
from engine.messages import EngineStats, FinishReason, RequestError, StepOutputs
from engine.outputs import OutputColumns
from engine.plan import NewRequest, ScheduledTokens, StepPlan, StepResult, TokenLogprobs
from engine.policy import queue_key, tokens_to_reserve
from engine.request import Request, RequestStatus
from engine.stats import Totals
from engine.waiting import WaitingQueue
from model.kv_layout import KVLayout

logger = logging.getLogger(__name__)


class Scheduler:
    """All requests of one engine. One plan is in flight at most."""

    def __init__(self, config: ResolvedConfig, layout: KVLayout, *, eos_token_id: int) -> None:
        self.config = config
        self.kv = KVManager(layout, config.num_pages, config.max_num_seqs)
        self.totals = Totals()
        self.requests: dict[str, Request] = {}
        """Queued and running, by id."""
        self._eos_token_id = eos_token_id
        self._waiting = WaitingQueue()
        self._running: list[Request] = []
        self._news = OutputColumns()
        self._forget: list[str] = []
        self._fenced: list[Request] = []
        self._in_flight: StepPlan | None = None
        self._committed_step_id = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do or say anything."""
        return bool(self.requests or self._forget or self._news)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """Queue a request; one that can never fit ends at once with `too_large`. Ids of live requests are unique."""
        assert request.request_id not in self.requests, f"{request.request_id} is known"
        self.requests[request.request_id] = request
        self._waiting.add(request)
        excess = self._never_fits(request)
        if excess is not None:
            self._finish(request, "error", error=RequestError("too_large", excess))

    def refuse(self, request_id: str, message: str) -> None:
        """Answer a request that could not be taken in."""
        self._news.refuse(request_id, RequestError("internal", message))

    def abort(self, request_id: str) -> None:
        """End a request wherever it stands. Unknown and finished ids are ignored."""
        request = self.requests.get(request_id)
        if request is not None:
            self._finish(request, "abort")
            self._release_fenced()

    def schedule(self, now: float) -> StepPlan:
        """Plan the next step. It is empty (its id that of the last step) when there is nothing to run or forget."""
        assert self._in_flight is None, "the last plan has not been committed"
        for late in self._waiting.expired(now):
            waited = (
                f"The request waited {now - late.arrival_time:.1f} s and its deadline passed before it could start."
            )
            self._finish(late, "error", error=RequestError("deadline_exceeded", waited))
        step_id = self.totals.step_id + 1
        budget = TokenBudget(self.config.max_num_batched_tokens)
        decodes, prefills = self._due()
        rows = [self._take(request, budget, step_id) for request in decodes]
        new: list[NewRequest] = []
        prefills.reverse()
        while budget.remaining:
            request = self._start_next(prefills[-1] if prefills else None, new, now)
            if request is None:
                if not prefills:
                    break
                request = prefills.pop()
            rows.append(self._take(request, budget, step_id))
        if not rows and not self._forget:
            return StepPlan(step_id=self.totals.step_id)
        plan = StepPlan(step_id=step_id, new=tuple(new), scheduled=tuple(rows), finished=tuple(self._forget))
        self._forget.clear()
        self._in_flight = plan
        self.totals.step_id = step_id
        return plan

    def update(self, plan: StepPlan, result: StepResult, now: float) -> StepOutputs:
        """Commit a step: count its rows, take its tokens, end what has ended, free what is fenced no longer."""
        assert result.step_id == plan.step_id, f"result of step {result.step_id} for plan {plan.step_id}"
        assert self._in_flight is None or self._in_flight is plan
        self._in_flight = None
        self._committed_step_id = plan.step_id
        awaited = self._commit_rows(plan)
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
        if plan.scheduled:
            self.totals.step_seconds, self.totals.step_tokens = result.seconds, plan.num_tokens
        self._release_fenced()
        news, self._news = self._news, OutputColumns()
        return news.pack(self.stats())

    def stats(self) -> EngineStats:
        return self.totals.frame(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_free_pages=self.kv.num_available_pages,
            num_free_slots=self.kv.num_free_slots,
        )

    def check(self) -> None:
        """Recompute the books; for tests after every operation, and cheap enough when idle."""
        self.kv.check()
        queued = {r.request_id for r in self._waiting}
        running = {r.request_id for r in self._running}
        assert not queued & running and queued | running == set(self.requests), "a request is in no queue or in two"
        assert all(r.grant is None and r.status is RequestStatus.QUEUED for r in self._waiting)
        keys = [queue_key(r) for r in self._running]
        assert keys == sorted(keys), "the running list is out of order"
        for request in self._running:
            grant = request.grant
            assert request.status is RequestStatus.RUNNING and grant is not None
            assert request.num_computed_tokens < request.num_tokens <= self.config.max_model_len
            covered = self.kv.layout.page_tokens * len(grant.page_ids)
            assert request.num_computed_tokens <= covered, f"{request.request_id} has rows outside its pages"
        holders = len(self._running) + len(self._fenced)
        assert self.config.max_num_seqs - self.kv.num_free_slots == holders, "a slot is held by nobody"

    def _due(self) -> tuple[list[Request], list[Request]]:
        """Running requests with one row to go, and those with more, each in queue order."""
        decodes: list[Request] = []
        prefills: list[Request] = []
        for request in self._running:
            (decodes if request.num_tokens - request.num_computed_tokens == 1 else prefills).append(request)
        # Each of them had a row in the last step, so they fit into this one.
        assert len(decodes) <= self.config.max_num_batched_tokens
        return decodes, prefills

    def _start_next(self, before: Request | None, new: list[NewRequest], now: float) -> Request | None:
        """Admit the first waiting request if it comes before the running prompt `before` and there is memory for it."""
        request = self._waiting.head()
        if request is None or (before is not None and queue_key(before) < queue_key(request)):
            return None
        grant = self.kv.admit(request.request_id, tokens_to_reserve(request, self.config.max_model_len))
        if isinstance(grant, Shortage):
            return None
        self._waiting.remove(request)
        request.grant = grant
        request.status = RequestStatus.RUNNING
        request.first_scheduled_time = now
        insort(self._running, request, key=queue_key)
        new.append(
            NewRequest(
                request_id=request.request_id,
                slot=grant.slot,
                token_ids=request.token_ids,
                num_prompt_tokens=request.num_prompt_tokens,
                sampling=request.sampling,
            )
        )
        return request

    def _take(self, request: Request, budget: TokenBudget, step_id: int) -> ScheduledTokens:
        assert request.grant is not None
        start = request.num_computed_tokens
        end = start + budget.take(start, request.num_tokens - start)
        request.last_step_id = step_id
        return ScheduledTokens(
            request_id=request.request_id,
            start=start,
            num_tokens=end - start,
            new_page_ids=self.kv.extend(request.grant, end),
            samples=end == request.num_tokens,
        )

    def _commit_rows(self, plan: StepPlan) -> dict[str, Request]:
        """Count the rows of a step; returns the live requests that a token is due for."""
        awaited: dict[str, Request] = {}
        for row in plan.scheduled:
            request = self.requests.get(row.request_id)
            if request is None:
                continue
            end = row.start + row.num_tokens
            self.totals.prompt_tokens += max(0, min(end, request.num_prompt_tokens) - row.start)
            request.num_computed_tokens = end
            if row.samples:
                awaited[row.request_id] = request
        return awaited

    def _commit_token(self, request: Request, token_id: int, logprobs: TokenLogprobs | None) -> None:
        request.append(token_id)
        self.totals.generation_tokens += 1
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
        if request.num_output_tokens >= sampling.max_tokens or request.num_tokens >= self.config.max_model_len:
            return "length"
        return None

    def _never_fits(self, request: Request) -> str | None:
        limit = self.config.max_model_len
        if request.num_prompt_tokens >= limit:
            return f"The prompt has {request.num_prompt_tokens} tokens; at most {limit - 1} leave room for an answer."
        num_tokens = tokens_to_reserve(request, limit)
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
            logger.error("request %s failed: %s", request_id, why)
            message = "The engine could not compute this request."
            self._finish(request, "error", error=RequestError("internal", message))

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
            self._waiting.remove(request)
        else:
            self._running.remove(request)
            self._forget.append(request.request_id)
            self._fenced.append(request)
        del self.requests[request.request_id]
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.error = error
        request.stop_token_id = stop_token_id
        self._news.add(request, token_ids, logprobs)

    def _release_fenced(self) -> None:
        still: list[Request] = []
        for request in self._fenced:
            if request.last_step_id > self._committed_step_id:
                still.append(request)
            else:
                assert request.grant is not None
                self.kv.release(request.grant)
                request.grant = None
        self._fenced = still
