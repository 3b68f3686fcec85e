"""What every module of one model is built with, and the base of modules that own checkpoint tensors."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.ops.registry import OpTable
from model.parallel import ParallelGroup
from model.quant import WeightFormat
from model.tensors import CheckpointTensor, Shard

Numerics = Literal["plain", "official"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """Shared by all modules of one model."""

    config: ModelConfig
    weights: WeightFormat
    dtype: torch.dtype
    """Of activations and of matrices that are not quantized."""
    numerics: Numerics
    ops: OpTable
    group: ParallelGroup
    device: torch.device

    @property
    def float_code(self) -> str:
        """safetensors code of the tensors that official checkpoints store in bfloat16."""
        return "F32" if self.weights.dense == "float32" else "BF16"

    @property
    def scale_dtype(self) -> torch.dtype:
        """dtype of FP8 block scales."""
        return torch.float32 if self.weights.scale == "float32" else torch.float8_e8m0fnu

    @property
    def scale_code(self) -> str:
        return "F32" if self.weights.scale == "float32" else "F8_E8M0"


class CheckpointModule(nn.Module):
    """A module some of whose parameters stand in a checkpoint under its own path."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.build = build
        self._records: list[tuple[str, str, tuple[int, ...], Shard | None]] = []

    def declare(
        self, name: str, shape: tuple[int, ...], code: str, dtype: torch.dtype, shard: Shard | None = None
    ) -> nn.Parameter:
        """A parameter `name` of the full `shape` in the file, stored here as this rank's shard in `dtype`."""
        local = list(shape)
        if shard is not None:
            local[shard.dim] = shard.length
        parameter = nn.Parameter(torch.empty(local, dtype=dtype, device=self.build.device), requires_grad=False)
        self._records.append((name, code, shape, shard))
        return parameter

    def own_tensors(self, prefix: str) -> Iterator[CheckpointTensor]:
        """Records of this module's own parameters (not of its children's)."""
        for name, code, shape, shard in self._records:
            destination: Tensor = getattr(self, name)
            yield CheckpointTensor(name=prefix + name, dtype=code, shape=shape, destination=destination, shard=shard)
