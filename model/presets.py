"""Named model shapes: the two official models, the bench and test sizes, and slices of Flash. Torch-free."""

from dataclasses import replace

from model.config import ModelConfig

PRESET_NAMES = ("flash", "pro", "mini", "nano", "flash-slice-N")


def preset(name: str) -> ModelConfig:
    """Return the preset `name`; `flash-slice-N` has Flash's dimensions and N layers of all kinds (N >= 1).

    Raises:
        ValueError: the name is not a preset.
    """
    if name in _PRESETS:
        return _PRESETS[name]
    head, _, tail = name.rpartition("-")
    if head == "flash-slice" and tail.isdecimal() and int(tail) >= 1:
        return _flash_slice(int(tail))
    raise ValueError(f"unknown preset {name!r}; presets are {', '.join(PRESET_NAMES)}")


def _alternating(first: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """`first`, then 4, 128, 4, 128, ... up to `layers` entries."""
    return (*first, *((4, 128)[i % 2] for i in range(layers - len(first))))[:layers]


_FLASH = ModelConfig(
    vocab_size=129280,
    hidden_size=4096,
    num_hidden_layers=43,
    num_attention_heads=64,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    sliding_window=128,
    compress_ratios=_alternating((0, 0), 43),
    index_n_heads=64,
    index_head_dim=128,
    index_topk=512,
    n_routed_experts=256,
    num_experts_per_tok=6,
    moe_intermediate_size=2048,
    num_hash_layers=3,
    routed_scaling_factor=1.5,
)

_PRO = ModelConfig(
    vocab_size=129280,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1536,
    o_groups=16,
    o_lora_rank=1024,
    sliding_window=128,
    compress_ratios=_alternating((128, 128), 61),
    index_n_heads=64,
    index_head_dim=128,
    index_topk=1024,
    n_routed_experts=384,
    num_experts_per_tok=6,
    moe_intermediate_size=3072,
    num_hash_layers=3,
    routed_scaling_factor=2.5,
)

_MINI = ModelConfig(
    vocab_size=16384,
    hidden_size=1024,
    num_hidden_layers=8,
    num_attention_heads=8,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=256,
    o_groups=4,
    o_lora_rank=256,
    sliding_window=128,
    compress_ratios=_alternating((0, 0), 8),
    index_n_heads=8,
    index_head_dim=128,
    index_topk=512,
    n_routed_experts=32,
    num_experts_per_tok=6,
    moe_intermediate_size=128,
    num_hash_layers=3,
    routed_scaling_factor=1.5,
)

_NANO = ModelConfig(
    vocab_size=2048,
    hidden_size=256,
    num_hidden_layers=6,
    num_attention_heads=8,
    head_dim=128,
    qk_rope_head_dim=64,
    q_lora_rank=128,
    o_groups=4,
    o_lora_rank=64,
    sliding_window=128,
    compress_ratios=_alternating((0, 0), 6),
    # 24 heads: with few heads whole index scores are exactly zero (ReLU) and an oracle without our tie rule differs.
    index_n_heads=24,
    index_head_dim=64,
    index_topk=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    num_hash_layers=3,
    routed_scaling_factor=1.5,
)

_PRESETS = {"flash": _FLASH, "pro": _PRO, "mini": _MINI, "nano": _NANO}


def _flash_slice(layers: int) -> ModelConfig:
    return replace(
        _FLASH,
        num_hidden_layers=layers,
        compress_ratios=_alternating((0,), layers),
        num_hash_layers=min(3, max(1, layers // 3)),
    )
