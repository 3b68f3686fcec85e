"""Pages for answers that have outgrown what there is: running requests are set aside for others.

Requests start when a quantile of their answers fits, so now and then more is needed than there is. Then somebody is
hibernated (`kv.hibernation`), whom `victims` names, and waits again. Every answer comes to its end:

    who comes back finds room for twice what it has answered, and no equal takes that from it (`victims.choose`)
    where nobody runs a request is admitted, whatever is cached or pinned (`KVManager.admit`)

So each is set aside a few times at most, and somebody always gets on.
"""

from collections.abc import Callable, Iterable

from engine import victims
from engine.kv.grant import Shortage
from engine.kv.manager import KVManager
from engine.request import Request
from engine.resume_costs import CopyAndComputeCosts
from engine.stats import Totals


class Preemption:
    """Makes room among the running requests."""

    def __init__(
        self,
        kv: KVManager,
        costs: CopyAndComputeCosts,
        running: dict[str, Request],
        totals: Totals,
        *,
        set_aside: Callable[[Request], None],
    ) -> None:
        """`running` is the scheduler's own; who is preempted leaves it. `set_aside` puts them in the queue."""
        self._kv = kv
        self._costs = costs
        self._running = running
        self._totals = totals
        self._set_aside = set_aside

    def make_room(self, requests: Iterable[Request], now: float) -> dict[str, tuple[int, ...]]:
        """Give these answers the page that their next row needs; returns the pages by request. No plan is in flight."""
        grown: dict[str, tuple[int, ...]] = {}
        for request in requests:
            while request.grant is not None:
                pages = self._kv.extend(request.grant, request.num_tokens)
                if not isinstance(pages, Shortage):
                    grown[request.request_id] = pages
                    break
                self._preempt_for(request, pages.pages_wanted, now)
        return grown

    def _preempt_for(self, needy: Request, num_pages: int, now: float) -> None:
        """Send running requests back to the queue until that many pages are available, or all who may go are gone."""
        running = [self._as_victim(r, needy) for r in self._running.values()]
        chosen = victims.choose(running, num_pages - self._kv.num_available_pages, priority=needy.priority)
        assert chosen, "pages are missing and nobody may be preempted"
        for request_id in chosen:
            self._preempt(self._running[request_id], now)
            self._kv.unpin_until(num_pages)
            if self._kv.num_available_pages >= num_pages:
                return

    def _preempt(self, request: Request, now: float) -> None:
        assert request.grant is not None
        del self._running[request.request_id]
        self._kv.release(
            request.grant,
            request.token_ids,
            request.num_computed_tokens,
            now,
            keep="hibernate",
            priority=request.priority,
        )
        self._totals.num_preemptions += 1
        if request.request_id in self._kv.hibernations:
            self._totals.num_hibernations += 1
        else:
            self._totals.num_recompute_preemptions += 1
        request.preempt()
        self._set_aside(request)

    def _as_victim(self, request: Request, needy: Request) -> victims.RunningRequest:
        grant = request.grant
        assert grant is not None
        has_outgrown = request is needy or grant.num_reserved_pages > grant.num_admitted_pages
        return victims.RunningRequest(
            request_id=request.request_id,
            priority=request.priority,
            service=request.service,
            pages_freed=grant.num_reserved_pages,
            restore_seconds=self._restore_seconds(request),
            order=request.order,
            is_settled=request.num_preemptions > 0 and not has_outgrown,
        )

    def _restore_seconds(self, request: Request) -> float:
        """To bring a request back to where it stands: from host memory where there is any, else from its start."""
        kv, position = self._kv, request.num_computed_tokens
        if request.keys is None or not (kv.snapshots.num_places and kv.index.host.num_pages):
            return self._costs.prefill_seconds(0, position)
        return self._costs.load_seconds(kv.layout.bytes_for(position) + kv.layout.bytes_per_snapshot)
