"""`fathom make-checkpoint`: a random model in the official format, the same bytes for the same seed on every machine.

    DIR/config.json generation_config.json tokenizer.json tokenizer_config.json
        model.safetensors.index.json
        model-00001-of-0000N.safetensors     embed | one for each layer | norm, head and hc_head | mtp

Every tensor draws from a generator of its own, keyed by seed and name, with integer arithmetic up to one scaling: no
mathematical library can round it differently.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from model.config import ModelConfig
from model.ops.reference.quant import quantize_fp4_blocks, quantize_fp8_blocks
from model.presets import PRESET_NAMES, preset
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

_STD_AND_MEAN: dict[str, tuple[float, float]] = {
    "embed.weight": (1.0, 0.0),
    "norm.weight": (0.1, 1.0),
    "attn_sink": (1.0, 0.0),
    "ape": (0.5, 0.0),
    "gate.bias": (0.1, 0.0),
    "_base": (0.5, 0.0),
    "_scale": (0.1, 1.0),
}
"""By end of name. Matrices are scaled by their inputs instead, so that every layer answers with variance near one."""
_HEAD_GAIN = 4.0
"""Logits with a spread of about 4. The head's rows of ids without a token are zero, so they are hardly ever sampled."""


def make_checkpoint(
    preset_or_config: str | ModelConfig,
    seed: int,
    format: Format,
    out_dir: Path,
    *,
    tokenizer: Path | None = None,
    force: bool = False,
) -> None:
    """Write a random checkpoint to `out_dir`, which appears complete or not at all.

    `tokenizer`: a directory with `tokenizer.json` (and `tokenizer_config.json`) to copy instead of the byte tokenizer.

    Raises:
        ValueError: an unknown preset or format, or a tokenizer that needs a larger vocabulary.
        FileExistsError: `out_dir` is a file, or is not empty and `force` is not set.
    """
    config = preset(preset_or_config) if isinstance(preset_or_config, str) else preset_or_config
    if format not in WEIGHT_FORMATS:
        raise ValueError(f"unknown format {format!r}; formats are {', '.join(WEIGHT_FORMATS)}")
    num_tokens = _count_tokens(config, tokenizer)
    if out_dir.exists() and (not out_dir.is_dir() or (any(out_dir.iterdir()) and not force)):
        raise FileExistsError(f"{out_dir} is not an empty directory")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = out_dir.parent / f".{out_dir.name}.{os.getpid()}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write_settings(config, format, temporary, tokenizer)
        _write_weights(config, seed, format, temporary, num_tokens)
        if out_dir.is_dir():
            shutil.rmtree(out_dir)
        os.rename(temporary, out_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def random_tensor(config: ModelConfig, seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """The unquantized tensor `name` of the random model: float32, or int64 for the expert table. Deterministic."""
    bits = _Bits(f"{seed}:{name}")
    if name.endswith("tid2eid"):
        return torch.from_numpy(bits.distinct(shape[0], config.n_routed_experts, shape[1]))
    matrix = ((_HEAD_GAIN if name == "head.weight" else 1.0) / math.sqrt(shape[-1]), 0.0)
    std, mean = next((known for end, known in _STD_AND_MEAN.items() if name.endswith(end)), matrix)
    return torch.from_numpy(bits.normal(shape, std, mean))


class _Bits:
    """A stream of Philox bits for one key; NumPy guarantees the raw stream of a bit generator."""

    def __init__(self, key: str) -> None:
        digest = hashlib.sha256(key.encode()).digest()
        self._generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    def _uint16(self, count: int) -> NDArray[np.uint16]:
        raw = np.asarray(self._generator.random_raw(-(-count // 4)), dtype="<u8")
        return raw.view("<u2")[:count]

    def normal(self, shape: tuple[int, ...], std: float, mean: float) -> NDArray[np.float32]:
        """Nearly normal float32: sums of four 16-bit integers, exact until the scaling."""
        sums = self._uint16(4 * math.prod(shape)).reshape(-1, 4).sum(axis=1, dtype=np.int32) - 2 * 65535
        spread = math.sqrt(4 * (65536**2 - 1) / 12)
        values: NDArray[np.float32] = sums.astype(np.float32) * np.float32(std / spread) + np.float32(mean)
        return values.reshape(shape)

    def distinct(self, rows: int, choices: int, count: int) -> NDArray[np.int64]:
        """[rows, count] int64; each row holds distinct numbers below `choices`."""
        keys = self._uint16(rows * choices).reshape(rows, choices)
        return np.argsort(keys, axis=1, kind="stable")[:, :count].astype(np.int64)


def _write_weights(config: ModelConfig, seed: int, format: Format, out_dir: Path, num_tokens: int) -> None:
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
        contents = _shard_contents(config, seed, tensors)
        if "head.weight" in contents:
            contents["head.weight"][num_tokens:] = 0
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


def _shard_contents(config: ModelConfig, seed: int, tensors: Sequence[CheckpointTensor]) -> dict[str, Tensor]:
    codes = {tensor.name: tensor.dtype for tensor in tensors}

    def make(tensor: CheckpointTensor) -> dict[str, Tensor]:
        name, scale_name = tensor.name, tensor.name.removesuffix("weight") + "scale"
        if tensor.dtype == "I8":
            shape = (tensor.shape[0], 2 * tensor.shape[1])
            pair = quantize_fp4_blocks(random_tensor(config, seed, name, shape))
            return dict(zip((name, scale_name), pair, strict=True))
        if tensor.dtype == "F8_E4M3":
            kind: Literal["ue8m0", "float32"] = "float32" if codes[scale_name] == "F32" else "ue8m0"
            pair = quantize_fp8_blocks(random_tensor(config, seed, name, tensor.shape), kind)
            return dict(zip((name, scale_name), pair, strict=True))
        dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
        return {name: random_tensor(config, seed, name, tensor.shape).to(dtypes[tensor.dtype])}

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


def _count_tokens(config: ModelConfig, tokenizer: Path | None) -> int:
    """Ids of the tokenizer, which the model's vocabulary must hold."""
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


def main(argv: Sequence[str]) -> int:
    """The subcommand; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="fathom make-checkpoint", description="Write a random DeepSeek-V4 checkpoint in the official format."
    )
    parser.add_argument("out_dir", metavar="DIR", type=Path)
    parser.add_argument("--preset", default="nano", help=f"{', '.join(PRESET_NAMES)} (default: nano)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=get_args(Format), default="fp4")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="copy this tokenizer instead of a byte tokenizer")
    parser.add_argument("--force", action="store_true", help="replace a directory that is not empty")
    args = parser.parse_args(argv)
    try:
        make_checkpoint(args.preset, args.seed, args.format, args.out_dir, tokenizer=args.tokenizer, force=args.force)
    except (ValueError, OSError) as error:
        print(f"fathom make-checkpoint: {error}", file=sys.stderr)
        return 2
    return 0
