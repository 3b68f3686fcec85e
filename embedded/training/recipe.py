"""The recipe as numbers: which examples, in which rows, for how many steps, at which rate.

    words      short rows; every query sees all entries, the indexers learn beside
    sparse     short rows; entries are selected
    long       rows of 8K, with jumps in the positions: distances of long contexts
    rounded    as before with the weights rounded as the checkpoint stores them, the rate goes down to nothing

A stage's `data` names a stage of `embedded.data.mixture`.
"""

import hashlib
from dataclasses import asdict, dataclass, replace

from embedded.config import EMBEDDED
from model.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Some steps of one kind."""

    data: str
    row_tokens: int
    rows: int
    """Of one step."""
    steps: int
    sparse: bool = False
    rounded: bool = False
    jumps: bool = False
    decays: bool = False
    """Whether the rate goes down over the stage, linearly to nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A training run. Rates are those of AdamW at the end of the warm-up."""

    name: str
    model: ModelConfig = EMBEDDED
    stages: tuple[Stage, ...]
    seed: int = 1
    rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    most_gradient: float = 1.0
    """Norm beyond which gradients are scaled down."""
    draft_weight: float = 0.3
    index_weight: float = 1.0
    balance_step: float = 1e-3

    @property
    def identity(self) -> str:
        """Name and digest of all numbers."""
        numbers = repr(asdict(self)).encode()
        return f"{self.name}-{hashlib.sha256(numbers).hexdigest()[:12]}"

    def scaled(self, factor: float) -> "Recipe":
        """The same with `factor` times as many steps in each stage: how long a machine is there for differs.

        Raises:
            ValueError: `factor` is not positive.
        """
        if factor <= 0.0:
            raise ValueError(f"a recipe is scaled by a positive factor; found {factor}")
        stages = tuple(replace(stage, steps=max(1, round(factor * stage.steps))) for stage in self.stages)
        return replace(self, stages=stages)

    def rate_at(self, stage: int, step: int, total_steps: int) -> float:
        """The learning rate of a step of a stage."""
        rate = self.rate * min(1.0, (total_steps + 1) / self.warmup_steps)
        if self.stages[stage].decays:
            rate *= 1.0 - step / self.stages[stage].steps
        return rate


GPU = Recipe(
    name="gpu",
    stages=(
        Stage(data="short", row_tokens=1024, rows=64, steps=3000),
        Stage(data="short", row_tokens=2048, rows=32, steps=3000, sparse=True),
        Stage(data="long", row_tokens=8192, rows=8, steps=2500, sparse=True, jumps=True),
        Stage(data="long", row_tokens=8192, rows=8, steps=1500, sparse=True, jumps=True, rounded=True, decays=True),
    ),
)
"""About 650 million tokens."""

CPU = replace(
    GPU,
    name="cpu",
    rate=3e-3,
    stages=(
        Stage(data="short", row_tokens=1024, rows=4, steps=1200),
        Stage(data="short", row_tokens=1024, rows=4, steps=300, sparse=True),
        Stage(data="medium", row_tokens=2048, rows=2, steps=200, sparse=True, jumps=True),
        Stage(data="medium", row_tokens=2048, rows=2, steps=200, sparse=True, jumps=True, rounded=True, decays=True),
    ),
)
"""About 8 million tokens: hours on two cores. It shows that the recipe runs; it does not make the shipped model."""

RECIPES = {recipe.name: recipe for recipe in (GPU, CPU)}
