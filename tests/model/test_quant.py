"""Quantized arithmetic against a scalar implementation in Python floats and integers, written from the formats."""

import math
import struct
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.kv_layout import index_row_bytes, row_bytes
from model.ops.reference.quant import (
    dequantize_fp4,
    dequantize_fp8,
    fp4_round_trip,
    fp8_round_trip,
    hadamard,
    pack_index_rows,
    pack_rows,
    quantize_fp4_blocks,
    quantize_fp8_blocks,
    unpack_index_rows,
    unpack_rows,
)

# ---- the scalar side: Python floats are exact for everything below ----


def e8m0_value(byte: int) -> float:
    return math.nan if byte == 255 else math.ldexp(1.0, byte - 127)


def e4m3_value(byte: int) -> float:
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    value = math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
    return -value if sign else value


def e2m1_value(code: int) -> float:
    exponent, mantissa = code >> 1 & 3, code & 1
    value = mantissa / 2 if exponent == 0 else math.ldexp(2 + mantissa, exponent - 2)
    return -value if code & 8 else value


E4M3 = [e4m3_value(b) for b in range(127)]
E2M1 = [e2m1_value(c) for c in range(8)]


def nearest_code(magnitude: float, values: list[float]) -> int:
    """Index of the nearest value; a tie goes to the even code, which has the even mantissa."""
    best = min(abs(v - magnitude) for v in values)
    nearest = [c for c, v in enumerate(values) if abs(v - magnitude) == best]
    return nearest[0] if len(nearest) == 1 else next(c for c in nearest if c % 2 == 0)


def block_exponent(block: list[float], largest: float, floor: float) -> int:
    """Least k with amax <= largest * 2**k."""
    amax = max(floor, max(abs(v) for v in block))
    k = -160
    while math.ldexp(largest, k) < amax:
        k += 1
    return k


def float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def scalar_codes(row: list[float], block: int, kind: str) -> tuple[list[int], list[int]]:
    """(codes with sign, exponent of each block)."""
    values, largest, floor, sign = (
        (E4M3, 448.0, float32(1e-4), 128) if kind == "e4m3" else (E2M1, 6.0, 6 * 2.0**-126, 8)
    )
    codes, exponents = [], []
    for start in range(0, len(row), block):
        part = row[start : start + block]
        k = block_exponent(part, largest, floor)
        exponents.append(k)
        for v in part:
            code = nearest_code(math.ldexp(abs(v), -k), values)
            codes.append(code | (sign if math.copysign(1.0, v) < 0 else 0))
    return codes, exponents


