"""The shape of the embedded model: every part of V4, in 12 MB. Torch-free."""

from dataclasses import replace

from model.config import ModelConfig
from model.presets import preset

VOCAB_SIZE = 2048

EMBEDDED: ModelConfig = replace(
    preset("nano"),
    vocab_size=VOCAB_SIZE,
    num_hidden_layers=7,
    # As Flash: two sliding layers, then CSA and HCA in turn, CSA last.
    compress_ratios=(0, 0, 4, 128, 4, 128, 4),
    index_n_heads=8,
    index_topk=64,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=96,
)
