"""Whether the rows of a replay are enough, by what each of them depends on."""

import numpy as np

from model.config import CSA_RATIO, HCA_RATIO, ModelConfig
from model.kv_layout import LayerReplay


def replay_is_exact(model: ModelConfig, position: int, layers: tuple[LayerReplay, ...]) -> bool:
    """Whether a replay of these rows rebuilds every slot row of `position` in every layer.

    A row is exact in a layer when its input is, and its output when the rows of its window are as well (entries are in
    the pages). Only rows that the layer below has put out can enter a layer.
    """
    width = model.sliding_window - 1
    inputs = np.ones(position, dtype=bool)
    for kind, layer in zip(model.layer_kinds, layers, strict=True):
        exact = inputs.copy()
        exact[: layer.start] = False
        folded = position
        if kind == "csa":
            folded = max(0, position // CSA_RATIO * CSA_RATIO - CSA_RATIO)
        elif kind == "hca":
            folded = position // HCA_RATIO * HCA_RATIO
        if not exact[max(0, position - width) :].all() or not exact[folded:].all() or layer.fold > folded:
            return False
        missing = np.concatenate([[0], np.cumsum(~exact)])
        rows = np.arange(position)
        inputs = exact & (missing[rows + 1] == missing[np.maximum(0, rows - width)])
        inputs[: layer.output] = False
    return True
