"""Predicted seconds of the ways back into a prompt: the cost model of steps, and the speed of copies."""

from typing import Literal

from engine.cost_model import CostModel

_BYTES_PER_SECOND = {"cuda": 20e9, "cpu": 4e9}


class CopyAndComputeCosts:
    """Implements `engine.kv.resume.ResumeCosts`."""

    def __init__(self, costs: CostModel, device: Literal["cpu", "cuda"]) -> None:
        self._costs = costs
        self._bytes_per_second = _BYTES_PER_SECOND[device]

    def prefill_seconds(self, start: int, end: int) -> float:
        return self._costs.prefill_seconds(start, end) if end > start else 0.0

    def replay_seconds(self, position: int) -> float:
        return self._costs.replay_seconds(position) if position else 0.0

    def load_seconds(self, num_bytes: int) -> float:
        return num_bytes / self._bytes_per_second
