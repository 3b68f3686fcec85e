"""Identical plans from identical logs (I20): arrivals, aborts and results say everything, and nothing else does."""

import logging
import os
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

import pytest
from symbolic.device import SymbolicDevice
from symbolic.driver import Episode, Run
from symbolic.mutants import CLOCKWORK, Mutant

from engine.executor import StepError
from engine.plan import StepPlan, StepResult

OPS = 300


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("engine").setLevel(logging.CRITICAL + 1)


class Log:
    """Stands in for the device in a second run: it returns what the first one returned, for the same plans only."""

    def __init__(self, run: Run) -> None:
        self.steps = iter(run.recorder.log)
        self.num_live = 0

    def execute(self, plan: StepPlan) -> StepResult:
        planned, result = next(self.steps)
        assert text(plan) == text(planned), f"step {plan.step_id} is another one this time"
        if result is None:
            raise StepError("as before")
        return result

    def close(self) -> None:
        pass


def text(plan: StepPlan) -> str:
    new = [(n.request_id, n.slot, n.num_computed_tokens, n.token_ids.tolist()) for n in plan.new]
    moves = (plan.page_copies, plan.page_spills, plan.page_loads, plan.slot_restores, plan.replays, plan.slot_snapshots)
    return str((plan.step_id, new, plan.scheduled, plan.finished, moves))


def recorded(seed: int) -> Run:
    run = Run(Episode.draw(seed, OPS))
    run.recorder.keep = True
    run.all()
    return run


def replayed(run: Run) -> Run:
    again = Run(run.episode)
    again.recorder.device = Log(run)
    again.watch_device = False
    again.all()
    return again


def digest(seed: int) -> str:
    plans = [text(plan) for plan, _ in recorded(seed).recorder.log]
    return blake2b("\n".join(plans).encode(), digest_size=16).hexdigest()


@pytest.mark.parametrize("seed", range(8))
def test_a_log_replays_to_the_same_plans(seed: int) -> None:
    run = recorded(seed)
    again = replayed(run)
    assert again.tokens == run.tokens and again.finish == run.finish
    assert isinstance(run.device, SymbolicDevice) and len(run.recorder.log) > 50


def test_the_order_of_a_hash_table_is_in_no_plan() -> None:
    """Python draws another order of sets of strings in each process."""
    here = [digest(seed) for seed in range(4)]
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "import importlib.util, logging; logging.disable(logging.CRITICAL)\n"
        f"spec = importlib.util.spec_from_file_location('determinism', {str(Path(__file__))!r})\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['determinism'] = module\n"
        "spec.loader.exec_module(module)\n"
        "print(*[module.digest(seed) for seed in range(4)])\n"
    )
    for hash_seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert there.stdout.split() == here


@pytest.mark.parametrize("mutant", CLOCKWORK, ids=lambda m: f"{m.trap} {m.what}")
def test_broken_clockwork_is_found(mutant: Mutant) -> None:
    with mutant.active(), pytest.raises(AssertionError, match="another one this time"):
        replay_many(40)


def replay_many(count: int) -> None:
    for seed in range(count):
        replayed(recorded(seed))
