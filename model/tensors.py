"""The checkpoint as the model sees it: one record for each tensor of an official checkpoint.

Module attributes equal checkpoint keys, so loading is set equality between these records and a checkpoint's index.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The part of a full tensor that this rank keeps: `full.narrow(dim, start, length)`."""

    dim: int
    start: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointTensor:
    """One tensor of the checkpoint and where it goes."""

    name: str
    """Official key, such as `layers.3.ffn.experts.17.w1.weight`."""
    dtype: str
    """safetensors code in a checkpoint of this weight format: BF16, F32, F8_E4M3, F8_E8M0, I8 or I64."""
    shape: tuple[int, ...]
    """Full shape in the file."""
    destination: torch.Tensor
    """This rank's storage (a parameter, or a view into stacked experts); on the meta device while only counting.
    Quantized weights and scales keep the file's dtype; floating tensors are converted to the destination's."""
    shard: Shard | None = None
