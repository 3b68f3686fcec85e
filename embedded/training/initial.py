"""Parameters before the first step. Every matrix answers with variance near one, and every stream starts as the others.

Streams are told apart by noise in the hyper-connections' biases; without it they would stay equal for ever.
"""

import math

import torch
from torch import Tensor

from model.config import ModelConfig
from model.tensors import CheckpointTensor
from model.tools.make_checkpoint import random_tensor
from model.transformer import Transformer

_HEAD_STD = 0.01
_HYPER_NOISE = 0.2
_HYPER_SCALE = 0.1
_KEEP = 3.0
"""Logit by which a stream goes on as itself rather than as another one."""


def initialise(model: Transformer, seed: int) -> None:
    """Fill a floating-point model in place; the same on every machine."""
    with torch.no_grad():
        for tensor in model.checkpoint_tensors():
            tensor.destination.copy_(_initial(model.config, seed, tensor))


def _initial(config: ModelConfig, seed: int, tensor: CheckpointTensor) -> Tensor:
    name, shape = tensor.name, tensor.shape
    if name.endswith("tid2eid"):
        return random_tensor(config, seed, name, shape)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(("attn_sink", "ape", "gate.bias")):
        return torch.zeros(shape)
    if "hc_" in name and name.endswith("_scale"):
        return torch.full(shape, _HYPER_SCALE)
    # `random_tensor` gives matrices a variance of 1 / inputs.
    noise = random_tensor(config, seed, name.replace("_base", "_fn").replace("head.weight", "matrix"), shape)
    if "hc_" in name and name.endswith("_base"):
        return _hyper_base(config.hc_mult, noise * math.sqrt(shape[-1]) * _HYPER_NOISE)
    if name == "embed.weight":
        return noise
    if name == "head.weight":
        return noise * math.sqrt(shape[-1]) * _HEAD_STD
    if name.endswith(("wo_b.weight", "w2.weight")):
        # What a sub-layer adds: the streams keep their size through all of them.
        return noise / math.sqrt(2 * config.num_hidden_layers)
    return noise


def _hyper_base(streams: int, noise: Tensor) -> Tensor:
    """A collapse starts as the mean of the streams, a spread with weight one, and each stream goes on as itself."""
    base = noise.clone()
    base[:streams] += -math.log(streams - 1)
    if base.numel() > streams:
        base[2 * streams :] += _KEEP * torch.eye(streams).flatten()
    return base
