"""`python -m embedded.training run|export`: train by a recipe, and write what was learnt as a checkpoint.

run     goes on from the newest state in DIR, or begins, until the recipe is over or the minutes are
export  the newest state of DIR in the official format, with what the rounding costs
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from embedded.data.parallel import Batches
from embedded.tokenizer import save_embedded_tokenizer
from embedded.training import state
from embedded.training.export import export, rounding_loss
from embedded.training.network import Network
from embedded.training.recipe import RECIPES, Recipe, Stage
from embedded.training.rows import Rows
from embedded.training.trainer import Batch, DivergedError, Trainer

_HELD_OUT_SEED_STEP = 1000
"""What rounding costs is measured on rows of another seed."""
_HELD_OUT_BATCHES = 4


class Data:
    """Batches of a recipe's stages; the workers of one stage at a time."""

    def __init__(self, recipe: Recipe, tokenizer: Path, workers: int) -> None:
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._workers = workers

    def batches(self, stage: Stage, first_step: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Those of the steps from `first_step` on."""
        with Batches(
            self._tokenizer,
            self._recipe.model.vocab_size,
            stage.data,
            self._recipe.seed if seed is None else seed,
            batch_rows=stage.rows,
            workers=self._workers,
            row_tokens=stage.row_tokens,
            first=first_step * stage.rows,
        ) as batches:
            for batch in batches:
                yield batch.ids, batch.weights, batch.starts


def run(args: argparse.Namespace) -> int:
    recipe = _recipe(args)
    tokenizer = _tokenizer(args.state)
    data = Data(recipe, tokenizer, args.workers)
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        trainer = Trainer(recipe, args.state, data.batches, device=args.device, compiled=args.compile)
        over = trainer.run(seconds=60.0 * args.minutes)
    except (state.StateError, DivergedError) as error:
        print(f"embedded.training: {error}", file=sys.stderr)
        return 1
    progress = trainer.progress
    print(f"{'over' if over else 'stopped'} after {progress.total_steps} steps, {progress.total_tokens} tokens")
    return 0


def write(args: argparse.Namespace) -> int:
    recipe = _recipe(args)
    network = Network(recipe.model)
    try:
        state.read_parameters(state.newest(args.state), network)
        export(network, args.out_dir, _tokenizer(args.state), force=args.force)
    except (state.StateError, ValueError, OSError) as error:
        print(f"embedded.training: {error}", file=sys.stderr)
        return 1
    network.sparse = True
    stage = recipe.stages[-1]
    held_out = Data(recipe, _tokenizer(args.state), 1).batches(stage, 0, seed=recipe.seed + _HELD_OUT_SEED_STEP)
    rows = []
    for _, (ids, weights, starts) in zip(range(_HELD_OUT_BATCHES), held_out, strict=False):
        parts = (torch.from_numpy(part) for part in (ids, weights, starts))
        rows.append(Rows.of(*(part.long() if part.dtype == torch.int32 else part for part in parts)))
    print(json.dumps({"checkpoint": str(args.out_dir), **rounding_loss(network, rows)}))
    return 0


def _recipe(args: argparse.Namespace) -> Recipe:
    return RECIPES[args.recipe].scaled(args.scale)


def _tokenizer(directory: Path) -> Path:
    """The tokenizer of a run; trained when the run begins."""
    tokenizer = directory / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file():
        save_embedded_tokenizer(tokenizer)
    return tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m embedded.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="run|export")
    training = commands.add_parser("run", help="train")
    training.add_argument("--minutes", type=float, default=24 * 60.0)
    training.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    training.add_argument("--threads", type=int, default=torch.get_num_threads())
    training.add_argument("--workers", type=int, default=1, help="processes that make examples")
    training.add_argument("--compile", action="store_true", help="fuse small ops (needs a C++ compiler)")
    training.set_defaults(function=run)
    writing = commands.add_parser("export", help="write a checkpoint")
    writing.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    writing.add_argument("--force", action="store_true", help="replace a directory that is not empty")
    writing.set_defaults(function=write)
    for command in (training, writing):
        command.add_argument("--recipe", choices=RECIPES, default="gpu")
        command.add_argument("--scale", type=float, default=1.0, help="times as many steps as the recipe says")
        command.add_argument("--state", type=Path, required=True, metavar="DIR", help="where the run is kept")
    args = parser.parse_args(argv)
    code: int = args.function(args)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