def scalar_round_trip(row: list[float], block: int, kind: str) -> list[float]:
    """As float32 holds it: the largest floats round up to 2**128, which is infinite there."""
    codes, exponents = scalar_codes(row, block, kind)
    value = e4m3_value if kind == "e4m3" else e2m1_value
    exact = [math.ldexp(value(c), exponents[i // block]) for i, c in enumerate(codes)]
    return torch.tensor(exact, dtype=torch.float64).float().tolist()


# ---- inputs ----

ROW = 160


def hard_rows() -> torch.Tensor:
    """float32 [N, 160]: random at many sizes, zeros, denormals, exact ties, amax at and around powers of two."""
    g = torch.Generator().manual_seed(7)
    rows = [torch.randn(ROW, generator=g) * 10.0**e for e in (-44, -38, -20, -5, -4, -1, 0, 2, 9, 30, 37)]
    rows.append(torch.zeros(ROW))
    rows.append(-torch.zeros(ROW))
    rows.append(torch.full((ROW,), 1e-45))
    rows.append(torch.full((ROW,), torch.finfo(torch.float32).max))
    for values in (E4M3, E2M1):
        midpoints = [(a + b) / 2 for a, b in pairwise(values)]
        for scale in (1.0, 2.0**-3, 2.0**20, 2.0**-13):
            ties = torch.tensor((midpoints * ROW)[:ROW]) * scale
            ties[0] = values[-1] * scale
            rows += [ties, -ties.flip(0)]
    for q in (448.0, 6.0):
        for k in (-40, -1, 0, 1, 40):
            edge = torch.tensor(q * 2.0**k)
            for amax in (edge, torch.nextafter(edge, edge * 2), torch.nextafter(edge, edge / 2)):
                row = (torch.rand(ROW, generator=g) - 0.5) * amax
                row[::32] = amax
                rows.append(row)
    return torch.stack(rows)


HARD = hard_rows()
floats = st.floats(allow_nan=False, allow_infinity=False, width=32)


@pytest.mark.parametrize("block", [32, 64, 128, 160])
def test_fp8_round_trip_equals_scalar(block: int) -> None:
    assert fp8_round_trip(HARD, block).tolist() == [scalar_round_trip(r, block, "e4m3") for r in HARD.tolist()]


def test_fp4_round_trip_equals_scalar() -> None:
    assert fp4_round_trip(HARD, 32).tolist() == [scalar_round_trip(r, 32, "e2m1") for r in HARD.tolist()]


@settings(max_examples=60, deadline=None)
@given(st.lists(floats, min_size=2, max_size=50), st.sampled_from([2, 7, 16, 32]))
def test_round_trips_equal_scalar_on_any_floats(row: list[float], block: int) -> None:
    row = row[: len(row) // 2 * 2]
    x = torch.tensor(row, dtype=torch.float32)
    assert fp8_round_trip(x, block).tolist() == scalar_round_trip(row, block, "e4m3")
    assert fp4_round_trip(x, block).tolist() == scalar_round_trip(row, block, "e2m1")


def test_fp8_round_trip_leaves_the_other_channels() -> None:
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = fp8_round_trip(x, 64, 64)
    assert torch.equal(y[..., 64:], x[..., 64:])
    assert torch.equal(y[..., :64], fp8_round_trip(x[..., :64], 64)) and not torch.equal(y, x)
    narrow = fp8_round_trip(x[..., :48], 64, 24)
    assert torch.equal(narrow[..., :24], fp8_round_trip(x[..., :24], 24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trips_are_idempotent_and_exact_in_bfloat16(dtype: torch.dtype) -> None:
    x = HARD[:11].to(dtype)[2:]
    for trip in (lambda t: fp8_round_trip(t, 64), fp4_round_trip):
        once = trip(x)
        assert once.dtype == dtype
        assert torch.equal(once.bfloat16().to(dtype), once)
        assert torch.equal(trip(once), once)


def test_dequantize_fp8_reads_every_byte_and_scale() -> None:
    g = torch.Generator().manual_seed(1)
    rows, columns = 300, 200  # partial blocks on both edges
    raw = torch.randint(0, 256, (rows, columns), generator=g, dtype=torch.uint8)
    raw[:256, 0] = torch.arange(256, dtype=torch.uint8)
    scale_raw = torch.tensor([[0, 1], [127, 200], [100, 240]], dtype=torch.uint8)
    weight, scale = raw.view(torch.float8_e4m3fn), scale_raw.view(torch.float8_e8m0fnu)
    scale_f32 = torch.tensor([[0.3, 1e-3], [7.1, 1.0], [2.5e4, 1e-20]])
    for s, value in (
        (scale, lambda o, i: e8m0_value(int(scale_raw[o // 128, i // 128]))),
        (scale_f32, lambda o, i: scale_f32[o // 128, i // 128].item()),
    ):
        expected = torch.tensor(
            [[e4m3_value(b) * value(o, i) for i, b in enumerate(row)] for o, row in enumerate(raw.tolist())],
            dtype=torch.float64,
        )
        for dtype in (torch.float32, torch.bfloat16):
            # One rounding: the exact product to float32, and with a float32 scale from there to bfloat16.
            once = expected.float().to(dtype)
            found = dequantize_fp8(weight, s, dtype)
            assert found.dtype == dtype
            assert torch.equal(found.nan_to_num(nan=7777.0), once.nan_to_num(nan=7777.0))


def test_dequantize_fp4_reads_every_byte_and_scale() -> None:
    rows, half = 8, 40  # 80 columns: two whole scale blocks and a half one
    packed = torch.arange(256, dtype=torch.uint8).repeat(2)[: rows * half].view(rows, half)
    scale_raw = torch.tensor([[120 + o, 0, 250 - o] for o in range(rows)], dtype=torch.uint8)
    expected = [
        [
            e2m1_value(packed[o, i // 2].item() >> (4 * (i % 2)) & 15) * e8m0_value(scale_raw[o, i // 32].item())
            for i in range(2 * half)
        ]
        for o in range(rows)
    ]
    for dtype in (torch.float32, torch.bfloat16):
        found = dequantize_fp4(packed.view(torch.int8), scale_raw.view(torch.float8_e8m0fnu), dtype)
        assert found.dtype == dtype
        assert torch.equal(found.double(), torch.tensor(expected, dtype=torch.float64))


def test_quantize_fp8_blocks_equals_scalar() -> None:
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(130, 140, generator=g) * 0.02
    weight[128:] *= 1e6
    weight[0, 139] = 448 * 2.0**-10
    quantized, scale = quantize_fp8_blocks(weight, "ue8m0")
    assert scale.dtype == torch.float8_e8m0fnu and scale.shape == (2, 2) and quantized.is_contiguous()
    raw = quantized.view(torch.uint8)
    for bo in range(2):
        for bi in range(2):
            part = weight[bo * 128 : bo * 128 + 128, bi * 128 : bi * 128 + 128]
            flat = part.flatten().tolist()
            codes, exponents = scalar_codes(flat, len(flat), "e4m3")
            assert int(scale.view(torch.uint8)[bo, bi]) == exponents[0] + 127
            assert raw[bo * 128 : bo * 128 + 128, bi * 128 : bi * 128 + 128].flatten().tolist() == codes


def test_quantize_fp8_blocks_with_float32_scales_uses_the_whole_range() -> None:
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(3)) * 0.02
    quantized, scale = quantize_fp8_blocks(weight, "float32")
    assert scale.dtype == torch.float32
    for block in range(2):
        part = weight[block * 128 : block * 128 + 128]
        assert scale[block, 0] == part.abs().max() / 448
        assert quantized[block * 128 : block * 128 + 128].float().abs().max() == 448
    error = (dequantize_fp8(quantized, scale, torch.float32) - weight).abs()
    assert bool((error <= weight.abs() / 16 + scale.max() * 2.0**-10).all())


def test_quantize_fp4_blocks_equals_scalar() -> None:
    weight = torch.randn(6, 80, generator=torch.Generator().manual_seed(4)) * 0.02
    weight[2] = 0
    packed, scale = quantize_fp4_blocks(weight)
    assert packed.dtype == torch.int8 and packed.shape == (6, 40)
    assert scale.dtype == torch.float8_e8m0fnu and scale.shape == (6, 3)
    for o, row in enumerate(weight.tolist()):
        codes, exponents = scalar_codes(row, 32, "e2m1")
        assert scale.view(torch.uint8)[o].tolist() == [e + 127 for e in exponents]
        assert packed.view(torch.uint8)[o].tolist() == [
            a | b << 4 for a, b in zip(codes[::2], codes[1::2], strict=True)
        ]


def test_hadamard_is_sylvester_orthogonal_and_its_own_inverse() -> None:
    for size in (1, 2, 64, 128):
        matrix = torch.tensor(
            [[(-1.0) ** (i & j).bit_count() / math.sqrt(size) for j in range(size)] for i in range(size)]
        )
        assert torch.allclose(hadamard(torch.eye(size)), matrix, atol=1e-7)
        x = torch.randn(3, 2, size, generator=torch.Generator().manual_seed(size))
        assert torch.allclose(hadamard(x), x @ matrix, atol=1e-5)
        assert torch.allclose(hadamard(hadamard(x)), x, atol=1e-5)
        assert torch.equal(hadamard(x)[1, :1], hadamard(x[1, :1]))
    assert hadamard(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(("head_dim", "rope_dim"), [(512, 64), (128, 64), (96, 64), (160, 16)])
def test_packed_rows_are_lossless_on_the_grid(head_dim: int, rope_dim: int) -> None:
    g = torch.Generator().manual_seed(head_dim)
    nope = head_dim - rope_dim
    x = torch.randn(9, head_dim, generator=g) * torch.logspace(-9, 9, 9)[:, None]
    x[0] = 0
    grid = fp8_round_trip(x.bfloat16(), 64, nope)
    storage = pack_rows(grid, "fp8", rope_dim)
    assert storage.dtype == torch.uint8 and storage.shape == (9, row_bytes("fp8", head_dim, rope_dim))
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(unpack_rows(storage, "fp8", head_dim, rope_dim, dtype), grid.to(dtype))
    selected = torch.empty(4, storage.shape[1] + 3, dtype=torch.uint8)[:, : storage.shape[1]].copy_(storage[2:6])
    assert torch.equal(unpack_rows(selected, "fp8", head_dim, rope_dim, torch.bfloat16), grid[2:6])


def test_packed_row_bytes_stand_where_the_format_says() -> None:
    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(5)).bfloat16()
    row = bytes(pack_rows(x, "fp8", 64)[0].tolist())
    assert len(row) == 584 and row[583] == 0
    codes, exponents = scalar_codes(x[0, :448].float().tolist(), 64, "e4m3")
    assert list(row[:448]) == codes
    assert list(row[576:583]) == [e + 127 for e in exponents]
    upper_halves = [struct.unpack("<I", struct.pack("<f", v))[0] >> 16 for v in x[0, 448:].float().tolist()]
    assert list(struct.unpack("<64H", row[448:576])) == upper_halves


@pytest.mark.parametrize("index_head_dim", [64, 128, 16])
def test_packed_index_rows_are_lossless_on_the_grid(index_head_dim: int) -> None:
    x = torch.randn(7, index_head_dim, generator=torch.Generator().manual_seed(6)) * torch.logspace(-6, 6, 7)[:, None]
    for index_format, grid in (("fp4", fp4_round_trip(x)), ("fp8", fp8_round_trip(x, index_head_dim))):
        storage = pack_index_rows(grid, index_format)
        assert storage.dtype == torch.uint8 and storage.shape[1] == index_row_bytes(index_format, index_head_dim)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(unpack_index_rows(storage, index_format, index_head_dim, dtype), grid.to(dtype))


def test_packed_index_row_bytes_stand_where_the_format_says() -> None:
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(8))
    row = bytes(pack_index_rows(x, "fp8")[0].tolist())
    codes, exponents = scalar_codes(x[0].tolist(), 128, "e4m3")
    assert len(row) == 132 and list(row[:128]) == codes
    assert struct.unpack("<f", row[128:])[0] == math.ldexp(1.0, exponents[0])
    row = bytes(pack_index_rows(x, "fp4")[0].tolist())
    codes, exponents = scalar_codes(x[0].tolist(), 32, "e2m1")
    assert len(row) == 68 and list(row[64:]) == [e + 127 for e in exponents]
    assert list(row[:64]) == [a | b << 4 for a, b in zip(codes[::2], codes[1::2], strict=True)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float_rows_are_stored_as_they_are(dtype: str) -> None:
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(9))
    rows, keys = pack_rows(x, dtype, 64), pack_index_rows(x, dtype)
    assert rows.dtype == keys.dtype == getattr(torch, dtype)
    assert torch.equal(unpack_rows(rows, dtype, 128, 64, torch.float32), x.to(rows.dtype).float())
    assert torch.equal(unpack_index_rows(keys, dtype, 128, torch.float32), x.to(rows.dtype).float())


def test_no_rows_is_fine() -> None:
    assert pack_rows(torch.empty(0, 512), "fp8", 64).shape == (0, 584)
    assert pack_index_rows(torch.empty(0, 128), "fp4").shape == (0, 68)
    assert unpack_rows(torch.empty(0, 584, dtype=torch.uint8), "fp8", 512, 64, torch.float32).shape == (0, 512)
    assert unpack_index_rows(torch.empty(0, 68, dtype=torch.uint8), "fp4", 128, torch.float32).shape == (0, 128)
