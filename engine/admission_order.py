"""Who may start: memory first, then fairness to those that memory keeps waiting.

A request that does not fit is passed by others that do, on credit: the work that starts past it adds up, and once it is
more than the request's own, nobody of its priority or a lower one starts before it. So memory drains until it fits.
Long requests hold at most a share of the pages while shorter ones wait; that is no shortage and earns no credit, and it
does not bind a request whose credit is spent.
"""

from collections.abc import Iterable

from engine.config import ResolvedConfig
from engine.fairness import TenantClock
from engine.kv.grant import Grant, Shortage
from engine.kv.manager import KVManager
from engine.kv.resume import ResumePlan
from engine.output_lengths import OutputLengths
from engine.policy import (
    HELD_BACK_FACTOR,
    SHORTAGE_STEPS,
    ServiceClass,
    credit_is_spent,
    long_share_binds,
    tokens_to_reserve,
)
from engine.prefix_waits import PrefixWaits
from engine.request import Request
from engine.waiting import WaitingQueue


class AdmissionOrder:
    """The waiting requests and the rule by which they start."""

    def __init__(self, config: ResolvedConfig, kv: KVManager, tenants: TenantClock) -> None:
        self.waiting = WaitingQueue(tenants)
        self.prefixes = PrefixWaits(self.waiting)
        self.outputs = OutputLengths()
        self.num_bypasses = 0
        self._config = config
        self._kv = kv
        self._short: dict[str, Request] = {}
        """Waiting requests that were found not to fit, in the order in which that happened."""
        self._lacks: dict[str, tuple[int, int]] = {}
        """How many pages each of them wanted when it was last looked at, and in which step that was."""
        self._held: dict[str, tuple[float, int]] = {}
        """Predicted seconds of those who may start only if they are finished in one step, and when that was seen."""
        self._spent: dict[str, Request] = {}
        """Those of them whose credit is spent."""
        self._largest_seconds = 0.0
        """Work of the largest request that has started past others."""

    def remove(self, request: Request) -> None:
        """A waiting request leaves."""
        self.prefixes.forget(request)
        self.waiting.remove(request)
        self._short.pop(request.request_id, None)
        self._lacks.pop(request.request_id, None)
        self._held.pop(request.request_id, None)
        self._spent.pop(request.request_id, None)

    def first(self) -> Request | None:
        """The request that must start before any other of its priority or a lower one: its credit is spent."""
        return min(self._spent.values(), key=lambda r: r.priority, default=None)

    def never_fits(self, request: Request) -> str | None:
        """Why a request can never start, in one sentence; None: it can."""
        limit = self._config.max_model_len
        if request.num_prompt_tokens >= limit:
            return f"The prompt has {request.num_prompt_tokens} tokens; at most {limit - 1} leave room for an answer."
        num_tokens = min(request.num_prompt_tokens + request.sampling.max_tokens, limit)
        wanted = self._kv.layout.pages_for(num_tokens)
        if wanted > self._config.num_pages:
            page_tokens = self._kv.layout.page_tokens
            return (
                f"Prompt and answer may need {num_tokens} tokens ({wanted} pages of {page_tokens}); "
                f"the memory holds {self._config.num_pages * page_tokens} ({self._config.num_pages} pages)."
            )
        return None

    def is_short(self, request: Request, step_id: int) -> bool:
        """Whether a request was found not to fit a few steps ago, and pages are still too few. What others have cached
        for it meanwhile is looked up again after `policy.SHORTAGE_STEPS`.
        """
        wanted, looked_at = self._lacks.get(request.request_id, (0, 0))
        return wanted > self._kv.num_available_pages and step_id < looked_at + SHORTAGE_STEPS

    def hold_back(self, request: Request, work_seconds: float, step_id: int) -> None:
        """A request would not have been finished in a step in which only such ones may start."""
        self._held[request.request_id] = (work_seconds, step_id)

    def is_held_back(self, request: Request, seconds: float, step_id: int) -> bool:
        """Whether that is so again, in a step with `seconds` left: its work is far more, as it was seen lately."""
        held = self._held.get(request.request_id)
        if held is None:
            return False
        work_seconds, looked_at = held
        return work_seconds > HELD_BACK_FACTOR * seconds and step_id < looked_at + SHORTAGE_STEPS

    def admit(
        self, request: Request, running: Iterable[Request], plan: ResumePlan, now: float, step_id: int
    ) -> tuple[Grant, int] | None:
        """Start a waiting request if that is allowed and there is room; it leaves the queue then.

        Returns its grant and the position at which it goes on.
        """
        if not self._kv.num_free_slots:
            return None
        first = self.first()
        if first is not None and first is not request and first.priority <= request.priority:
            return None
        num_tokens = self.reserve(request)
        if request is not first and self._long_share_binds(request, num_tokens, running):
            return None
        admitted = self._kv.admit(request.request_id, num_tokens, plan, request.keys, request.token_ids, now)
        if isinstance(admitted, Shortage):
            self._short.setdefault(request.request_id, request)
            self._lacks[request.request_id] = (admitted.pages_wanted, step_id)
            return None
        self.remove(request)
        if request is not first:
            self._count_bypass(request)
        return admitted

    def reserve(self, request: Request) -> int:
        """Tokens whose pages the request must find now."""
        scheduling = self._config.scheduling
        share = scheduling.output_quantile
        expected: int | None = None
        if share < 1.0:
            seen = self.outputs.quantile(request.service, request.tenant, share)
            expected = scheduling.unknown_output_tokens if seen is None else seen
        return tokens_to_reserve(
            num_tokens=request.num_tokens,
            num_prompt_tokens=request.num_prompt_tokens,
            max_tokens=request.sampling.max_tokens,
            expected_output=expected,
            least_ahead=scheduling.woken_output_tokens if request.num_preemptions else 0,
            max_model_len=self._config.max_model_len,
        )

    def _count_bypass(self, request: Request) -> None:
        self._largest_seconds = max(self._largest_seconds, request.total_seconds)
        for passed in self._short.values():
            if passed.priority <= request.priority:
                passed.bypassed_seconds += request.total_seconds
                self.num_bypasses += 1
                if credit_is_spent(bypassed_seconds=passed.bypassed_seconds, own_seconds=passed.total_seconds):
                    self._spent[passed.request_id] = passed

    def _long_share_binds(self, request: Request, num_tokens: int, running: Iterable[Request]) -> bool:
        if request.service is not ServiceClass.LONG or not self.waiting.count(ServiceClass.INTERACTIVE):
            return False
        held = sum(
            max(r.grant.num_reserved_pages, len(r.grant.page_ids))
            for r in running
            if r.service is ServiceClass.LONG and r.grant is not None
        )
        return long_share_binds(
            long_pages=held,
            pages_wanted=self._kv.layout.pages_for(num_tokens),
            num_pages=self._config.num_pages,
            config=self._config.scheduling,
        )

    def check(self) -> None:
        waiting = {r.request_id for r in self.waiting}
        assert set(self._held) <= waiting, "a request that left is held back"
        assert set(self._lacks) <= set(self._short), "a request lacks pages that it does not wait for"
        assert set(self._spent) <= set(self._short) <= waiting, "a request that left is still short of memory"
        for request in self._short.values():
            bound = request.total_seconds + self._largest_seconds
            assert request.bypassed_seconds <= bound, f"{request.request_id} was passed beyond its credit"
