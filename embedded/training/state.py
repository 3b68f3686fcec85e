"""What a training run needs to go on: parameters, the optimizer's moments and where it was, in a directory.

    DIR/step-00001234/  parameters.safetensors moments.safetensors progress.json
    DIR/log.jsonl       a line for every report

A state appears complete or not at all; the last KEPT ones stay.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

KEPT = 2
_PARAMETERS, _MOMENTS, _PROGRESS = "parameters.safetensors", "moments.safetensors", "progress.json"


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a run stands."""

    recipe: str
    """Its name and a digest of its numbers: another recipe cannot go on from this state."""
    stage: int = 0
    step: int = 0
    """Within the stage."""
    total_steps: int = 0
    total_tokens: int = 0
    seconds: float = 0.0
    """Of training, over all runs."""


class StateError(ValueError):
    """A state that cannot be gone on from: says what, where, expected and found."""


def save(directory: Path, network: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
    """Write a state and drop the oldest ones."""
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"step-{progress.total_steps:08d}"
    partial = directory / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file({n: p.detach().contiguous() for n, p in network.named_parameters()}, partial / _PARAMETERS)
    moments: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            moments[f"{name}:{key}"] = torch.as_tensor(value).detach().contiguous()
    save_file(moments, partial / _MOMENTS)
    (partial / _PROGRESS).write_text(json.dumps(asdict(progress), indent=1) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    os.rename(partial, final)
    for old in _states(directory)[:-KEPT]:
        shutil.rmtree(old)
    return final


def restore(directory: Path, network: nn.Module, optimizer: torch.optim.Optimizer, recipe: str) -> Progress | None:
    """Load the newest state into network and optimizer; None when there is none.

    Raises:
        StateError: the state belongs to another recipe or another network.
    """
    states = _states(directory)
    if not states:
        return None
    newest = states[-1]
    progress = Progress(**json.loads((newest / _PROGRESS).read_text()))
    if progress.recipe != recipe:
        raise StateError(f"{newest}: expected the recipe {recipe}, found {progress.recipe}")
    read_parameters(newest, network)
    moments = load_file(newest / _MOMENTS)
    for name, parameter in network.named_parameters():
        found = {key.split(":")[1]: value for key, value in moments.items() if key.split(":")[0] == name}
        if found:
            # The optimizer counts its steps on the host.
            state = {k: v if k == "step" else v.to(parameter.device) for k, v in found.items()}
            optimizer.state[parameter] = state
    return progress


def read_parameters(state: Path, network: nn.Module) -> None:
    """Load the parameters of one state.

    Raises:
        StateError: a parameter is missing, left over or of another shape.
    """
    stored, wanted = load_file(state / _PARAMETERS), dict(network.named_parameters())
    if stored.keys() != wanted.keys():
        different = sorted(stored.keys() ^ wanted.keys())[:3]
        raise StateError(f"{state / _PARAMETERS}: parameters differ: {', '.join(different)} ...")
    with torch.no_grad():
        for name, parameter in wanted.items():
            if stored[name].shape != parameter.shape:
                found = f"expected {tuple(parameter.shape)}, found {tuple(stored[name].shape)}"
                raise StateError(f"{state / _PARAMETERS}: {name}: {found}")
            parameter.copy_(stored[name])


def newest(directory: Path) -> Path:
    """The newest state.

    Raises:
        StateError: there is none.
    """
    states = _states(directory)
    if not states:
        raise StateError(f"{directory}: no state of a training run")
    return states[-1]


def _states(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("step-*") if (path / _PROGRESS).is_file())
