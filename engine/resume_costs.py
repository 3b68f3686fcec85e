"""Predicted seconds of the ways back into a prompt: the cost model of steps, and the speed of copies, which is learnt.

    seconds of a load = bytes / rate        rate: that of the loads that were measured, newer ones weigh more

Before anything is measured the rate is a slow machine's, worth `_PRIOR_BYTES` of measurements.
"""

from typing import Literal

from engine.cost_model import CostModel

_PRIOR_RATE = {"cuda": 20e9, "cpu": 4e9}
"""Bytes per second: a PCIe 4 link and half; a core that copies."""
_PRIOR_BYTES = 64e6
_MEMORY = 0.95
"""What an observation keeps of the weight of those before it."""
_OUTLIER = 4.0
"""A load that takes this many times as long as predicted, or less than one part in so many, weighs less."""


class CopyAndComputeCosts:
    """Implements `engine.kv.resume.ResumeCosts`."""

    def __init__(self, costs: CostModel, device: Literal["cpu", "cuda"]) -> None:
        self._costs = costs
        self._bytes = _PRIOR_BYTES
        self._seconds = _PRIOR_BYTES / _PRIOR_RATE[device]

    def prefill_seconds(self, start: int, end: int) -> float:
        return self._costs.prefill_seconds(start, end) if end > start else 0.0

    def replay_seconds(self, position: int) -> float:
        return self._costs.replay_seconds(position) if position else 0.0

    def load_seconds(self, num_bytes: int) -> float:
        return num_bytes * self._seconds / self._bytes

    def observe_load(self, num_bytes: int, seconds: float) -> None:
        """Learn from a step whose loads and restores took `seconds`; 0: nobody measured them."""
        if num_bytes <= 0 or seconds <= 0.0:
            return
        ratio = seconds / self.load_seconds(num_bytes)
        weight = min(1.0, _OUTLIER / max(ratio, 1.0 / ratio))
        self._bytes = _MEMORY * self._bytes + weight * num_bytes
        self._seconds = _MEMORY * self._seconds + weight * seconds
