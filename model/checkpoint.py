"""Checkpoints of V4: what one holds, and a model loaded from it.

Official directories load unmodified: FP8 or FP4 experts, UE8M0 or float32 scales, Base and repacked models, plain
BF16 / F32, under the official names or those of transformers. The format is read from dtypes, never from names.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from model.build import Numerics
from model.config import ModelConfig, load_config
from model.hf_names import with_official_names
from model.loading_errors import CheckpointError
from model.ops.registry import OpTable
from model.parallel import ParallelGroup
from model.quant import FloatFormat, WeightFormat
from model.safetensors_index import StoredTensor, read_stored_tensors
from model.transformer import Transformer
from model.weight_copy import copy_tensors, match_tensors

__all__ = ["CheckpointError", "CheckpointInfo", "inspect_checkpoint", "load_model"]

_DENSE_PROBE = "layers.0.attn.wq_a"
_EXPERT_PROBE = "layers.0.ffn.experts.0.w1"
_EXPERT_NAME = re.compile(r"\.ffn\.experts\.(\d+)\.w[123]\.(?:weight|scale)$")
_FLOAT_FORMATS: Mapping[str, FloatFormat] = {
    "BF16": "bfloat16",
    "F16": "bfloat16",
    "F32": "float32",
    "F64": "float32",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint directory holds; no weight has been read."""

    config: ModelConfig
    weight_format: WeightFormat
    num_tensors: int
    total_bytes: int
    """Of tensors; headers not counted."""
    files: tuple[Path, ...]
    drafter: Literal["none", "mtp", "dspark"]
    """Which draft module stands under `mtp.*`. A DSpark drafter is recognised and left unused."""


def inspect_checkpoint(model_dir: Path) -> CheckpointInfo:
    """Read `config.json` and the safetensors headers of `model_dir`.

    Raises:
        CheckpointError: the directory, its files or its tensors' dtypes are wrong.
        ConfigError: `config.json` describes a model that Fathom cannot run.
    """
    config = _load_config(model_dir)
    stored = read_stored_tensors(model_dir)
    official = with_official_names(stored)
    return CheckpointInfo(
        config=config,
        weight_format=_detect_format(model_dir, official),
        num_tensors=len(stored),
        total_bytes=sum(tensor.num_bytes for tensor in stored.values()),
        files=tuple(sorted({tensor.path for tensor in stored.values()})),
        drafter=_detect_drafter(official),
    )


def load_model(
    model_dir: Path,
    *,
    dtype: torch.dtype,
    numerics: Numerics,
    device: torch.device | str = "cpu",
    ops: OpTable | None = None,
    group: ParallelGroup | None = None,
    with_mtp: bool = False,
    progress: bool = True,
) -> Transformer:
    """Build the model of `model_dir` on `device` and fill it; quantized weights stay quantized.

    `dtype` is that of activations and unquantized matrices. `with_mtp` also loads the MTP block (`mtp.0.*`).
    `progress` shows a bar of bytes on a terminal.

    Raises:
        CheckpointError: a file is damaged, or tensors are missing, surplus, wrongly shaped or wrongly typed.
        ConfigError: `config.json` describes a model that Fathom cannot run.
        ValueError: a dim does not divide over `group`.
    """
    config = _load_config(model_dir)
    stored = with_official_names(read_stored_tensors(model_dir))
    weights = _detect_format(model_dir, stored)
    if with_mtp and _detect_drafter(stored) != "mtp":
        raise CheckpointError(
            model_dir,
            "the MTP block was asked for",
            expected="mtp.0.e_proj and its neighbours",
            found=f"drafter: {_detect_drafter(stored)}",
            hint="Load it without the MTP block.",
        )
    model = Transformer(
        config, weights=weights, dtype=dtype, numerics=numerics, ops=ops, group=group, with_mtp=with_mtp, device=device
    )
    sharded = group is not None and group.size > 1

    def is_unused(name: str) -> bool:
        if name.startswith("mtp."):
            return not with_mtp
        # A rank expects its own experts only; the others' must at least be experts of this model.
        expert = _EXPERT_NAME.search(name)
        return sharded and expert is not None and int(expert[1]) < config.n_routed_experts

    pairs = match_tensors(model_dir, model.checkpoint_tensors(), stored, is_unused)
    copy_tensors(model_dir, pairs, num_experts=config.n_routed_experts, progress=progress)
    model.finish_loading()
    return model.eval()


def _load_config(model_dir: Path) -> ModelConfig:
    try:
        return load_config(model_dir)
    except (FileNotFoundError, NotADirectoryError):
        found = "no such file" if model_dir.is_dir() else "no such directory"
        raise CheckpointError(model_dir, "no model here", expected="config.json", found=found) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(model_dir / "config.json", "not a text file", found=str(error)) from None


def _detect_drafter(stored: Mapping[str, StoredTensor]) -> Literal["none", "mtp", "dspark"]:
    if "mtp.0.main_proj.weight" in stored:
        return "dspark"
    return "mtp" if "mtp.0.e_proj.weight" in stored else "none"


def _detect_format(model_dir: Path, stored: Mapping[str, StoredTensor]) -> WeightFormat:
    def code(name: str) -> str:
        if name not in stored:
            raise CheckpointError(model_dir, f"tensor {name!r} is missing; the weight format is read from it")
        return stored[name].dtype

    def unsupported(name: str, expected: str) -> CheckpointError:
        return CheckpointError(stored[name].path, f"tensor {name!r}: dtype", expected=expected, found=code(name))

    dense: Literal["fp8"] | FloatFormat
    experts: Literal["fp4", "fp8"] | FloatFormat
    dense_code, expert_code = code(_DENSE_PROBE + ".weight"), code(_EXPERT_PROBE + ".weight")
    if dense_code == "F8_E4M3":
        dense = "fp8"
    elif dense_code in _FLOAT_FORMATS:
        dense = _FLOAT_FORMATS[dense_code]
    else:
        raise unsupported(_DENSE_PROBE + ".weight", "F8_E4M3, BF16 or F32")
    if expert_code in ("I8", "U8"):
        experts = "fp4"
    elif expert_code == "F8_E4M3":
        experts = "fp8"
    elif expert_code in _FLOAT_FORMATS:
        experts = _FLOAT_FORMATS[expert_code]
    else:
        raise unsupported(_EXPERT_PROBE + ".weight", "I8 (packed FP4), F8_E4M3, BF16 or F32")
    scale: Literal["ue8m0", "float32"] | None = "ue8m0" if experts == "fp4" else None
    if "fp8" in (dense, experts):
        name = (_DENSE_PROBE if dense == "fp8" else _EXPERT_PROBE) + ".scale"
        scales: dict[str, Literal["ue8m0", "float32"]] = {"F8_E8M0": "ue8m0", "U8": "ue8m0", "F32": "float32"}
        if code(name) not in scales:
            raise unsupported(name, "F8_E8M0 (or U8 holding its bytes) or F32")
        scale = scales[code(name)]
    return WeightFormat(dense=dense, experts=experts, scale=scale)
