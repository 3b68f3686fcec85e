"""What selfcheck runs on, in one line."""

import platform
from functools import partial
from typing import Any

import torch

from model.ops.registry import OpTable
from model.ops.table import resolve_ops


def devices() -> tuple[str, ...]:
    """Device types whose backends can run here."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def describe() -> str:
    """Device, torch, threads and where each operation comes from."""
    names = [platform.machine()]
    if torch.cuda.is_available():
        names.append(torch.cuda.get_device_name())
    ops = "; ".join(f"{device}: {backends(resolve_ops(device))}" for device in devices())
    return f"{', '.join(names)}; torch {torch.__version__}, {torch.get_num_threads()} threads; operations: {ops}"


def backends(table: OpTable) -> str:
    """Backends of a table and the operations that each computes, such as `cpu attention, index; reference rotate`."""
    groups: dict[str, list[str]] = {}
    for name in OpTable.__dataclass_fields__:
        op = getattr(table, name)
        if op is not None and name != "pack_weight":
            groups.setdefault(_backend(op), []).append(name)
    return "; ".join(f"{backend} {', '.join(ops)}" for backend, ops in sorted(groups.items()))


def _backend(op: Any) -> str:
    """`model.ops.cpu.attention` is `cpu`."""
    function = op.func if isinstance(op, partial) else op
    parts = str(function.__module__).split(".")
    return parts[2] if parts[:2] == ["model", "ops"] and len(parts) > 3 else str(function.__module__)
