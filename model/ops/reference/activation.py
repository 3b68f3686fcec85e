"""Activations made of exp and plain arithmetic: torch's own round differently at the ragged end of a tensor."""

import torch
from torch import Tensor


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), accurate for very negative x."""
    return torch.log1p(torch.exp(-x.abs())) + x.clamp_min(0)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), fp32 inside, like `gate`."""
    wide = gate.float().clamp(max=limit)
    return (wide / (1 + torch.exp(-wide)) * up.float().clamp(-limit, limit)).to(gate.dtype)
