"""Quantized weights, the official arithmetic and packed storage inside the whole model."""

from typing import Any

import pytest
import torch

from model.ops.reference import quant
from model.quant import OFFICIAL, WeightFormat
from model.transformer import Transformer

FP8_BASE = WeightFormat(dense="fp8", experts="fp8", scale="float32")
FP8_REPACK = WeightFormat(dense="fp8", experts="fp8", scale="ue8m0")

SMOOTH: dict[str, Any] = {"num_hash_layers": 6, "index_topk": 64}
"""No choice depends on an activation (experts by token id, every entry selected), so small errors stay small."""


def quantized_and_twin(
    tools: Any, weights: WeightFormat, changes: dict[str, Any] | None = None, **options: Any
) -> tuple[Transformer, Transformer]:
    """A model with quantized weights, and a float32 one that holds their dequantized values."""
    config = tools.nano_config(hidden_size=160, moe_intermediate_size=96, **(changes or {}))
    twin = tools.random_model(config, seed=31)
    model = Transformer(config, weights=weights, dtype=torch.float32, device="cpu", **options)
    records = {record.name: record for record in model.checkpoint_tensors()}
    for target in twin.checkpoint_tensors():
        record = records[target.name]
        scale = records.get(target.name.removesuffix("weight") + "scale")
        if record.dtype == "F8_E4M3":
            assert scale is not None
            values, scales = quant.quantize_fp8_blocks(target.destination, weights.scale)
            target.destination.copy_(quant.dequantize_fp8(values, scales, torch.float32))
        elif record.dtype == "I8":
            values, scales = quant.quantize_fp4_blocks(target.destination)
            target.destination.copy_(quant.dequantize_fp4(values, scales, torch.float32))
        else:
            record.destination.copy_(target.destination)
            continue
        assert scale is not None
        record.destination.copy_(values)
        scale.destination.copy_(scales)
    model.finish_loading()
    twin.finish_loading()
    return model, twin


@pytest.mark.parametrize("weights", [OFFICIAL, FP8_BASE, FP8_REPACK], ids=["official", "base", "repack"])
def test_quantized_weights_equal_their_dequantized_twin(tools: Any, weights: WeightFormat) -> None:
    model, twin = quantized_and_twin(tools, weights)
    tokens = tools.random_tokens(model.config, 150, seed=1)
    rows = [tools.Driver(m).prompt(tokens)[1] for m in (model, twin)]
    torch.testing.assert_close(rows[0], rows[1], rtol=0, atol=1e-5 * float(rows[1].abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_packed_rows_are_lossless_under_official_numerics(tools: Any, dtype: torch.dtype) -> None:
    """Rows that the official arithmetic has rounded survive FP8 and FP4 storage to the bit; the rotary part needs
    bfloat16, so the float32 model is compared on bfloat16 rows."""
    config = tools.nano_config(qk_rope_head_dim=32, head_dim=96, index_head_dim=64)
    tokens = tools.random_tokens(config, 260, seed=2)
    model = tools.random_model(config, seed=5, deterministic=True, dtype=dtype, numerics="official")
    formats = [("bfloat16", "bfloat16"), ("fp8", "bfloat16"), ("fp8", "fp4")]
    rows = [
        tools.Driver(model, row_format=row, index_format=index).prompt(tokens, chunk=97)[1] for row, index in formats
    ]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_official_numerics_are_chunk_invariant(tools: Any) -> None:
    config = tools.nano_config()
    tokens = tools.random_tokens(config, 260, seed=3)
    model = tools.random_model(config, seed=6, deterministic=True, numerics="official")
    drivers = [tools.Driver(model, row_format="fp8", index_format="fp4") for _ in (0, 1)]
    whole, chunked = drivers[0].prompt(tokens)[1], drivers[1].prompt(tokens, chunk=61)[1]
    assert torch.equal(whole, chunked)


def test_official_numerics_round_and_plain_ones_do_not(tools: Any) -> None:
    """The switch changes logits, by about what 8-bit activations cost and not more."""
    plain, _ = quantized_and_twin(tools, OFFICIAL, SMOOTH)
    official, _ = quantized_and_twin(tools, OFFICIAL, SMOOTH, numerics="official")
    tokens = tools.random_tokens(plain.config, 60, seed=4)
    rows = [tools.Driver(m).prompt(tokens)[1] for m in (plain, official)]
    difference = (rows[0] - rows[1]).norm() / rows[0].norm()
    assert 1e-3 < difference < 0.2


@pytest.mark.parametrize(("row_format", "index_format"), [("bfloat16", "bfloat16"), ("fp8", "fp8"), ("fp8", "fp4")])
def test_storage_formats_cost_little_under_plain_numerics(tools: Any, row_format: str, index_format: str) -> None:
    config = tools.nano_config(**SMOOTH)
    tokens = tools.random_tokens(config, 250, seed=5)
    model = tools.random_model(config, seed=7)
    exact = tools.Driver(model).prompt(tokens)[1]
    stored = tools.Driver(model, row_format=row_format, index_format=index_format).prompt(tokens)[1]
    assert 0 < (exact - stored).norm() / exact.norm() < (0.02 if row_format == "bfloat16" else 0.15)


def test_bfloat16_model_is_near_the_float32_one(tools: Any) -> None:
    config = tools.nano_config(**SMOOTH)
    tokens = tools.random_tokens(config, 200, seed=6)
    wide = tools.random_model(config, seed=8)
    narrow = tools.random_model(config, seed=8, dtype=torch.bfloat16)
    for record, other in zip(wide.checkpoint_tensors(), narrow.checkpoint_tensors(), strict=True):
        record.destination.copy_(other.destination)
    exact = tools.Driver(wide).prompt(tokens)[1]
    rounded = tools.Driver(narrow, row_format="bfloat16", index_format="bfloat16").prompt(tokens, chunk=80)[1]
    assert (exact - rounded).norm() / exact.norm() < 0.05


def test_deterministic_bfloat16_is_chunk_invariant(tools: Any) -> None:
    config = tools.nano_config()
    tokens = tools.random_tokens(config, 200, seed=7)
    model = tools.random_model(config, seed=9, deterministic=True, dtype=torch.bfloat16)
    rows = [
        tools.Driver(model, row_format="bfloat16", index_format="bfloat16").prompt(tokens, chunk=chunk)[1]
        for chunk in (200, 37, 1)
    ]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
