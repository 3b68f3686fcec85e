"""Whose memory is taken when running requests need more pages than there are."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from engine.policy import ServiceClass


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRequest:
    """What the choice looks at."""

    request_id: str
    priority: int
    service: ServiceClass
    pages_freed: int
    """Pages that its leaving would make available, promised ones included."""
    restore_seconds: float
    """Predicted seconds to bring it back to where it stands."""
    order: int
    is_settled: bool = False
    """It was preempted before and has not outgrown what it found when it came back."""


def choose(running: Sequence[RunningRequest], pages_needed: int, *, priority: int = 0) -> list[str]:
    """The requests to preempt, in order, until `pages_needed` are free; fewer pages if all of them hold no more.

    Lowest priority first, then the least seconds to restore for each page freed, then the youngest. The last running
    request of a class is spared while any other can be taken. A settled request is taken only for one of a higher
    priority than its own, so that whoever comes back gets on; `priority` is that of the request in need.
    """
    left = Counter(r.service for r in running)
    ranked = sorted(
        (r for r in running if r.pages_freed > 0 and not (r.is_settled and r.priority <= priority)),
        key=lambda r: (-r.priority, r.restore_seconds / r.pages_freed, -r.order),
    )
    chosen: list[str] = []
    spared: list[RunningRequest] = []
    for request in ranked:
        if pages_needed <= 0:
            return chosen
        if left[request.service] == 1:
            spared.append(request)
            continue
        left[request.service] -= 1
        chosen.append(request.request_id)
        pages_needed -= request.pages_freed
    for request in spared:
        if pages_needed <= 0:
            break
        chosen.append(request.request_id)
        pages_needed -= request.pages_freed
    return chosen
