"""How long answers are: an online quantile for each class and tenant."""

from bisect import bisect_left, insort
from collections import OrderedDict, deque

from engine.policy import ServiceClass

WINDOW = 256
"""Newest answers that count."""
LEAST_SAMPLES = 20
"""Below this many a quantile says nothing."""
MOST_TENANTS = 1024


class _Window:
    """The newest lengths, in order of arrival and of size."""

    def __init__(self) -> None:
        self._newest: deque[int] = deque()
        self._sorted: list[int] = []

    def __len__(self) -> int:
        return len(self._newest)

    def add(self, length: int) -> None:
        if len(self._newest) == WINDOW:
            del self._sorted[bisect_left(self._sorted, self._newest.popleft())]
        self._newest.append(length)
        insort(self._sorted, length)

    def quantile(self, share: float) -> int:
        """The least length that `share` of the window does not exceed."""
        return self._sorted[min(len(self._sorted) - 1, int(share * len(self._sorted)))]


class OutputLengths:
    """Quantiles of the lengths of finished answers; a tenant's own where there are enough of them."""

    def __init__(self) -> None:
        self._windows: OrderedDict[tuple[ServiceClass, str | None], _Window] = OrderedDict()

    def observe(self, service: ServiceClass, tenant: str, length: int) -> None:
        """An answer has ended by itself or at its limit; aborted ones say nothing."""
        for key in ((service, None), (service, tenant)):
            self._windows.setdefault(key, _Window()).add(length)
            self._windows.move_to_end(key)
        while len(self._windows) > MOST_TENANTS:
            self._windows.popitem(last=False)

    def quantile(self, service: ServiceClass, tenant: str, share: float) -> int | None:
        """None while too few answers have been seen."""
        for key in ((service, tenant), (service, None)):
            window = self._windows.get(key)
            if window is not None and len(window) >= LEAST_SAMPLES:
                return window.quantile(share)
        return None
