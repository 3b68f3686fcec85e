"""Checks with names, what came of them, and the table. A check that fails never hides the others."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

NAME_WIDTH = 44


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    run: Callable[[], str | None]
    """None when all is well, else the first difference: what, where, expected, found. May raise."""


@dataclass(frozen=True, slots=True)
class Outcome:
    name: str
    seconds: float
    difference: str | None
    """None: passed."""

    @property
    def passed(self) -> bool:
        return self.difference is None


def run_check(check: Check) -> Outcome:
    """An exception is a failure with its message."""
    began = time.monotonic()
    try:
        difference = check.run()
    except Exception as error:  # noqa: BLE001 - whatever breaks a check is what the check has found
        difference = f"{type(error).__name__}: {error}"
    return Outcome(check.name, time.monotonic() - began, difference)


def run_checks(checks: Iterable[Check], show: Callable[[Outcome], None]) -> list[Outcome]:
    """One after the other, each shown when it is done."""
    outcomes = []
    for check in checks:
        outcome = run_check(check)
        show(outcome)
        outcomes.append(outcome)
    return outcomes


def header() -> str:
    return f"{'check':{NAME_WIDTH}}        seconds  first difference"


def line(outcome: Outcome) -> str:
    """One line of the table."""
    verdict = "pass" if outcome.passed else "FAIL"
    difference = "" if outcome.difference is None else f"  {' '.join(outcome.difference.split())}"
    return f"{outcome.name:{NAME_WIDTH}} {verdict}  {outcome.seconds:8.2f}{difference}"
