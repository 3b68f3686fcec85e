"""Quantized arithmetic of V4: e4m3 and e2m1 with block scales, the Hadamard rotation, packed KV and index rows.

Source: architecture 2.8 (round trips), 3.3 (weights), 4.2 (rows). Everywhere a block of `n` values shares one scale

    s = 2 ** ceil(log2(max(amax, floor) / q))      q = 448 (e4m3) or 6 (e2m1), so |x / s| <= q

taken from the exponent bits of amax, which is exact: amax = q * 2**k gives s = 2**k. Values round half to even. A last
block may be partial. Inputs must be finite. An E8M0 byte b means 2 ** (b - 127), and 255 means NaN.

Letters: O rows (outputs) and I columns (inputs) of a weight, N rows, C head dim, J index dim, B blocks.
"""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kv_layout import FP4_BLOCK, FP8_BLOCK, IndexFormat, RowFormat, index_row_bytes, row_bytes
from model.quant import FP4_WEIGHT_BLOCK, WEIGHT_BLOCK

E4M3_MAX = 448.0  # 1.75 * 2**8
E2M1_MAX = 6.0  # 1.5 * 2**2
E4M3_AMAX_FLOOR = 1e-4
E2M1_AMAX_FLOOR = E2M1_MAX * 2.0**-126
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of codes 0-7; bit 3 of a code is the sign."""

_FLOAT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dequantize_fp8(weight_OI: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return e4m3 `weight_OI` times its 128 x 128 block scales as [O, I] in `dtype`.

    `scale`: [ceil(O / 128), ceil(I / 128)], float8_e8m0fnu or float32. The product is rounded once, to `dtype`.
    """
    rows, columns = weight_OI.shape
    assert scale.shape == (-(-rows // WEIGHT_BLOCK), -(-columns // WEIGHT_BLOCK)), "one scale for each 128 x 128 block"
    # A power-of-two scale makes the product exact in bf16 too; a float32 scale needs the wider product first.
    compute = dtype if scale.dtype == torch.float8_e8m0fnu else torch.float32
    values_OI = weight_OI.to(compute)
    scale_OB = scale.to(compute).repeat_interleave(WEIGHT_BLOCK, dim=0)[:rows]
    return _multiply_blocks_(values_OI, scale_OB, WEIGHT_BLOCK).to(dtype)


def dequantize_fp4(packed_OI2: Tensor, scale_OB: Tensor, dtype: torch.dtype) -> Tensor:
    """Return packed e2m1 times its 1 x 32 scales as [O, I] in `dtype` (float32 or bfloat16; both hold it exactly).

    `packed_OI2`: int8 [O, I / 2], column 2j in the low nibble and 2j + 1 in the high one.
    `scale_OB`: float8_e8m0fnu [O, ceil(I / 32)].
    """
    rows, half = packed_OI2.shape
    values_OI = _unpack_e2m1(packed_OI2, dtype)
    assert scale_OB.shape == (rows, -(-2 * half // FP4_WEIGHT_BLOCK)), "one scale for each 32 columns of a row"
    return _multiply_blocks_(values_OI, scale_OB.to(dtype), FP4_WEIGHT_BLOCK)


def quantize_fp8_blocks(weight_OI: Tensor, scale_kind: Literal["ue8m0", "float32"]) -> tuple[Tensor, Tensor]:
    """Quantize to (e4m3 [O, I], scale [ceil(O / 128), ceil(I / 128)]), as `dequantize_fp8` reads it.

    `ue8m0` scales are the powers of two of the module's formula, `float32` scales are amax / 448 (Base checkpoints).
    """
    rows, columns = weight_OI.shape
    padding = (0, -columns % WEIGHT_BLOCK, 0, -rows % WEIGHT_BLOCK)
    padded = F.pad(weight_OI.float(), padding)
    blocks = torch.unflatten(torch.unflatten(padded, 1, (-1, WEIGHT_BLOCK)), 0, (-1, WEIGHT_BLOCK))
    amax = blocks.abs().amax(dim=(1, 3), keepdim=True).clamp_min(E4M3_AMAX_FLOOR)
    code = _scale_code(amax, E4M3_MAX)
    scale = _power_of_two(code) if scale_kind == "ue8m0" else amax / E4M3_MAX
    quantized = _to_e4m3(blocks / scale).flatten(2, 3).flatten(0, 1)[:rows, :columns].contiguous()
    stored = code.view(torch.float8_e8m0fnu) if scale_kind == "ue8m0" else scale
    return quantized, stored[:, 0, :, 0].contiguous()


def quantize_fp4_blocks(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize to (packed e2m1 int8 [O, I / 2], float8_e8m0fnu [O, ceil(I / 32)]), as `dequantize_fp4` reads it."""
    codes, scale_code = _quantize_e2m1(weight_OI, FP4_WEIGHT_BLOCK)
    return _pack_nibbles(codes).view(torch.int8), scale_code.view(torch.float8_e8m0fnu)


def fp8_round_trip(x: Tensor, block: int, channels: int | None = None) -> Tensor:
    """Round the first `channels` (default: all) of the last dim to e4m3 with one scale for each `block`; like `x`.

    `block` is cut to `channels`. The other channels stay untouched. Every result is exact in bfloat16.
    """
    width = x.shape[-1] if channels is None else channels
    values, code = _quantize_e4m3(x[..., :width], min(block, width))
    rounded = _multiply_blocks_(values.float(), _power_of_two(code), min(block, width)).to(x.dtype)
    return rounded if width == x.shape[-1] else torch.cat([rounded, x[..., width:]], dim=-1)


def fp4_round_trip(x: Tensor, block: int = FP4_BLOCK) -> Tensor:
    """Round the last dim (even) to e2m1 with one scale for each `block` channels; like `x`, exact in bfloat16."""
    codes, scale_code = _quantize_e2m1(x, block)
    values = _unpack_e2m1(_pack_nibbles(codes), torch.float32)
    return _multiply_blocks_(values, _power_of_two(scale_code), block).to(x.dtype)


def hadamard(x: Tensor) -> Tensor:
    """Walsh-Hadamard transform of the last dim (a power of two), Sylvester order, times size ** -0.5; like `x`.

    Its own inverse. Computed in float32 as log2(size) butterflies, so a row's bits depend on that row alone.
    """
    size = x.shape[-1]
    assert size & (size - 1) == 0, "the Hadamard matrix is defined here for powers of two"
    y = x.float()
    span = 1
    while span < size:
        first, second = torch.unflatten(y, -1, (-1, 2, span)).unbind(dim=-2)
        y = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        span *= 2
    return y.mul(size**-0.5).to(x.dtype)


def pack_rows(x_NC: Tensor, row_format: RowFormat, rope_dim: int) -> Tensor:
    """Store window or entry rows. Float formats: [N, C] in that dtype. `fp8`: uint8 [N, row_bytes], each row

        C - R bytes e4m3 | 2R bytes bfloat16, the rotary channels | an E8M0 byte for each 64 | zeros up to 8 bytes

    Lossless for rows that `fp8_round_trip(x, 64, C - R)` has made and whose rotary channels are bfloat16.
    """
    if row_format != "fp8":
        return x_NC.to(_FLOAT_DTYPES[row_format])
    head_dim = x_NC.shape[-1]
    nope = head_dim - rope_dim
    values, code = _quantize_e4m3(x_NC[:, :nope], min(FP8_BLOCK, nope))
    rope = x_NC[:, nope:].to(torch.bfloat16).contiguous()
    parts = torch.cat([values.view(torch.uint8), rope.view(torch.uint8), code], dim=-1)
    return F.pad(parts, (0, row_bytes("fp8", head_dim, rope_dim) - parts.shape[-1]))


def unpack_rows(storage: Tensor, row_format: RowFormat, head_dim: int, rope_dim: int, dtype: torch.dtype) -> Tensor:
    """Read rows that `pack_rows` stored as [N, C] in `dtype`; `storage` may be any strided selection of rows."""
    if row_format != "fp8":
        return storage.to(dtype)
    nope = head_dim - rope_dim
    block = min(FP8_BLOCK, nope)
    end, num_blocks = nope + 2 * rope_dim, -(-nope // block)
    values, rope, code = storage[..., :nope], storage[..., nope:end], storage[..., end : end + num_blocks]
    kept = _multiply_blocks_(values.view(torch.float8_e4m3fn).to(dtype), _power_of_two(code).to(dtype), block)
    return torch.cat([kept, rope.contiguous().view(torch.bfloat16).to(dtype)], dim=-1)


def pack_index_rows(x_NJ: Tensor, index_format: IndexFormat) -> Tensor:
    """Store index keys. Float formats: [N, J] in that dtype. uint8 [N, index_row_bytes] for

        fp8   J bytes e4m3 | one float32 scale, a power of two
        fp4   J / 2 bytes e2m1, channel 2j in the low nibble | an E8M0 byte for each 32 channels

    `fp4` is lossless for rows that `fp4_round_trip` has made, `fp8` for `fp8_round_trip(x, J)`.
    """
    if index_format == "fp8":
        values, code = _quantize_e4m3(x_NJ, x_NJ.shape[-1])
        return torch.cat([values.view(torch.uint8), _power_of_two(code).view(torch.uint8)], dim=-1)
    if index_format == "fp4":
        codes, scale_code = _quantize_e2m1(x_NJ, FP4_BLOCK)
        return torch.cat([_pack_nibbles(codes), scale_code], dim=-1)
    return x_NJ.to(_FLOAT_DTYPES[index_format])


def unpack_index_rows(storage: Tensor, index_format: IndexFormat, index_head_dim: int, dtype: torch.dtype) -> Tensor:
    """Read index keys that `pack_index_rows` stored as [N, J] in `dtype`."""
    if index_format in _FLOAT_DTYPES:
        return storage.to(dtype)
    assert storage.shape[-1] == index_row_bytes(index_format, index_head_dim), "rows of another index dim or format"
    if index_format == "fp8":
        scale = storage[..., index_head_dim:].contiguous().view(torch.float32)
        return storage[..., :index_head_dim].view(torch.float8_e4m3fn).to(dtype) * scale.to(dtype)
    half = index_head_dim // 2
    values = _unpack_e2m1(storage[..., :half], dtype)
    return _multiply_blocks_(values, _power_of_two(storage[..., half:]).to(dtype), FP4_BLOCK)


def _scale_code(amax: Tensor, largest: float) -> Tensor:
    """E8M0 byte (uint8) of 2 ** ceil(log2(amax / largest)); `amax` is float32, normal and positive."""
    exponent, carry = (8, 0x1FFFFF) if largest == E4M3_MAX else (2, 0x3FFFFF)
    # Adding `carry` overflows into the exponent exactly when the mantissa exceeds that of `largest`.
    return ((amax.view(torch.int32) + carry >> 23) - exponent).to(torch.uint8)


def _power_of_two(code: Tensor) -> Tensor:
    """float32 value of E8M0 bytes (uint8)."""
    return code.contiguous().view(torch.float8_e8m0fnu).float()


def _blocks(x: Tensor, block: int) -> Tensor:
    """[..., C] as float32 [..., B, block], the last block filled with zeros."""
    width = x.shape[-1]
    return torch.unflatten(F.pad(x.float(), (0, -width % block)), -1, (-1, block))


def _to_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _quantize_e4m3(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(e4m3 [..., C], E8M0 bytes uint8 [..., B])."""
    blocks = _blocks(x, block)
    code = _scale_code(blocks.abs().amax(dim=-1).clamp_min(E4M3_AMAX_FLOOR), E4M3_MAX)
    values = _to_e4m3(blocks / _power_of_two(code)[..., None])
    return values.flatten(-2)[..., : x.shape[-1]], code


def _quantize_e2m1(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(e2m1 codes uint8 [..., C], E8M0 bytes uint8 [..., B])."""
    blocks = _blocks(x, block)
    scale_code = _scale_code(blocks.abs().amax(dim=-1).clamp_min(E2M1_AMAX_FLOOR), E2M1_MAX)
    scaled = blocks / _power_of_two(scale_code)[..., None]
    magnitude = scaled.abs()
    code = scaled.signbit().to(torch.uint8) << 3
    for below, (value, above) in enumerate(pairwise(E2M1_VALUES)):
        middle = (value + above) / 2
        # A tie goes to the even one of the codes `below` and `below + 1`.
        code += magnitude >= middle if below % 2 else magnitude > middle
    return code.flatten(-2)[..., : x.shape[-1]], scale_code


def _pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes [..., C] (C even) as uint8 [..., C / 2]."""
    pairs = torch.unflatten(codes, -1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


_PAIR_TABLES: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _pair_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two values of each byte [256, 2], seen as one integer of their joint width so that one gather moves both."""
    table = _PAIR_TABLES.get((dtype, device))
    if table is None:
        values = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=dtype)
        pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=-1)
        table = pairs.view(torch.int64 if dtype == torch.float32 else torch.int32)[:, 0].to(device)
        _PAIR_TABLES[dtype, device] = table
    return table


def _unpack_e2m1(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [..., C / 2] as unscaled values [..., C] in float32 or bfloat16."""
    assert dtype in (torch.float32, torch.bfloat16), "e2m1 is unpacked to float32 or bfloat16"
    bytes_ = packed.contiguous().view(torch.uint8)
    pairs = _pair_table(dtype, packed.device).index_select(0, bytes_.flatten().int())
    return pairs.view(dtype).view(*packed.shape[:-1], 2 * packed.shape[-1])


def _multiply_blocks_(values: Tensor, scale: Tensor, block: int) -> Tensor:
    """Multiply `values` [..., C] in place by `scale` [..., B], one for each `block` of the last dim; returns it."""
    width = values.shape[-1]
    whole = width - width % block
    if whole:
        torch.unflatten(values[..., :whole], -1, (-1, block)).mul_(scale[..., : whole // block, None])
    if whole < width:
        values[..., whole:].mul_(scale[..., -1:])
    return values
