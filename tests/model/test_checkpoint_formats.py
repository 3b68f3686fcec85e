"""Every weight format against an independent reading of the files: their bytes, NumPy, and the formats' definitions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import CheckpointError, inspect_checkpoint, load_model
from model.linear import Linear
from model.moe import Experts
from model.parallel import ParallelGroup
from model.quant import WeightFormat
from model.tools.checkpoint_writer import WEIGHT_FORMATS
from model.tools.make_checkpoint import make_checkpoint

QUANTIZED = ("fp4", "fp8", "base")


def small_config(tools: Any) -> Any:
    # No dim is a multiple of 128: every matrix has partial scale blocks.
    return tools.nano_config(vocab_size=384)


@pytest.fixture(scope="module")
def checkpoints(tools: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("formats")
    for name in WEIGHT_FORMATS:
        make_checkpoint(small_config(tools), 3, name, root / name)
    return {name: root / name for name in WEIGHT_FORMATS}


# ---- the independent reading ----


def read_raw(model_dir: Path) -> dict[str, tuple[str, list[int], bytes]]:
    raw = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                raw[name] = (entry["dtype"], entry["shape"], content[8 + length + begin : 8 + length + end])
    return raw


def decode(raw: dict[str, tuple[str, list[int], bytes]], name: str) -> np.ndarray:
    """float32 (int64 for the expert table), quantized weights times their scales."""
    code, shape, data = raw[name]
    octets = np.frombuffer(data, np.uint8)
    if code == "I64":
        return np.frombuffer(data, "<i8").reshape(shape)
    if code == "F32":
        return np.frombuffer(data, "<f4").reshape(shape)
    if code == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if code == "F8_E8M0":
        return np.ldexp(np.float32(1), octets.astype(np.int32) - 127).reshape(shape)
    scale = decode(raw, name.removesuffix("weight") + "scale")
    if code == "F8_E4M3":
        exponent, mantissa = (octets >> 3 & 15).astype(np.int32), (octets & 7).astype(np.float32)
        magnitude = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
        values = (np.where(octets & 128, -1, 1) * magnitude).astype(np.float32).reshape(shape)
        rows, columns = np.arange(shape[0]) // 128, np.arange(shape[1]) // 128
        return values * scale[rows[:, None], columns]
    assert code == "I8"
    nibbles = np.stack([octets & 15, octets >> 4], axis=-1).reshape(shape[0], -1)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    values = np.where(nibbles & 8, -1, 1).astype(np.float32) * magnitudes[nibbles & 7]
    return values * scale[:, np.arange(values.shape[1]) // 32]


def load_all(model_dir: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in model_dir.glob("*.safetensors") for name, t in load_file(file).items()}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


# ---- tests ----


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_format_is_detected_from_dtypes(checkpoints: dict[str, Path], tools: Any, name: str) -> None:
    info = inspect_checkpoint(checkpoints[name])
    raw = read_raw(checkpoints[name])
    assert info.weight_format == WEIGHT_FORMATS[name]
    assert info.config == small_config(tools)
    assert info.num_tensors == len(raw) and info.total_bytes == sum(len(data) for _, _, data in raw.values())
    assert info.drafter == "mtp" and len(info.files) == small_config(tools).num_hidden_layers + 3
    index = json.loads((checkpoints[name] / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == info.total_bytes


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_loaded_weights_are_bit_equal_to_an_independent_reading(checkpoints: dict[str, Path], name: str) -> None:
    raw = read_raw(checkpoints[name])
    model = load_model(checkpoints[name], dtype=torch.float32, numerics="plain", with_mtp=True, progress=False)
    seen = set()

    def check(key: str, found: torch.Tensor) -> None:
        expected = torch.from_numpy(decode(raw, key).astype(np.float32))
        assert torch.equal(bits(found), bits(expected)), key
        seen.add(key)

    for path, module in model.named_modules():
        path = path.replace("mtp.", "mtp.0.", 1) if path.startswith("mtp.") else path
        if isinstance(module, Linear) and module.quantized:
            check(f"{path}.weight", module.dense_weight())
        elif isinstance(module, Experts):
            for expert in range(module.length):
                w1, w3 = module.gate_up(expert).chunk(2)
                check(f"{path}.{expert}.w1.weight", w1)
                check(f"{path}.{expert}.w3.weight", w3)
                check(f"{path}.{expert}.w2.weight", module.down(expert))
    for record in model.checkpoint_tensors():
        if record.name.endswith("tid2eid"):
            assert torch.equal(record.destination, torch.from_numpy(decode(raw, record.name).copy()))
            seen.add(record.name)
        elif record.dtype in ("BF16", "F32") and not record.name.endswith(".scale") and record.name not in seen:
            check(record.name, record.destination.float())
    assert seen == {key for key in raw if not key.endswith(".scale")}


@pytest.mark.parametrize("name", QUANTIZED)
def test_logits_equal_those_of_the_dequantized_twin(
    checkpoints: dict[str, Path], tools: Any, tmp_path: Path, name: str
) -> None:
    raw = read_raw(checkpoints[name])
    # A power-of-two scale keeps e4m3 and e2m1 exact in bfloat16; Base checkpoints need a float32 twin.
    twin_dtype = torch.float32 if name == "base" else torch.bfloat16
    tensors = {}
    for key, (code, _, _) in raw.items():
        if not key.endswith(".scale"):
            value = torch.from_numpy(decode(raw, key).copy())
            tensors[key] = value.to(twin_dtype) if code in ("F8_E4M3", "I8", "BF16") else value
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(small_config(tools).to_dict()))
    tokens = tools.random_tokens(small_config(tools), 150, 1)
    for dtype in (torch.float32, torch.bfloat16) if name != "base" else (torch.float32,):
        logits = []
        for model_dir in (checkpoints[name], tmp_path):
            model = load_model(model_dir, dtype=dtype, numerics="plain", progress=False)
            logits.append(tools.Driver(model, row_format=str(dtype)[6:], index_format=str(dtype)[6:]).prompt(tokens)[1])
        assert torch.equal(*logits), (logits[0] - logits[1]).abs().max()
        assert 0.5 < logits[0].std() < 20 and logits[0].argmax(-1).unique().numel() > 20


def test_mixed_plain_dtypes_convert_to_the_models(checkpoints: dict[str, Path], tools: Any, tmp_path: Path) -> None:
    raw = read_raw(checkpoints["bf16"])
    dtypes = [torch.bfloat16, torch.float32, torch.float64]
    tensors = {}
    for i, key in enumerate(key for key in raw if not key.startswith("mtp.")):
        value = torch.from_numpy(decode(raw, key).copy())
        tensors[key] = value.to(torch.int32) if key.endswith("tid2eid") else value.to(dtypes[i % 3])
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(small_config(tools).to_dict()))
    assert inspect_checkpoint(tmp_path).drafter == "none"
    model = load_model(tmp_path, dtype=torch.float32, numerics="plain", progress=False)
    for record in model.checkpoint_tensors():
        assert torch.equal(record.destination, tensors[record.name].to(record.destination.dtype)), record.name


def test_scales_and_fp4_stored_as_u8_are_raw_bytes(checkpoints: dict[str, Path], tools: Any, tmp_path: Path) -> None:
    tensors = load_all(checkpoints["fp4"])
    as_bytes = {
        key: t.view(torch.uint8) if t.dtype in (torch.float8_e8m0fnu, torch.int8) else t for key, t in tensors.items()
    }
    save_file(as_bytes, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(small_config(tools).to_dict()))
    assert inspect_checkpoint(tmp_path).weight_format == WEIGHT_FORMATS["fp4"]
    model = load_model(tmp_path, dtype=torch.float32, numerics="plain", with_mtp=True, progress=False)
    for record in model.checkpoint_tensors():
        stored = tensors[record.name]
        if stored.element_size() == 1:
            assert record.destination.dtype == stored.dtype
            assert torch.equal(record.destination.view(torch.uint8), stored.view(torch.uint8)), record.name


def test_the_mtp_block_loads_on_request_only(checkpoints: dict[str, Path]) -> None:
    without = load_model(checkpoints["fp4"], dtype=torch.float32, numerics="plain", progress=False)
    assert without.mtp is None and not any(t.name.startswith("mtp.") for t in without.checkpoint_tensors())
    loaded = load_model(checkpoints["fp4"], dtype=torch.float32, numerics="plain", with_mtp=True, progress=False)
    assert loaded.mtp is not None
    names = {t.name for t in loaded.checkpoint_tensors()}
    assert names == set(read_raw(checkpoints["fp4"]))


def test_quantized_weights_stay_quantized_in_memory(checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints["fp4"], dtype=torch.bfloat16, numerics="plain", progress=False)
    raw = read_raw(checkpoints["fp4"])
    for record in model.checkpoint_tensors():
        if record.dtype in ("F8_E4M3", "F8_E8M0", "I8"):
            assert record.destination.nbytes == len(raw[record.name][2]), record.name


def test_each_rank_loads_its_shards_and_experts(checkpoints: dict[str, Path]) -> None:
    whole = load_model(checkpoints["bf16"], dtype=torch.float32, numerics="plain", progress=False)
    full = {t.name: t.destination for t in whole.checkpoint_tensors()}
    experts = set()
    for rank in (0, 1):
        group = ParallelGroup(object(), rank=rank, size=2)  # type: ignore[arg-type]  # nothing is sent while loading
        model = load_model(checkpoints["bf16"], dtype=torch.float32, numerics="plain", group=group, progress=False)
        sharded = 0
        for tensor in model.checkpoint_tensors():
            expected = full[tensor.name]
            if tensor.shard is not None:
                sharded += 1
                expected = expected.narrow(tensor.shard.dim, tensor.shard.start, tensor.shard.length)
            if ".experts." in tensor.name:
                experts.add((rank, int(tensor.name.split(".")[4])))
            assert torch.equal(tensor.destination, expected), tensor.name
        assert sharded > 10
    assert experts == {(rank, rank * 4 + i) for rank in (0, 1) for i in range(4)}


def test_a_mix_of_plain_dense_and_fp4_experts_is_a_format(
    checkpoints: dict[str, Path], tools: Any, tmp_path: Path
) -> None:
    raw = read_raw(checkpoints["fp4"])
    stored = load_all(checkpoints["fp4"])
    tensors = {}
    for key, tensor in stored.items():
        if raw[key][0] == "F8_E4M3":
            tensors[key] = torch.from_numpy(decode(raw, key).copy()).bfloat16()
        elif not (key.endswith(".scale") and ".experts." not in key):
            tensors[key] = tensor
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(small_config(tools).to_dict()))
    expected = WeightFormat(dense="bfloat16", experts="fp4", scale="ue8m0")
    assert inspect_checkpoint(tmp_path).weight_format == expected
    load_model(tmp_path, dtype=torch.float32, numerics="plain", with_mtp=True, progress=False)


@pytest.mark.parametrize(
    ("probe", "dtype"),
    [
        ("layers.0.attn.wq_a.weight", "I32"),
        ("layers.0.ffn.experts.0.w1.weight", "I64"),
        ("layers.0.attn.wq_a.scale", "BF16"),
    ],
)
def test_an_unknown_format_names_tensor_and_dtype(
    checkpoints: dict[str, Path], tools: Any, tmp_path: Path, probe: str, dtype: str
) -> None:
    tensors = load_all(checkpoints["fp4"])
    torch_dtype = {"I32": torch.int32, "I64": torch.int64, "BF16": torch.bfloat16}[dtype]
    tensors[probe] = torch.ones(tensors[probe].shape, dtype=torch_dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(small_config(tools).to_dict()))
    with pytest.raises(CheckpointError, match=f"{probe}.*found {dtype}"):
        inspect_checkpoint(tmp_path)
