"""Names: what transformers' save_pretrained really writes, and the tensor lists of the published checkpoints."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import CheckpointError, inspect_checkpoint, load_model
from model.hf_names import official_name, with_official_names
from model.presets import preset
from model.quant import OFFICIAL
from model.safetensors_index import ELEMENT_BYTES, StoredTensor, read_stored_tensors
from model.tools.make_checkpoint import make_checkpoint
from model.transformer import Transformer
from model.weight_copy import match_tensors

# ---- save_pretrained ----


@pytest.mark.parametrize("original_names", [True, False])
@pytest.mark.parametrize("shard_size", ["1MB", "5GB"])
def test_save_pretrained_round_trip_gives_the_same_logits(
    tools: Any, tmp_path: Path, original_names: bool, shard_size: str
) -> None:
    config = tools.nano_config()
    model = tools.random_model(config, seed=5)
    twin = tools.transformers_twin(model)
    twin.save_pretrained(tmp_path, save_original_format=original_names, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "1MB")
    info = inspect_checkpoint(tmp_path)
    assert info.config == config and info.drafter == "none"
    loaded = load_model(tmp_path, dtype=torch.float32, numerics="plain", progress=False)
    for ours, theirs in zip(model.checkpoint_tensors(), loaded.checkpoint_tensors(), strict=True):
        assert torch.equal(ours.destination, theirs.destination), ours.name
    tokens = tools.random_tokens(config, 140, 2)
    logits = tools.Driver(loaded).prompt(tokens)[1]
    assert torch.equal(logits, tools.Driver(model).prompt(tokens)[1])
    with torch.no_grad():
        expected = twin(torch.tensor([tokens]), use_cache=False).logits[0]
    assert (logits - expected).abs().max() < 1e-4


def test_transformers_reads_what_make_checkpoint_writes(tools: Any, tmp_path: Path) -> None:
    from transformers import DeepseekV4ForCausalLM

    config = tools.nano_config(vocab_size=384)
    make_checkpoint(config, 6, "f32", tmp_path / "model")
    twin = DeepseekV4ForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model = load_model(tmp_path / "model", dtype=torch.float32, numerics="plain", progress=False)
    tokens = tools.random_tokens(config, 140, 3)
    with torch.no_grad():
        expected = twin(torch.tensor([tokens]), use_cache=False).logits[0]
    assert (tools.Driver(model).prompt(tokens)[1] - expected).abs().max() < 1e-4


def test_official_names_stay_as_they_are() -> None:
    model = Transformer(preset("nano"), weights=OFFICIAL, dtype=torch.bfloat16, with_mtp=True)
    for tensor in model.checkpoint_tensors():
        assert official_name(tensor.name) == tensor.name
        assert official_name("model." + tensor.name) == tensor.name


def test_scales_of_quantized_transformers_weights_are_known() -> None:
    name = "model.layers.0.mlp.shared_experts.down_proj.weight_scale_inv"
    assert official_name(name) == "layers.0.ffn.shared_experts.w2.scale"


def stored(name: str, dtype: str, shape: tuple[int, ...], start: int = 0) -> StoredTensor:
    size = ELEMENT_BYTES[dtype] * torch.Size(shape).numel()
    return StoredTensor(name=name, dtype=dtype, shape=shape, path=Path("x"), start=start, end=start + size)


def test_fused_experts_become_byte_ranges() -> None:
    fused = stored("model.layers.7.mlp.experts.gate_up_proj", "BF16", (3, 10, 4), start=100)
    down = stored("model.layers.7.mlp.experts.down_proj", "BF16", (3, 4, 5), start=1000)
    parts = with_official_names({t.name: t for t in (fused, down)})
    assert set(parts) == {f"layers.7.ffn.experts.{e}.w{i}.weight" for e in range(3) for i in (1, 2, 3)}
    w3 = parts["layers.7.ffn.experts.1.w3.weight"]
    assert (w3.shape, w3.start, w3.end) == ((5, 4), 100 + 80 + 40, 100 + 160)
    w2 = parts["layers.7.ffn.experts.2.w2.weight"]
    assert (w2.shape, w2.start, w2.end) == ((4, 5), 1080, 1120)


@pytest.mark.parametrize("shape", [(3, 9, 4), (12, 4), (0, 10, 4)])
def test_fused_experts_of_a_wrong_shape_are_named(shape: tuple[int, ...]) -> None:
    name = "model.layers.7.mlp.experts.gate_up_proj"
    with pytest.raises(CheckpointError, match=r"gate_up_proj.*shape"):
        with_official_names({name: stored(name, "BF16", shape)})


def test_two_tensors_of_one_official_name_are_refused() -> None:
    names = ("model.embed_tokens.weight", "embed.weight")
    with pytest.raises(CheckpointError, match=r"second 'embed\.weight'"):
        with_official_names({name: stored(name, "BF16", (2, 2)) for name in names})


# ---- the published checkpoints, as files of the right size that hold no data ----

Entry = tuple[str, str, tuple[int, ...]]


def dspark_tensors(flash: list[Entry]) -> Iterator[Entry]:
    """Flash-0731: the same backbone; three drafter stages of one decoder block each, fed by three layers' streams."""
    hidden, vocab, rank = 4096, 129280, 256
    mtp_only = ("e_proj.", "h_proj.", "enorm.", "hnorm.", "norm.", "hc_head_")
    for name, dtype, shape in flash:
        if not name.startswith("mtp."):
            yield name, dtype, shape
        elif not name.removeprefix("mtp.0.").startswith(mtp_only):
            for stage in range(3):
                yield name.replace("mtp.0.", f"mtp.{stage}.", 1), dtype, shape
    yield "mtp.0.main_proj.weight", "F8_E4M3", (hidden, 3 * hidden)
    yield "mtp.0.main_proj.scale", "F8_E8M0", (hidden // 128, 3 * hidden // 128)
    yield "mtp.0.main_norm.weight", "BF16", (hidden,)
    yield "mtp.2.norm.weight", "BF16", (hidden,)
    yield "mtp.2.hc_head_fn", "F32", (4, 4 * hidden)
    yield "mtp.2.hc_head_base", "F32", (4,)
    yield "mtp.2.hc_head_scale", "F32", (1,)
    yield "mtp.2.markov_head.markov_w1.weight", "BF16", (vocab, rank)
    yield "mtp.2.markov_head.markov_w2.weight", "BF16", (vocab, rank)
    yield "mtp.2.confidence_head.proj.weight", "BF16", (1, hidden + rank)


def write_hollow(model_dir: Path, tensors: list[Entry], config: dict[str, Any]) -> None:
    """An official directory whose files are sparse: headers and lengths are real, the data are holes."""
    shards: dict[str, list[Entry]] = {}
    for entry in tensors:
        parts = entry[0].split(".")
        shard = f"layer-{parts[1]}" if parts[0] == "layers" else parts[0] if parts[0] in ("embed", "mtp") else "tail"
        shards.setdefault(f"model-{shard}.safetensors", []).append(entry)
    for file, entries in shards.items():
        header: dict[str, Any] = {}
        position = 0
        for name, dtype, shape in entries:
            end = position + ELEMENT_BYTES[dtype] * torch.Size(shape).numel()
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
            position = end
        raw = json.dumps(header).encode()
        with (model_dir / file).open("wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            out.truncate(8 + len(raw) + position)
    weight_map = {name: file for file, entries in shards.items() for name, _, _ in entries}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model_dir / "config.json").write_text(json.dumps(config))


def test_flash_directories_are_accepted_tensor_by_tensor(tmp_path: Path) -> None:
    model = Transformer(preset("flash"), weights=OFFICIAL, dtype=torch.bfloat16, with_mtp=True)
    expected = list(model.checkpoint_tensors())
    flash = [(tensor.name, tensor.dtype, tensor.shape) for tensor in expected]
    backbone = [tensor for tensor in expected if not tensor.name.startswith("mtp.")]
    official, dspark = tmp_path / "flash", tmp_path / "flash-0731"
    config = preset("flash").to_dict()
    for model_dir in (official, dspark):
        model_dir.mkdir()
    write_hollow(official, flash, config)
    write_hollow(
        dspark,
        list(dspark_tensors(flash)),
        config | {"compress_ratios": [*config["compress_ratios"], 0, 0], "dspark_block_size": 5},
    )
    for model_dir, drafter, num_tensors, total_bytes in (
        (official, "mtp", 69_187, 159_609_485_896),
        (dspark, "dspark", 72_317, 166_878_536_440),
    ):
        info = inspect_checkpoint(model_dir)
        assert (info.drafter, info.num_tensors, info.total_bytes) == (drafter, num_tensors, total_bytes)
        assert info.weight_format == OFFICIAL
        pairs = match_tensors(model_dir, backbone, read_stored_tensors(model_dir), lambda n: n.startswith("mtp."))
        assert len(pairs) == 69_187 - 1_575


def test_a_dspark_checkpoint_runs_without_its_drafter(tools: Any, tmp_path: Path) -> None:
    config = tools.nano_config(vocab_size=384)
    make_checkpoint(config, 0, "fp4", tmp_path / "mtp")
    tensors = {k: t for f in (tmp_path / "mtp").glob("*.safetensors") for k, t in load_file(f).items()}
    mtp = {k: t for k, t in tensors.items() if k.startswith("mtp.")}
    stages = {k.replace("mtp.0.", f"mtp.{i}.", 1): t.clone() for i in range(3) for k, t in mtp.items()}
    stages["mtp.0.main_proj.weight"] = torch.zeros(96, 288)
    backbone = {k: t for k, t in tensors.items() if k not in mtp}
    (tmp_path / "dspark").mkdir()
    save_file(backbone | stages, tmp_path / "dspark" / "model.safetensors")
    raw = config.to_dict()
    raw |= {"compress_ratios": [*raw["compress_ratios"], 0, 0], "dspark_block_size": 5}
    (tmp_path / "dspark" / "config.json").write_text(json.dumps(raw))
    info = inspect_checkpoint(tmp_path / "dspark")
    assert info.drafter == "dspark" and info.config.draft_kind == "dspark"
    tokens = tools.random_tokens(config, 20, 1)
    logits = [
        tools.Driver(load_model(tmp_path / name, dtype=torch.float32, numerics="plain", progress=False)).prompt(tokens)[
            1
        ]
        for name in ("mtp", "dspark")
    ]
    assert torch.equal(*logits)
    with pytest.raises(CheckpointError, match=r"MTP block.*dspark"):
        load_model(tmp_path / "dspark", dtype=torch.float32, numerics="plain", with_mtp=True, progress=False)
