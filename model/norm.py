"""RMSNorm with a learned weight."""

import torch
from torch import Tensor

from model.build import Build, CheckpointModule


class RMSNorm(CheckpointModule):
    """x * rsqrt(mean(x^2) + eps) * weight over the last dim; fp32 inside, one rounding at the end."""

    def __init__(self, build: Build, features: int) -> None:
        super().__init__(build)
        self.weight = self.declare("weight", (features,), build.float_code, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.build.ops.rms_norm(x, self.weight, self.build.config.rms_norm_eps)
