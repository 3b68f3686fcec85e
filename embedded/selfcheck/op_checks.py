"""Each operation's backend on this machine against the reference, and this machine's FP8 and FP4 against their tables.

The reference runs on the CPU, with fixed shapes and a fixed order of sums.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from embedded.selfcheck.op_cases import OpCase, op_cases
from embedded.selfcheck.report import Check
from model.ops.reference import quant
from model.ops.registry import OpTable
from model.ops.table import resolve_ops


def op_checks(devices: tuple[str, ...]) -> Iterator[Check]:
    """One check for each operation and device, through all of its cases."""
    cases = sorted(op_cases(), key=lambda case: case.op)
    for device in devices:
        table = resolve_ops(device)
        for op, group in groupby(cases, key=lambda case: case.op):
            some = tuple(group)
            yield Check(f"op {op} on {device}", partial(first_wrong, some, table, device))
        yield Check(f"FP8 values on {device}", partial(_fp8_difference, device))
        yield Check(f"FP4 values on {device}", partial(_fp4_difference, device))


def first_wrong(cases: tuple[OpCase, ...], table: OpTable, device: str) -> str | None:
    """The first difference between a table and the reference."""
    reference = resolve_ops("cpu", deterministic=True)
    for case in cases:
        with torch.inference_mode():
            expected, found = case.run(reference, "cpu"), case.run(table, device)
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            difference = first_difference(one, other.cpu(), case.tolerance)
            if difference is not None:
                return f"{case.op} ({case.inputs}), output {number}{difference}"
    return None


def first_difference(expected: Tensor, found: Tensor, tolerance: float) -> str | None:
    """Where, expected and found, of the first element further off than `tolerance` times the largest expected one."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return f": expected {list(expected.shape)} {expected.dtype}, found {list(found.shape)} {found.dtype}"
    one, other = expected.double(), found.double()
    finite = one[one.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    # Infinities are near nothing but themselves, and a NaN is near nothing.
    near = (one == other) | ((one - other).abs() <= tolerance * largest)
    if bool(near.all()):
        return None
    at = (~near).nonzero()[0].tolist()
    return f" at {at}: expected {one[tuple(at)]:.6g}, found {other[tuple(at)]:.6g}, tolerance {tolerance * largest:.2g}"


def _fp8_difference(device: str) -> str | None:
    """All 256 codes of e4m3, read as a weight: sign, 4 exponent bits with bias 7, 3 mantissa bits; 0x7f is NaN."""
    codes = [code for code in range(256) if code & 0x7F != 0x7F]
    values = []
    for code in codes:
        exponent, mantissa = code >> 3 & 15, code & 7
        magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        values.append(-magnitude if code & 0x80 else magnitude)
    stored = torch.tensor(codes, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).unsqueeze(0)
    return _weight_difference(values, lambda scale, dtype: quant.dequantize_fp8(stored, scale, dtype), 2, device)


def _fp4_difference(device: str) -> str | None:
    """All bytes of two e2m1 codes: the low nibble first, bit 3 the sign."""
    magnitudes = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    values = []
    for byte in range(256):
        values += [-magnitudes[code & 7] if code & 8 else magnitudes[code] for code in (byte & 15, byte >> 4)]
    stored = torch.arange(256, dtype=torch.uint8, device=device).view(torch.int8).unsqueeze(0)
    return _weight_difference(values, lambda scale, dtype: quant.dequantize_fp4(stored, scale, dtype), 16, device)


def _weight_difference(
    values: list[float], read: Callable[[Tensor, torch.dtype], Tensor], num_scales: int, device: str
) -> str | None:
    """`read` gives `values` times a power of two, exactly, in float32 and in bfloat16."""
    for exponent in (-3, 0, 5):
        scale = torch.full((1, num_scales), 127 + exponent, dtype=torch.uint8, device=device).view(torch.float8_e8m0fnu)
        for dtype in (torch.float32, torch.bfloat16):
            expected = (torch.tensor(values).unsqueeze(0) * 2.0**exponent).to(dtype)
            difference = first_difference(expected, read(scale, dtype).cpu(), 0.0)
            if difference is not None:
                return f"scale 2^{exponent}, {dtype}{difference}"
    return None
