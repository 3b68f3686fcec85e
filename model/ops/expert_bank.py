"""What the experts op computes with: the matrices of one rank's routed experts, however they are stored."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertBank:
    """Experts `start` .. `start + length` of this rank; matrices by local number, in the model's dtype."""

    start: int
    length: int
    gate_up: Callable[[int], Tensor]
    """[2F, D]: w1 over w3."""
    down: Callable[[int], Tensor]
    """[D, F]."""
    round_activations: Callable[[Tensor], Tensor]
    """Before every matrix, in official numerics."""
    limit: float
