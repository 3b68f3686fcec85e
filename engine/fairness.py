"""Who has had how much: virtual time of tenants, and the share of the favoured prompt. In predicted seconds."""

MOST_TENANTS = 4096
"""Idle tenants that are remembered; beyond that those with nothing to remember are dropped."""


class TenantClock:
    """Virtual time of each tenant: seconds served since ever, lifted on return.

    A tenant that comes back is lifted to the one that has had least among those present: it cannot save up time by
    staying away. One that has had more than that keeps its lead, so it cannot shed it by leaving for a moment either.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._num_live: dict[str, int] = {}
        self._floor = 0.0

    def __getitem__(self, tenant: str) -> float:
        """Seconds that a tenant with live requests has had."""
        return self._seconds[tenant]

    def enter(self, tenant: str) -> None:
        """A request of the tenant has come."""
        live = self._num_live.get(tenant, 0)
        self._num_live[tenant] = live + 1
        if live == 0:
            self._raise_floor(without=tenant)
            self._seconds[tenant] = max(self._seconds.get(tenant, 0.0), self._floor)

    def leave(self, tenant: str) -> None:
        """A request of the tenant has ended."""
        self._num_live[tenant] -= 1
        if self._num_live[tenant] == 0:
            del self._num_live[tenant]
            if self._num_live:
                self._raise_floor()
            else:
                # Nobody competes any more: the next one starts level with the last one.
                self._floor = max(self._floor, self._seconds[tenant])
            if len(self._seconds) > MOST_TENANTS + len(self._num_live):
                self._seconds = {t: s for t, s in self._seconds.items() if s > self._floor or t in self._num_live}

    def charge(self, tenant: str, seconds: float) -> None:
        self._seconds[tenant] += seconds

    def _raise_floor(self, without: str | None = None) -> None:
        present = [self._seconds[t] for t in self._num_live if t != without]
        if present:
            self._floor = max(self._floor, min(present))

    def check(self, live: dict[str, int]) -> None:
        """`live` counts the requests of each tenant."""
        assert self._num_live == live, "tenants are miscounted"
        assert set(live) <= set(self._seconds), "a live tenant has no clock"


class FavouredShare:
    """Keeps one prompt at a share of the prompt seconds of the steps, as a debt that is paid in whole chunks.

    debt = share x (seconds spent on prompts) - (seconds spent on the favoured one), never less than nothing: what it
    gets beyond its share while nobody competes is not held against it. A chunk that is too dear for the share of one
    step is bought when the debt has grown enough, so over a few steps the share is kept to within one chunk.
    """

    WINDOW_SECONDS = 2.0

    def __init__(self, share: float) -> None:
        self.share = share
        self.debt = 0.0

    def allowance(self, prefill_seconds: float) -> float:
        """Of a step's prompt seconds, those kept for the favoured prompt."""
        return min(prefill_seconds, self.debt + self.share * prefill_seconds)

    def settle(self, *, favoured_seconds: float, all_seconds: float) -> None:
        """After a step has been planned with a favoured prompt."""
        owed = self.debt + self.share * all_seconds - favoured_seconds
        self.debt = min(max(owed, 0.0), self.share * self.WINDOW_SECONDS)

    def forget(self) -> None:
        """Nobody is favoured: nothing is owed."""
        self.debt = 0.0
