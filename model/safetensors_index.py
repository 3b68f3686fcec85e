"""What a directory of safetensors files holds, by name: headers are read and bounds-checked before a byte is mapped.

    file   8 bytes little-endian header length n | n bytes JSON | data
    JSON   {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}, offsets within the data

Every field is treated as hostile: a wrong one raises CheckpointError and never reads past the file. Files in pickle
formats (*.bin, *.pt) are never opened.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.loading_errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MOST_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library too."""
_MOST_DIMS = 8
_MOST_NAME_LENGTH = 500

ELEMENT_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U16": 2,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
"""Bytes of one element by safetensors dtype code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor in a file: `end - start` bytes at absolute offset `start`, row-major."""

    name: str
    dtype: str
    """safetensors code."""
    shape: tuple[int, ...]
    path: Path
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


def read_stored_tensors(model_dir: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `model_dir` by its name in the files.

    The index (`model.safetensors.index.json`) leads; without it there must be one `model.safetensors`.

    Raises:
        CheckpointError: no weights, a missing file, a bad header, or files that differ from the index.
    """
    index = model_dir / INDEX_NAME
    single = model_dir / SINGLE_NAME
    if index.is_file():
        return _read_indexed(model_dir, index)
    if single.is_file():
        return read_header(single)
    _raise_no_weights(model_dir)
    raise AssertionError


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read and check one file's header.

    Raises:
        CheckpointError: anything in it is out of bounds, overlapping, of an unknown dtype or not what its size says.
    """
    file_size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if file_size < 8 or length > min(MOST_HEADER_BYTES, file_size - 8):
            raise CheckpointError(
                path,
                "the header does not fit the file",
                expected=f"a header of at most {max(0, min(MOST_HEADER_BYTES, file_size - 8)):,} bytes",
                found=f"{length:,} bytes in a file of {file_size:,}",
                hint="The file is truncated or is no safetensors file; download it again.",
            )
        raw = file.read(length)
    entries = _parse_json(path, raw, "header")
    data_start = 8 + length
    tensors = {
        name: _read_entry(path, name, entry, data_start, file_size - data_start)
        for name, entry in entries.items()
        if name != "__metadata__"
    }
    _check_tiling(path, tensors, data_start, file_size)
    return tensors


def _read_indexed(model_dir: Path, index: Path) -> dict[str, StoredTensor]:
    content = _parse_json(index, index.read_bytes(), "index")
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(index, "weight_map is malformed", expected="an object of tensor name to file name")
    for name in weight_map:
        _check_name(index, name)
    for file in set(weight_map.values()):
        _check_name(index, file)
        if file in ("", ".", "..") or Path(file).name != file:
            raise CheckpointError(
                index, "weight_map names a file elsewhere", expected="file names beside the index", found=repr(file)
            )
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (model_dir / file).is_file()]
    if missing:
        raise CheckpointError(
            index,
            f"{len(missing)} of {len(files)} files are missing: {some(missing)}",
            hint="Finish the download of this directory.",
        )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(model_dir / file).items():
            if name not in weight_map:
                raise CheckpointError(tensor.path, f"holds tensor {name!r}, which {INDEX_NAME} does not name")
            if weight_map[name] != file:
                raise CheckpointError(
                    tensor.path, f"holds tensor {name!r}", expected=f"it in {weight_map[name]}, as {INDEX_NAME} says"
                )
            tensors[name] = tensor
    lost = sorted(weight_map.keys() - tensors.keys())
    if lost:
        raise CheckpointError(index, f"the files lack {len(lost)} of the tensors named for them: {some(lost)}")
    return tensors


def _parse_json(path: Path, raw: bytes, what: str) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in pairs:
            if name in result:
                raise CheckpointError(path, f"the {what} names {name[:_MOST_NAME_LENGTH]!r} twice")
            result[name] = value
        return result

    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=without_duplicates)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"the {what} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(path, f"the {what} is malformed", expected="an object", found=type(content).__name__)
    return content


def _check_name(path: Path, name: str) -> None:
    """Names are shown in errors and logs, so control characters and lone surrogates must not pass."""
    if len(name) > _MOST_NAME_LENGTH or not name.isprintable():
        expected = f"at most {_MOST_NAME_LENGTH} printable characters"
        raise CheckpointError(path, "a name is malformed", expected=expected, found=repr(name[:100]))


def _read_entry(path: Path, name: str, entry: Any, data_start: int, data_bytes: int) -> StoredTensor:
    def is_size(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**63 - 1

    def bad(field: str, expected: str) -> CheckpointError:
        return CheckpointError(path, f"tensor {name!r}: {field}", expected=expected, found=repr(entry.get(field))[:100])

    _check_name(path, name)
    if not isinstance(entry, dict):
        raise CheckpointError(path, f"tensor {name!r}", expected="an object", found=repr(entry)[:100])
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise bad("dtype", f"one of {', '.join(ELEMENT_BYTES)}")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMS or not all(is_size(n) for n in shape):
        raise bad("shape", f"at most {_MOST_DIMS} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(n) for n in offsets):
        raise bad("data_offsets", "two sizes")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise CheckpointError(
            path,
            f"tensor {name!r} lies outside the file",
            expected=f"offsets within {data_bytes:,} bytes of data",
            found=f"{begin:,} to {end:,}",
            hint="The file is truncated or damaged; download it again.",
        )
    num_bytes = math.prod(shape) * ELEMENT_BYTES[dtype]
    if end - begin != num_bytes:
        raise CheckpointError(
            path,
            f"tensor {name!r}: size",
            expected=f"{num_bytes:,} bytes for {dtype} {list(shape)}",
            found=f"{end - begin:,}",
        )
    return StoredTensor(
        name=name, dtype=dtype, shape=tuple(shape), path=path, start=data_start + begin, end=data_start + end
    )


def _check_tiling(path: Path, tensors: Mapping[str, StoredTensor], data_start: int, file_size: int) -> None:
    """The tensors must cover the data without overlap, gap or rest, as the format demands."""
    position = data_start
    before = "the header"
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.end)):
        if tensor.start < position:
            raise CheckpointError(path, f"tensors {before} and {tensor.name!r} overlap")
        if tensor.start > position:
            raise CheckpointError(path, f"{tensor.start - position:,} bytes before tensor {tensor.name!r} are nobody's")
        position, before = tensor.end, repr(tensor.name)
    if position != file_size:
        raise CheckpointError(
            path, "the file is longer than its header says", expected=f"{position:,} bytes", found=f"{file_size:,}"
        )


def _raise_no_weights(model_dir: Path) -> None:
    if not model_dir.is_dir():
        raise CheckpointError(model_dir, "there is no such directory")
    names = sorted(os.listdir(model_dir))
    pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    shards = [n for n in names if n.endswith(".safetensors")]
    if shards:
        found, hint = some(shards), f"Download {INDEX_NAME} too."
    elif pickles:
        found = some(pickles)
        hint = "Pickle files can run code and are never opened; save the model as safetensors (`save_pretrained`)."
    else:
        found, hint = "no weights", "Give the directory that holds config.json and the *.safetensors files."
    raise CheckpointError(model_dir, "no checkpoint", expected=f"{INDEX_NAME} or {SINGLE_NAME}", found=found, hint=hint)


def some(names: list[str], most: int = 5) -> str:
    """The first few of `names` and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
