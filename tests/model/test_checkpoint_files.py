"""Damaged, incomplete and hostile checkpoint files: each is refused by a CheckpointError that says what and where."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import CheckpointError, inspect_checkpoint, load_model
from model.hf_names import with_official_names
from model.safetensors_index import read_header, read_stored_tensors
from model.tools.checkpoint_writer import WEIGHT_FORMATS
from model.tools.make_checkpoint import make_checkpoint
from model.transformer import Transformer
from model.weight_copy import match_tensors

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sources(tools: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("files")
    for name in ("fp4", "base"):
        make_checkpoint(tools.nano_config(vocab_size=384), 4, name, root / name)
    return {name: root / name for name in ("fp4", "base")}


@pytest.fixture
def model_dir(sources: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(sources["fp4"], tmp_path / "model")


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(path: Path, header: Any, data: bytes) -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def shard_with(model_dir: Path, name: str) -> Path:
    return model_dir / json.loads((model_dir / INDEX).read_text())["weight_map"][name]


def edit_header(model_dir: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = shard_with(model_dir, name)
    header, data = split(path)
    change(header)
    join(path, header, data)


def edit_index(model_dir: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((model_dir / INDEX).read_text())
    change(index["weight_map"])
    (model_dir / INDEX).write_text(json.dumps(index))


def remove_tensor(model_dir: Path, name: str) -> None:
    """Take a tensor out of its file and the index, leaving both valid."""
    path = shard_with(model_dir, name)
    header, data = split(path)
    begin, end = header.pop(name)["data_offsets"]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset - (end - begin) for offset in entry["data_offsets"]]
    join(path, header, data[:begin] + data[end:])
    edit_index(model_dir, lambda weight_map: weight_map.pop(name))


def rename_tensor(model_dir: Path, old: str, new: str) -> None:
    edit_index(model_dir, lambda weight_map: weight_map.update({new: weight_map[old]}))
    edit_header(model_dir, old, lambda header: header.update({new: header.pop(old)}))
    edit_index(model_dir, lambda weight_map: weight_map.pop(old))


def write_values(model_dir: Path, name: str, raw: bytes) -> None:
    path = shard_with(model_dir, name)
    header, data = split(path)
    begin = header[name]["data_offsets"][0]
    join(path, header, data[:begin] + raw + data[begin + len(raw) :])


def load(model_dir: Path) -> None:
    load_model(model_dir, dtype=torch.float32, numerics="plain", progress=False)


def refused(model_dir: Path, *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(model_dir)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    return message


# ---- tensors that do not fit ----


def test_missing_tensors_are_named_and_counted(model_dir: Path) -> None:
    for name in ("layers.3.attn.wkv.weight", "layers.3.attn.wkv.scale"):
        remove_tensor(model_dir, name)
    refused(model_dir, "2 tensors are missing", "layers.3.attn.wkv.weight, layers.3.attn.wkv.scale")
    for expert in range(8):
        remove_tensor(model_dir, f"layers.4.ffn.experts.{expert}.w2.weight")
    refused(model_dir, "10 tensors are missing", "and 7 more")


def test_a_surplus_tensor_is_named_and_close_names_are_offered(model_dir: Path) -> None:
    rename_tensor(model_dir, "layers.2.attn.compressor.norm.weight", "layers.2.attn.compressor.kv_norm.weight")
    refused(
        model_dir,
        "1 tensor is missing: layers.2.attn.compressor.norm.weight",
        "1 tensor is not known to this model: layers.2.attn.compressor.kv_norm.weight",
        "Perhaps 'layers.2.attn.compressor.kv_norm.weight' is meant",
    )


def test_a_wrong_shape_is_named(model_dir: Path) -> None:
    name = "layers.1.ffn.gate.weight"
    edit_header(model_dir, name, lambda header: header[name].update(shape=[96, 8]))
    refused(model_dir, "1 tensor is of the wrong shape", f"{name} (expected [8, 96], found [96, 8])")


@pytest.mark.parametrize(
    ("name", "expected", "found"),
    [
        ("layers.1.ffn.gate.weight", "BF16", "I16"),
        ("layers.1.ffn.experts.5.w2.weight", "I8", "F8_E4M3"),
        ("layers.1.attn.wo_b.weight", "F8_E4M3", "U8"),
        ("layers.1.attn.wo_b.scale", "F8_E8M0", "I8"),
        ("layers.1.ffn.gate.tid2eid", "I64", "F64"),
        ("layers.1.attn.attn_sink", "F32", "I32"),
    ],
)
def test_a_wrong_dtype_is_named(model_dir: Path, name: str, expected: str, found: str) -> None:
    edit_header(model_dir, name, lambda header: header[name].update(dtype=found))
    refused(model_dir, "1 tensor is of the wrong dtype", f"{name} (expected {expected}, found {found})")


def test_a_config_of_another_model_is_refused(model_dir: Path) -> None:
    raw = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(raw | {"n_routed_experts": 16}))
    refused(model_dir, "missing", "layers.0.ffn.experts.8.w1.weight", "wrong shape", "layers.0.ffn.gate.weight")


def test_scales_that_are_not_finite_are_refused(sources: dict[str, Path], model_dir: Path, tmp_path: Path) -> None:
    write_values(model_dir, "layers.2.ffn.experts.3.w1.scale", b"\xff")
    refused(model_dir, "layers.2.ffn.experts.3.w1.scale", "finite scales")
    base = shutil.copytree(sources["base"], tmp_path / "base")
    load(base)
    for raw in (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\0\0", b"\0\0\x80\xbf"):  # NaN, infinity, 0, -1
        write_values(base, "layers.2.attn.wq_b.scale", raw)
        refused(base, "layers.2.attn.wq_b.scale", "finite scales")


def test_an_expert_table_out_of_range_is_refused(model_dir: Path) -> None:
    for value in (8, -1):
        write_values(model_dir, "layers.0.ffn.gate.tid2eid", value.to_bytes(8, "little", signed=True))
        refused(model_dir, "layers.0.ffn.gate.tid2eid", "expert ids 0 to 7")


# ---- files that do not hold ----


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1, -1000])
def test_a_truncated_file_is_named(model_dir: Path, keep: int) -> None:
    path = shard_with(model_dir, "layers.2.attn_norm.weight")
    path.write_bytes(path.read_bytes()[:keep])
    refused(model_dir, str(path))


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 2**63, 10**9, 0, 1])
def test_an_absurd_header_length_is_refused(model_dir: Path, length: int) -> None:
    path = shard_with(model_dir, "norm.weight")
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(model_dir, str(path), "header")


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": entry(), "b": entry(offsets=[2, 6])}, "overlap"),
        ({"a": entry(shape=[8], offsets=[0, 8]), "b": entry(offsets=[4, 8])}, "overlap"),
        ({"a": entry(), "b": entry(offsets=[5, 9])}, "nobody's"),
        ({"a": entry(offsets=[4, 8])}, "nobody's"),
        ({"a": entry()}, "longer than its header says"),
        ({}, "longer than its header says"),
        ({"a": entry(shape=[17], offsets=[0, 17])}, "outside the file"),
        ({"a": entry(offsets=[2**62, 2**62 + 4])}, "outside the file"),
        ({"a": entry(offsets=[4, 0])}, "outside the file"),
        ({"a": entry(offsets=[-4, 0])}, "data_offsets"),
        ({"a": entry(offsets=[0.0, 4.0])}, "data_offsets"),
        ({"a": entry(offsets=[False, True])}, "data_offsets"),
        ({"a": entry(offsets=[0, 4, 8])}, "data_offsets"),
        ({"a": entry(shape=[5])}, "expected 5 bytes"),
        ({"a": entry(dtype="F32")}, "expected 16 bytes"),
        ({"a": entry(shape=[2**62] * 8)}, "expected"),
        ({"a": entry(shape=[-4])}, "shape"),
        ({"a": entry(shape=[2**200])}, "shape"),
        ({"a": entry(shape=[1] * 9)}, "shape"),
        ({"a": entry(shape=4)}, "shape"),
        ({"a": entry(dtype="F3")}, "dtype"),
        ({"a": entry(dtype=["F32"])}, "dtype"),
        ({"a": {}}, "dtype"),
        ({"a": None}, "an object"),
        ({"a\x1b[31m": entry()}, "printable"),
        ({"\ud800": entry()}, "printable"),
        ({"a" * 501: entry()}, "printable"),
        ([], "an object"),
        (3, "an object"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path: Path, header: Any, words: str) -> None:
    path = tmp_path / "x.safetensors"
    join(path, header, bytes(16))
    with pytest.raises(CheckpointError, match=re.escape(words)) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize("raw", [b"{", b"\xff{}", b'{"a":1,"a":1}', b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000])
def test_a_header_that_is_not_json_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_header(path)


def test_good_corners_of_the_format_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    join(
        path,
        {
            "__metadata__": {"format": "pt"},
            "scalar": entry("F32", [], [4, 8]),
            "empty": entry("F32", [0, 3], [4, 4]),
            "odd": entry("U8", [2, 2], [0, 4]),
        },
        bytes(8),
    )
    tensors = read_header(path)
    assert {name: t.num_bytes for name, t in tensors.items()} == {"scalar": 4, "empty": 0, "odd": 4}
    assert tensors["scalar"].end == path.stat().st_size


def test_unaligned_data_load(model_dir: Path, sources: dict[str, Path]) -> None:
    """Old writers did not pad the header, so data may start at any byte."""
    for path in model_dir.glob("*.safetensors"):
        header, data = split(path)
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8 + 1)
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    options: dict[str, Any] = {"dtype": torch.float32, "numerics": "plain", "progress": False}
    models = [load_model(directory, **options) for directory in (model_dir, sources["fp4"])]
    for ours, theirs in zip(*(m.checkpoint_tensors() for m in models), strict=True):
        assert torch.equal(ours.destination.view(torch.uint8), theirs.destination.view(torch.uint8)), ours.name


# ---- directories ----


def test_an_index_that_names_a_missing_file_says_which(model_dir: Path) -> None:
    shard_with(model_dir, "layers.3.attn_norm.weight").unlink()
    refused(model_dir, "1 of 9 files are missing: model-00005-of-00009.safetensors")


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "a\0b"])
def test_an_index_that_leaves_the_directory_is_refused(model_dir: Path, file: str) -> None:
    edit_index(model_dir, lambda weight_map: weight_map.update({"norm.weight": file}))
    refused(model_dir, INDEX, "expected")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_malformed_index_is_refused(model_dir: Path, content: str) -> None:
    (model_dir / INDEX).write_text(content)
    refused(model_dir, INDEX)


def test_index_and_files_must_agree(model_dir: Path) -> None:
    edit_index(model_dir, lambda weight_map: weight_map.pop("norm.weight"))
    refused(model_dir, "'norm.weight'", f"{INDEX} does not name")
    edit_index(model_dir, lambda weight_map: weight_map.update({"norm.weight": weight_map["embed.weight"]}))
    refused(model_dir, "'norm.weight'", "model-00001-of-00009.safetensors")
    shutil.copy(shard_with(model_dir, "layers.0.attn_norm.weight"), shard_with(model_dir, "layers.1.attn_norm.weight"))
    refused(model_dir, "holds tensor 'layers.0.")


def test_a_tensor_lost_from_its_file_is_named(model_dir: Path) -> None:
    edit_index(model_dir, lambda weight_map: weight_map.update({"ghost.weight": weight_map["norm.weight"]}))
    refused(model_dir, "lack 1 of the tensors named for them: ghost.weight")


def test_pickle_files_are_never_opened(model_dir: Path) -> None:
    for path in [*model_dir.glob("*.safetensors"), model_dir / INDEX]:
        path.unlink()
    refused(model_dir, "no weights", "config.json")
    (model_dir / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
    refused(model_dir, "pytorch_model.bin", "never opened", "save_pretrained")


def test_shards_without_an_index_ask_for_it(model_dir: Path) -> None:
    (model_dir / INDEX).unlink()
    refused(model_dir, "model-00001-of-00009.safetensors", f"Download {INDEX}")


def test_a_directory_without_a_model_says_so(tmp_path: Path) -> None:
    refused(tmp_path, "config.json", "no such file")
    refused(tmp_path / "nothing", "no such directory")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    refused(tmp_path, "config.json", "not a text file")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "no such directory")


# ---- fuzz ----


def mutate(rng: random.Random, content: bytearray) -> bytearray:
    """Change the length field, bytes or numbers of the header, or the file's length."""
    end = 8 + int.from_bytes(content[:8], "little")
    kind = rng.randrange(6)
    if kind == 0:
        content[rng.randrange(8)] = rng.randrange(256)
    elif kind == 1:
        for _ in range(rng.randrange(1, 6)):
            content[rng.randrange(8, end)] = rng.randrange(256)
    elif kind == 2:
        numbers = list(re.finditer(rb"\d+", bytes(content[8:end])))
        at = rng.choice(numbers)
        new = str(rng.choice([0, 1, 7, 2**31, 2**63, 2**64, 10**30, rng.randrange(10**6)])).encode()
        header = bytes(content[8 : 8 + at.start()]) + new + bytes(content[8 + at.end() : end])
        content = bytearray(len(header).to_bytes(8, "little") + header + content[end:])
    elif kind == 3:
        del content[rng.randrange(len(content)) :]
    elif kind == 4:
        content += bytes(rng.randrange(1, 100))
    else:
        start = rng.randrange(8, end)
        del content[start : start + rng.randrange(1, 40)]
    return content


def test_mutated_headers_give_clean_errors(tools: Any, sources: dict[str, Path], tmp_path: Path) -> None:
    model = Transformer(tools.nano_config(vocab_size=384), weights=WEIGHT_FORMATS["fp4"], dtype=torch.float32)
    expected = list(model.checkpoint_tensors())
    model_dir = shutil.copytree(sources["fp4"], tmp_path / "model")
    path = shard_with(model_dir, "norm.weight")
    original = path.read_bytes()
    rng = random.Random(0)
    refusals = 0
    for _ in range(600):
        path.write_bytes(mutate(rng, bytearray(original)))
        try:
            stored = with_official_names(read_stored_tensors(model_dir))
            pairs = match_tensors(model_dir, expected, stored, lambda name: name.startswith("mtp."))
            size = path.stat().st_size
            assert all(t.end <= size for _, t in pairs if t.path == path)
            inspect_checkpoint(model_dir)
        except CheckpointError as error:
            refusals += 1
            str(error).encode()
    assert refusals > 500
