"""What the machine offers: device, cores, bfloat16, free memory. Measured here so that `resolve` stays pure."""

import os
from pathlib import Path
from typing import Literal

import torch

from engine.config import EngineConfig, EngineConfigError, MachineFacts

_CGROUP = Path("/sys/fs/cgroup")
CPU_MARGIN_BYTES = 1 << 30
"""Left to the rest of the machine, whatever the flags say."""


def pick_device(config: EngineConfig) -> Literal["cpu", "cuda"]:
    """Raises EngineConfigError when CUDA is asked for and not there."""
    if config.device == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if config.device == "cuda":
        raise EngineConfigError("device: cuda was asked for, but torch finds no CUDA device; use device auto or cpu")
    return "cpu"


def has_fast_bf16(device: Literal["cpu", "cuda"]) -> bool:
    """Whether the device multiplies bfloat16 natively (CPU: AVX512-BF16 or AMX)."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    flags = _cpu_flags()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def num_cores() -> int:
    """Cores this process may run on: its affinity, or less where the control group allows less time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = (_read_text(_CGROUP / "cpu.max") or "max").partition(" ")
    if quota.isdecimal() and period.isdecimal():
        cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


def free_bytes(config: EngineConfig, device: Literal["cpu", "cuda"]) -> int:
    """Memory that the engine may still take.

    CUDA: `gpu_memory_utilization` of the card less what is in use on it. CPU: available memory less a margin.
    """
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        # Blocks that torch's allocator holds without using are as good as free.
        idle = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return max(0, int(total * config.gpu_memory_utilization) - (total - free) + idle)
    return max(0, _available_bytes() - CPU_MARGIN_BYTES)


def measure(config: EngineConfig, device: Literal["cpu", "cuda"]) -> MachineFacts:
    """Facts for `resolve`; call it once the weights are loaded."""
    return MachineFacts(
        device=device,
        has_bf16=has_fast_bf16(device),
        free_bytes=free_bytes(config, device),
        num_cores=num_cores(),
        host_free_bytes=max(0, _available_bytes() - CPU_MARGIN_BYTES),
    )


def _available_bytes() -> int:
    """MemAvailable, or less where the control group allows less."""
    limits = [_meminfo_available()]
    limit, used = (_read_text(_CGROUP / name) or "max" for name in ("memory.max", "memory.current"))
    if limit.isdecimal() and used.isdecimal():
        limits.append(max(0, int(limit) - int(used)))
    return min(limits)


def _meminfo_available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:  # not Linux: half of the physical memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:  # not Linux, or no control group of that version
        return None


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except FileNotFoundError:
        return frozenset()
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return frozenset(next(lines, "").partition(":")[2].split())
