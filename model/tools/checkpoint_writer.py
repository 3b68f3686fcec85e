"""Writes a checkpoint directory in one of the official formats, from any source of unquantized tensors.

DIR/config.json generation_config.json tokenizer.json tokenizer_config.json
    model.safetensors.index.json
    model-00001-of-0000N.safetensors     embed | one for each layer | norm, head and hc_head | mtp
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from model.config import ModelConfig
from model.ops.reference.quant import quantize_fp4_blocks, quantize_fp8_blocks
from model.quant import OFFICIAL, WeightFormat
from model.tensors import CheckpointTensor
from model.tools.byte_tokenizer import NUM_TOKENS, save_byte_tokenizer
from model.transformer import Transformer

Format = Literal["bf16", "f32", "fp8", "fp4", "base"]
"""`fp4`: official instruct. `fp8`: its FP8 repack. `base`: FP8 with float32 scales. The others are plain."""

WEIGHT_FORMATS: dict[Format, WeightFormat] = {
    "bf16": WeightFormat(dense="bfloat16", experts="bfloat16", scale=None),
    "f32": WeightFormat(dense="float32", experts="float32", scale=None),
    "fp8": WeightFormat(dense="fp8", experts="fp8", scale="ue8m0"),
    "fp4": OFFICIAL,
    "base": WeightFormat(dense="fp8", experts="fp8", scale="float32"),
}


Source = Callable[[str, tuple[int, ...]], Tensor]
"""The unquantized tensor of a name and shape: floating point, or int64 for the expert tables."""


def write_checkpoint(
    config: ModelConfig,
    format: Format,
    out_dir: Path,
    source: Source,
    *,
    tokenizer: Path | None = None,
    force: bool = False,
) -> None:
    """Write `out_dir`, which appears complete or not at all.

    `tokenizer`: a directory with `tokenizer.json` (and `tokenizer_config.json`) to copy instead of the byte tokenizer.

    Raises:
        ValueError: an unknown format, or a tokenizer that needs a larger vocabulary.
        FileExistsError: `out_dir` is a file, or is not empty and `force` is not set.
    """
    if format not in WEIGHT_FORMATS:
        raise ValueError(f"unknown format {format!r}; formats are {', '.join(WEIGHT_FORMATS)}")
    count_tokens(config, tokenizer)
    if out_dir.exists() and (not out_dir.is_dir() or (any(out_dir.iterdir()) and not force)):
        raise FileExistsError(f"{out_dir} is not an empty directory")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = out_dir.parent / f".{out_dir.name}.{os.getpid()}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write_settings(config, format, temporary, tokenizer)
        _write_weights(config, format, temporary, source)
        if out_dir.is_dir():
            shutil.rmtree(out_dir)
        os.rename(temporary, out_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def count_tokens(config: ModelConfig, tokenizer: Path | None) -> int:
    """Ids of a tokenizer (of the byte tokenizer without one).

    Raises:
        ValueError: the model's vocabulary does not hold them, or the file is not there.
    """
    needed = NUM_TOKENS
    if tokenizer is not None:
        file = tokenizer / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{file} is not there")
        needed = max(Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True).values()) + 1
    if needed > config.vocab_size:
        raise ValueError(f"the tokenizer has {needed} ids, but vocab_size is {config.vocab_size}")
    return needed


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(config: ModelConfig, format: Format, out_dir: Path, source: Source) -> None:
    weights = WEIGHT_FORMATS[format]
    dtype = torch.float32 if format == "f32" else torch.bfloat16
    model = Transformer(config, weights=weights, dtype=dtype, with_mtp=config.draft_kind == "mtp", device="meta")
    shards: dict[int, list[CheckpointTensor]] = {}
    for tensor in model.checkpoint_tensors():
        shards.setdefault(_shard_of(tensor.name, config), []).append(tensor)
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, (_, tensors) in enumerate(sorted(shards.items()), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        contents = _shard_contents(source, tensors)
        total_size += sum(t.numel() * t.element_size() for t in contents.values())
        weight_map |= dict.fromkeys(contents, file)
        save_file(contents, out_dir / file, metadata={"format": "pt"})
        shutil.copymode(out_dir / "config.json", out_dir / file)
    _write_json(
        out_dir / "model.safetensors.index.json",
        {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))},
    )


def _write_settings(config: ModelConfig, format: Format, out_dir: Path, tokenizer: Path | None) -> None:
    _write_json(out_dir / "config.json", config.to_dict() | _format_fields(format))
    _write_json(
        out_dir / "generation_config.json",
        {
            "bos_token_id": config.bos_token_id,
            "do_sample": True,
            "eos_token_id": config.eos_token_id,
            "temperature": 1.0,
            "top_p": 1.0,
        },
    )
    if tokenizer is None:
        save_byte_tokenizer(out_dir, model_max_length=config.max_position_embeddings)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, out_dir / name)


def _shard_of(name: str, config: ModelConfig) -> int:
    top = name.split(".")
    if top[0] == "embed":
        return 0
    if top[0] == "layers":
        return 1 + int(top[1])
    return 2 + config.num_hidden_layers if top[0] == "mtp" else 1 + config.num_hidden_layers


def _shard_contents(source: Source, tensors: Sequence[CheckpointTensor]) -> dict[str, Tensor]:
    codes = {tensor.name: tensor.dtype for tensor in tensors}

    def make(tensor: CheckpointTensor) -> dict[str, Tensor]:
        name, scale_name = tensor.name, tensor.name.removesuffix("weight") + "scale"
        if tensor.dtype == "I8":
            shape = (tensor.shape[0], 2 * tensor.shape[1])
            pair = quantize_fp4_blocks(source(name, shape))
            return dict(zip((name, scale_name), pair, strict=True))
        if tensor.dtype == "F8_E4M3":
            kind: Literal["ue8m0", "float32"] = "float32" if codes[scale_name] == "F32" else "ue8m0"
            pair = quantize_fp8_blocks(source(name, tensor.shape), kind)
            return dict(zip((name, scale_name), pair, strict=True))
        dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
        return {name: source(name, tensor.shape).to(dtypes[tensor.dtype])}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # A scale is made with its weight.
        made = list(pool.map(make, (tensor for tensor in tensors if not tensor.name.endswith(".scale"))))
    return {name: tensor for part in made for name, tensor in part.items()}


def _format_fields(format: Format) -> dict[str, Any]:
    """What the official `config.json` adds for this format."""
    if format in ("bf16", "f32"):
        return {"torch_dtype": "bfloat16" if format == "bf16" else "float32"}
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    if format != "base":
        quantization["scale_fmt"] = "ue8m0"
    return {"expert_dtype": "fp4" if format == "fp4" else "fp8", "quantization_config": quantization}
