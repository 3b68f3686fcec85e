"""What the engine core needs of the thing that computes. Torch-free: `engine.runner` implements it twice."""

from typing import Protocol

from engine.config import ResolvedConfig
from engine.plan import StepPlan, StepResult
from model.config import ModelConfig


class StepError(RuntimeError):
    """A step failed as a whole but the executor can go on: its scheduled requests end with an error, others live.

    Any other exception that leaves `execute` ends the engine.
    """


class Executor(Protocol):
    """Runs step plans, one at a time, on the engine's thread.

    The executor keeps what it was told: token ids, pages, slot and sampling of every request from the plan that names
    it in `new` until a plan names it in `finished`. It appends the tokens it samples to its own record.
    """

    @property
    def config(self) -> ResolvedConfig: ...

    @property
    def model(self) -> ModelConfig: ...

    @property
    def eos_token_id(self) -> int:
        """Less than `model.vocab_size`."""
        ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one plan and return the sampled tokens in plan order.

        `plan.finished` is applied first, before anything can fail, so a slot it frees may be given away in the same
        plan. It may name ids that the executor does not know (their only step failed); those are ignored. A plan may
        schedule nothing. Host pages and snapshots that it names may be read by any later plan.

        Raises:
            StepError: the whole step failed, a page load among the reasons, and the executor can go on. Only `finished`
                is sure to have happened: what the plan was to write, host pages and snapshots among it, holds nothing.
            Exception: anything else; the engine ends.
        """
        ...

    def close(self) -> None:
        """Give back memory and threads; called once, after the last step."""
        ...
