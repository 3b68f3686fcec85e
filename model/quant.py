"""Weight formats of V4 checkpoints. The arithmetic stands in `model/ops/reference/quant.py`."""

from dataclasses import dataclass
from typing import Literal

FloatFormat = Literal["bfloat16", "float32"]

WEIGHT_BLOCK = 128
"""FP8 weights carry one scale for each 128 x 128 block (edge blocks may be partial)."""
FP4_WEIGHT_BLOCK = 32
"""FP4 weights carry one E8M0 scale for each 32 input channels of each row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """How a checkpoint stores its matrices; detected from dtypes, never from names.

    official instruct   dense fp8, experts fp4, scale ue8m0
    base                dense fp8, experts fp8, scale float32
    FP8 repack          dense fp8, experts fp8, scale ue8m0
    plain               dense and experts bfloat16 or float32, no scales
    """

    dense: Literal["fp8"] | FloatFormat
    """wq_a, wq_b, wkv, wo_a, wo_b, indexer.wq_b, shared experts, MTP's e_proj and h_proj."""
    experts: Literal["fp4", "fp8"] | FloatFormat
    """Routed experts."""
    scale: Literal["ue8m0", "float32"] | None
    """dtype of `.scale` companions; FP4 scales are always ue8m0. None without quantized tensors."""


OFFICIAL = WeightFormat(dense="fp8", experts="fp4", scale="ue8m0")
