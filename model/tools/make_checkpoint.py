"""`fathom make-checkpoint`: a random model in the official format, the same bytes for the same seed on every machine.

Every tensor draws from a generator of its own, keyed by seed and name, with integer arithmetic up to one scaling: no
mathematical library can round it differently.
"""

import argparse
import hashlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import ModelConfig
from model.presets import PRESET_NAMES, preset
from model.tools.checkpoint_writer import Format, count_tokens, write_checkpoint

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
    num_tokens = count_tokens(config, tokenizer)

    def random(name: str, shape: tuple[int, ...]) -> Tensor:
        made = random_tensor(config, seed, name, shape)
        if name == "head.weight":
            made[num_tokens:] = 0
        return made

    write_checkpoint(config, format, out_dir, random, tokenizer=tokenizer, force=force)


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
