"""Every operation's backend against the reference, and that a broken one is found and named."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from embedded.selfcheck import op_checks
from embedded.selfcheck.machine import backends, describe
from embedded.selfcheck.op_cases import OpCase, op_cases
from embedded.selfcheck.op_checks import first_difference, first_wrong
from embedded.selfcheck.report import run_checks
from model.ops.registry import OpTable
from model.ops.table import resolve_ops

CASES = tuple(op_cases())
OPS = [field.name for field in fields(OpTable) if field.name != "pack_weight"]


def cases_of(op: str) -> tuple[OpCase, ...]:
    return tuple(case for case in CASES if case.op == op)


def bent(op: Callable[..., Any], tolerance: float) -> Callable[..., Any]:
    """Off by three tolerances in one place; another choice where entries are chosen."""

    def wrong(*args: Any, **named: Any) -> Any:
        found = op(*args, **named)
        first = found[0] if isinstance(found, tuple) else found
        if first.numel() == 0:
            # A step that completes no entry leaves its mark in the accumulators.
            first = args[3]
        if first.dtype == torch.int64:
            first[-1, 0] = -1
        else:
            largest = first.nan_to_num(neginf=0.0).abs()
            at = tuple((largest == largest.max()).nonzero()[0].tolist())
            first[at] *= 1 + 3 * tolerance
        return found

    return wrong


@pytest.mark.parametrize("op", OPS)
def test_every_operation_has_cases_and_this_machine_passes(op: str) -> None:
    assert len(cases_of(op)) >= 4
    assert first_wrong(cases_of(op), resolve_ops("cpu"), "cpu") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("op", OPS)
def test_every_operation_on_a_gpu(op: str) -> None:
    assert first_wrong(cases_of(op), resolve_ops("cuda"), "cuda") is None


@pytest.mark.parametrize("op", OPS)
def test_a_broken_operation_is_found_in_every_case(op: str) -> None:
    table = resolve_ops("cpu")
    for case in cases_of(op):
        broken = replace(table, **{op: bent(getattr(table, op), case.tolerance)})
        told = first_wrong((case,), broken, "cpu")
        assert told is not None and told.startswith(f"{op} (") and "expected" in told and "found" in told, case


def test_only_the_broken_operation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(device: str, *, deterministic: bool = False) -> OpTable:
        table = resolve_ops(device, deterministic=deterministic)
        return table if deterministic else replace(table, rms_norm=bent(table.rms_norm, 0.02))

    monkeypatch.setattr(op_checks, "resolve_ops", resolve)
    monkeypatch.setattr(op_checks, "op_cases", lambda: (*cases_of("rms_norm"), *cases_of("linear"), *cases_of("index")))
    outcomes = run_checks(op_checks.op_checks(("cpu",)), lambda outcome: None)
    assert {outcome.name: outcome.passed for outcome in outcomes} == {
        "op index on cpu": True,
        "op linear on cpu": True,
        "op rms_norm on cpu": False,
        "FP8 values on cpu": True,
        "FP4 values on cpu": True,
    }


def test_wrong_weights_formats_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nibbles in the other order, and a code that is read as another value."""
    from model.ops.reference import quant

    read_fp4, read_fp8 = quant.dequantize_fp4, quant.dequantize_fp8

    def swapped(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        codes = packed.view(torch.uint8)
        return read_fp4((codes << 4 | codes >> 4).view(torch.int8), scale, dtype)

    monkeypatch.setattr(op_checks.quant, "dequantize_fp4", swapped)
    monkeypatch.setattr(op_checks.quant, "dequantize_fp8", lambda w, s, dtype: read_fp8(w, s, dtype).clamp_max(30))
    monkeypatch.setattr(op_checks, "op_cases", lambda: ())
    outcomes = {o.name: o for o in run_checks(op_checks.op_checks(("cpu",)), lambda outcome: None)}
    # Code 1, in the low nibble of byte 1, is 0.5, and 256 stands in e4m3; both times 2^-3.
    assert "at [0, 2]: expected 0.0625, found 0" in str(outcomes["FP4 values on cpu"].difference)
    assert "expected 32, found 30" in str(outcomes["FP8 values on cpu"].difference)


def test_differences() -> None:
    one = torch.tensor([1.0, float("-inf"), 3.0])
    assert first_difference(one, one.clone(), 0.0) is None
    assert first_difference(one, torch.tensor([1.0, float("-inf"), 3.001]), 1e-3) is None
    told = first_difference(one, torch.tensor([1.0, float("-inf"), 3.1]), 1e-3)
    assert told is not None and "at [2]: expected 3, found 3.1" in told
    assert first_difference(one, torch.tensor([1.0, 0.0, 3.0]), 1e-3) is not None
    assert first_difference(one, torch.tensor([float("nan"), float("-inf"), 3.0]), 1e9) is not None
    assert first_difference(one, one[:2], 0.0) is not None
    assert first_difference(one, one.double(), 0.0) is not None


def test_the_machine_in_one_line() -> None:
    line = describe()
    assert torch.__version__ in line and "threads" in line and "\n" not in line
    assert backends(resolve_ops("cpu", deterministic=True)) == f"reference {', '.join(OPS)}"
    assert backends(resolve_ops("cpu")).startswith("cpu linear")
