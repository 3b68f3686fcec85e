"""What goes wrong on the symbolic device."""

from dataclasses import dataclass

PAGES_MOVE, SLOTS_KEPT = 10, 3
"""Times as likely is a failure where more is lost than rows."""


@dataclass(slots=True, kw_only=True)
class Faults:
    """Chances, for each step, that something goes wrong; drawn from a seed and the step's id."""

    seed: int = 0
    step: float = 0.0
    """The step fails as a whole: before anything is moved, before a row is computed, or before snapshots are taken."""
    request: float = 0.0
    """One scheduled request fails: what it has computed in the step is worthless."""
    copy: float = 0.0
    """A copy or a restore does not arrive, and the request that it is for fails; or a load does not arrive, which fails
    the step, because others may count on the page as well."""
    slow: float = 0.0
    """The step takes a hundred times as long."""
