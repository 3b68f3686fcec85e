"""Rotary position tables: one of the sliding-window layers, one of the layers with a compressor."""

import math

import torch
from torch import Tensor

from model.config import ModelConfig, RopeScaling

Rotation = tuple[Tensor, Tensor]
"""cos and sin, fp32 [N, rope_dim / 2]."""


def inverse_frequencies(theta: float, rope_dim: int, scaling: RopeScaling | None) -> Tensor:
    """Angle in radians that one position turns each pair: fp32 [rope_dim / 2] on the CPU (architecture, 1.4).

    YaRN divides the slow pairs by `factor`, with a linear ramp between the pairs that turn `beta_fast` and
    `beta_slow` times over the original context. cos and sin are not amplified.
    """
    f = 1.0 / (theta ** (torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim))
    if scaling is None:
        return f

    def pair_turning(turns: float) -> float:
        return (
            rope_dim
            * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi))
            / (2 * math.log(theta))
        )

    low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_turning(scaling.beta_slow)), rope_dim - 1)
    ramp = (torch.arange(rope_dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)
    slow = ramp.clamp(0, 1)
    return f * (1 - slow) + f / scaling.factor * slow


class Rope:
    """Both tables of a model. Angles are fp32 products position * frequency, as the reference computes them."""

    def __init__(self, config: ModelConfig) -> None:
        dim = config.qk_rope_head_dim
        self._main = inverse_frequencies(config.rope_theta, dim, None)
        self._compressed = inverse_frequencies(config.compress_rope_theta, dim, config.rope_scaling)

    def to(self, device: torch.device) -> None:
        self._main = self._main.to(device)
        self._compressed = self._compressed.to(device)

    def rotation(self, positions_N: Tensor, *, compressed: bool) -> Rotation:
        """cos and sin at absolute positions; `compressed` selects the table of layers with a compressor."""
        angles = positions_N.float().unsqueeze(1) * (self._compressed if compressed else self._main)
        return angles.cos(), angles.sin()
