"""config.json is read in both spellings, and a file that Fathom cannot run is refused by field."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV4Config

from model.config import ConfigError, config_from_dict, load_config
from model.presets import preset

OFFICIAL = ("flash", "pro", "mini", "nano", "flash-slice-4", "flash-slice-1")


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_spelling_round_trips(name: str) -> None:
    config = preset(name)
    assert config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", OFFICIAL)
def test_transformers_spelling_is_the_same_model(name: str) -> None:
    written = DeepseekV4Config(**preset(name).to_dict()).to_dict()
    assert "compress_ratios" not in written and "num_hash_layers" not in written
    assert config_from_dict(written) == preset(name)


def test_published_layer_schedules() -> None:
    flash, pro = preset("flash"), preset("pro")
    assert [len(flash.layers_of(k)) for k in ("window", "csa", "hca")] == [2, 21, 20]
    assert [len(pro.layers_of(k)) for k in ("window", "csa", "hca")] == [0, 30, 31]
    assert flash.layer_kinds[:5] == ("window", "window", "csa", "hca", "csa")
    assert pro.layer_kinds[:5] == ("hca", "hca", "csa", "hca", "csa")
    assert flash.layer_kinds[-1] == pro.layer_kinds[-1] == "csa"


def test_dspark_checkpoint_is_recognised() -> None:
    raw = preset("flash").to_dict()
    raw["compress_ratios"] = [*raw["compress_ratios"], 0, 0]
    raw["dspark_block_size"] = 5
    config = config_from_dict(raw)
    assert config.draft_kind == "dspark"
    assert config.compress_ratios == preset("flash").compress_ratios


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("compress_ratios", [0, 0, 4, 64, 4, 128, 0], "compress_ratios"),
        ("compress_ratios", [0, 0, 4], "compress_ratios"),
        ("compress_ratios", [0, 0, 4, 128, 4, 128, 4], "compress_ratios"),
        ("model_type", "deepseek_v3", "model_type"),
        ("hidden_size", None, "hidden_size"),
        ("hidden_size", 0, "hidden_size"),
        ("hidden_size", "256", "hidden_size"),
        ("num_attention_heads", True, "num_attention_heads"),
        ("o_groups", 3, "o_groups"),
        ("head_dim", 64, "qk_rope_head_dim"),
        ("index_head_dim", 96, "index_head_dim"),
        ("num_experts_per_tok", 9, "num_experts_per_tok"),
        ("scoring_func", "softmax", "scoring_func"),
        ("num_hash_layers", 7, "num_hash_layers"),
        ("eos_token_id", 2048, "eos_token_id"),
        ("rope_scaling", {"type": "linear", "factor": 2}, "rope_scaling.type"),
        ("rope_scaling", {"type": "yarn", "factor": 16, "mscale": 1.27}, "rope_scaling.attention_factor"),
        ("quantization_config", {"quant_method": "awq"}, "quantization_config.quant_method"),
        (
            "quantization_config",
            {"quant_method": "fp8", "weight_block_size": [32, 32]},
            "quantization_config.weight_block_size",
        ),
    ],
)
def test_unsupported_configuration_names_the_field(field: str, value: Any, named: str) -> None:
    raw = {**preset("nano").to_dict(), field: value}
    with pytest.raises(ConfigError) as caught:
        config_from_dict(raw)
    assert caught.value.field == named
    assert "expected" in str(caught.value) and "found" in str(caught.value)


def test_unknown_layer_type_of_transformers_spelling() -> None:
    raw = DeepseekV4Config(**preset("nano").to_dict()).to_dict()
    raw["layer_types"] = ["full_attention", *raw["layer_types"][1:]]
    with pytest.raises(ConfigError, match="layer_types"):
        config_from_dict(raw)


@pytest.mark.parametrize("text", ["{", "[]", "3", ""])
def test_broken_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="a JSON object"):
        load_config(tmp_path)


def test_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(preset("nano").to_dict()))
    assert load_config(tmp_path) == preset("nano")


@pytest.mark.parametrize("name", ["", "flash-slice-", "flash-slice-0", "flash-slice-x", "huge"])
def test_unknown_preset(name: str) -> None:
    with pytest.raises(ValueError, match="unknown preset"):
        preset(name)
