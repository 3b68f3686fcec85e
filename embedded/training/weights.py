"""Matrices of the network under training, plain or as the exported checkpoint will round them.

Rounded weights are computed once for each step, outside the graph: w + (rounded(w) - w), so that gradients pass as if
there were no rounding (the straight-through estimator).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.linear import Linear
from model.moe import Experts
from model.ops.reference import quant


class Weights:
    """`rounding` starts to round; `refresh` follows what the optimizer has changed."""

    def __init__(self, model: nn.Module, quantized: frozenset[str]) -> None:
        """`quantized`: paths of the `Linear` modules that the checkpoint stores in FP8; experts are FP4."""
        self.rounding = False
        self._linears = {m: n in quantized for n, m in model.named_modules() if isinstance(m, Linear)}
        self._experts = [m for m in model.modules() if isinstance(m, Experts)]
        self._deltas: dict[nn.Parameter, Tensor] = {}

    def matrix(self, linear: Linear) -> Tensor:
        return self._rounded(linear.weight)

    def linear(self, linear: Linear, x: Tensor) -> Tensor:
        return F.linear(x, self._rounded(linear.weight))

    def experts(self, experts: Experts) -> tuple[Tensor, Tensor]:
        """w13 [E, 2, F, D] and w2 [E, D, F]."""
        return self._rounded(experts.w13), self._rounded(experts.w2)

    def refresh(self) -> None:
        """Round the weights as they stand, or none of them."""
        self._deltas.clear()
        if not self.rounding:
            return
        with torch.no_grad():
            for linear, is_fp8 in self._linears.items():
                if is_fp8:
                    values, scale = quant.quantize_fp8_blocks(linear.weight, "ue8m0")
                    rounded = quant.dequantize_fp8(values, scale, torch.float32)
                    self._deltas[linear.weight] = rounded - linear.weight
            for experts in self._experts:
                for parameter in (experts.w13, experts.w2):
                    flat = parameter.flatten(0, -2)
                    rounded = quant.dequantize_fp4(*quant.quantize_fp4_blocks(flat), torch.float32)
                    self._deltas[parameter] = rounded.view_as(parameter) - parameter

    def _rounded(self, parameter: nn.Parameter) -> Tensor:
        delta = self._deltas.get(parameter)
        return parameter if delta is None else parameter + delta
