"""From stored tensors to a model's storage: matching by name, shape and dtype, then a parallel memory-mapped copy."""

import difflib
import logging
import mmap
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from model.loading_errors import CheckpointError
from model.safetensors_index import StoredTensor, some
from model.tensors import CheckpointTensor

logger = logging.getLogger(__name__)

_FLOATS = frozenset({"BF16", "F16", "F32", "F64"})
_READABLE: Mapping[str, frozenset[str]] = {
    "BF16": _FLOATS,
    "F32": _FLOATS,
    "F8_E4M3": frozenset({"F8_E4M3"}),
    "F8_E8M0": frozenset({"F8_E8M0", "U8"}),
    "I8": frozenset({"I8", "U8"}),
    "I64": frozenset({"I64", "I32"}),
}
"""Stored dtypes that are read as an expected one: floats convert by value, U8 is E8M0 or packed FP4 bytes unchanged."""

_TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
_RAW_CODES = frozenset({"F8_E4M3", "F8_E8M0", "I8"})
"""Expected dtypes whose bytes are copied unseen."""

_TASK_BYTES = 64 << 20
_MOST_THREADS = 8

Pair = tuple[CheckpointTensor, StoredTensor]


def match_tensors(
    where: Path,
    expected: Iterable[CheckpointTensor],
    stored: Mapping[str, StoredTensor],
    is_unused: Callable[[str], bool],
) -> list[Pair]:
    """Pair every expected tensor with its stored one; stored tensors that `is_unused` accepts may be left over.

    Raises:
        CheckpointError: names missing, surplus, wrongly shaped and wrongly typed tensors (first few and count).
    """
    pairs, missing, shapes, dtypes = [], [], [], []
    for tensor in expected:
        found = stored.get(tensor.name)
        if found is None:
            missing.append(tensor.name)
        elif found.shape != tensor.shape:
            shapes.append(f"{tensor.name} (expected {list(tensor.shape)}, found {list(found.shape)})")
        elif found.dtype not in _READABLE[tensor.dtype]:
            dtypes.append(f"{tensor.name} (expected {tensor.dtype}, found {found.dtype})")
        else:
            pairs.append((tensor, found))
    surplus: list[str] = []
    if len(pairs) < len(stored):
        known = {tensor.name for tensor, _ in pairs}
        wrong = {entry.split(" ", 1)[0] for entry in (*shapes, *dtypes)}
        surplus = [name for name in stored if name not in known and name not in wrong and not is_unused(name)]
    problems = [
        f"{len(names)} {'tensor is' if len(names) == 1 else 'tensors are'} {kind}: {some(names, 3)}"
        for kind, names in (
            ("missing", missing),
            ("not known to this model", surplus),
            ("of the wrong shape", shapes),
            ("of the wrong dtype", dtypes),
        )
        if names
    ]
    if problems:
        hint = None
        close = difflib.get_close_matches(missing[0], surplus[:2000], n=1) if missing else []
        if close:
            hint = f"Perhaps {close[0]!r} is meant to be {missing[0]!r}."
        raise CheckpointError(where, "the tensors do not fit config.json: " + "; ".join(problems), hint=hint)
    return pairs


def copy_tensors(where: Path, pairs: Sequence[Pair], *, num_experts: int, progress: bool) -> None:
    """Fill every destination from the mapped files, a few ranges at a time, and log bytes, seconds and rate.

    Raises:
        CheckpointError: a scale is NaN, infinite or not positive, or a table names an expert that is not there.
    """
    started = time.monotonic()
    total = sum(stored.num_bytes for _, stored in pairs)
    files = {stored.path for _, stored in pairs}
    mapped = {path: _MappedFile(path) for path in files}
    threads = min(_MOST_THREADS, 2 * (os.cpu_count() or 1))
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=None if progress else True) as bar,
        ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool,
    ):
        tasks = [pool.submit(_copy_group, mapped[group[0][1].path], group, num_experts) for group in _groups(pairs)]
        try:
            for task in as_completed(tasks):
                bar.update(task.result())
        except CheckpointError:
            pool.shutdown(cancel_futures=True)
            raise
    seconds = time.monotonic() - started
    logger.info(
        "loaded %s: %d tensors, %.3f GB in %.2f s (%.2f GB/s)",
        where,
        len(pairs),
        total / 1e9,
        seconds,
        total / 1e9 / max(seconds, 1e-9),
    )


class _MappedFile:
    """A file as one read-only uint8 tensor, alive as long as this object or a view of the tensor."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            # torch warns that the buffer is read-only; nothing here writes to it.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def expect(self, start: int, end: int) -> None:
        """Ask the kernel to read a range ahead."""
        aligned = start - start % mmap.PAGESIZE
        if hasattr(mmap, "MADV_WILLNEED"):
            self._map.madvise(mmap.MADV_WILLNEED, aligned, end - aligned)

    def view(self, stored: StoredTensor, code: str) -> Tensor:
        dtype = _TORCH_DTYPES[code]
        raw = self._bytes[stored.start : stored.end]
        if stored.start % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(stored.shape)


def _groups(pairs: Sequence[Pair]) -> Iterable[list[Pair]]:
    """Runs of neighbours in one file, of about _TASK_BYTES."""
    group: list[Pair] = []
    size = 0
    for pair in sorted(pairs, key=lambda p: (p[1].path, p[1].start)):
        if group and (size >= _TASK_BYTES or pair[1].path != group[0][1].path):
            yield group
            group, size = [], 0
        group.append(pair)
        size += pair[1].num_bytes
    if group:
        yield group


def _copy_group(file: _MappedFile, group: Sequence[Pair], num_experts: int) -> int:
    """Copy one group; returns its bytes."""
    file.expect(group[0][1].start, group[-1][1].end)
    with torch.inference_mode():
        for tensor, stored in group:
            # Raw codes are seen as the expected dtype, so that U8 bytes never convert by value.
            source = file.view(stored, tensor.dtype if tensor.dtype in _RAW_CODES else stored.dtype)
            if tensor.shard is not None:
                source = source.narrow(tensor.shard.dim, tensor.shard.start, tensor.shard.length)
            _check_values(tensor, stored, source, num_experts)
            tensor.destination.copy_(source)
    return sum(stored.num_bytes for _, stored in group)


def _check_values(tensor: CheckpointTensor, stored: StoredTensor, source: Tensor, num_experts: int) -> None:
    """Refuse the values that would turn every answer into noise, or index out of bounds, without any other sign."""
    if tensor.name.endswith(".scale"):
        if source.dtype == torch.float8_e8m0fnu:
            good = bool(source.view(torch.uint8).max() < 255)
        else:
            good = bool(((source > 0) & source.isfinite()).all())
        expected = "finite scales > 0"
    elif tensor.name.endswith(".tid2eid"):
        good = bool(((source >= 0) & (source < num_experts)).all())
        expected = f"expert ids 0 to {num_experts - 1}"
    else:
        return
    if not good:
        raise CheckpointError(
            stored.path, f"tensor {tensor.name!r}: values", expected=expected, found="others among them"
        )
