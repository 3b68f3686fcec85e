"""From the network under training to a checkpoint in the official format, and what the rounding costs."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from embedded.training.network import Network
from embedded.training.rows import Rows
from model.tools.checkpoint_writer import write_checkpoint


def export(network: Network, out_dir: Path, tokenizer: Path, *, force: bool = False) -> None:
    """Write the parameters as they stand: FP8 matrices, FP4 experts, the rest in BF16 and F32.

    Raises:
        ValueError, FileExistsError: as `write_checkpoint`.
    """
    plain = {tensor.name: tensor.destination.detach().cpu() for tensor in network.model.checkpoint_tensors()}

    def source(name: str, shape: tuple[int, ...]) -> Tensor:
        found = plain[name]
        assert tuple(found.shape) == shape, f"{name}: {tuple(found.shape)} is not {shape}"
        return found

    write_checkpoint(network.config, "fp4", out_dir, source, tokenizer=tokenizer, force=force)


@torch.no_grad()
def rounding_loss(network: Network, rows: Sequence[Rows]) -> dict[str, float]:
    """Mean loss and share of right tokens over some rows, plain and with the weights of the checkpoint."""
    before = network.weights.rounding
    found: dict[str, float] = {}
    for name, rounding in (("plain", False), ("rounded", True)):
        network.weights.rounding = rounding
        network.weights.refresh()
        losses = [network(row) for row in rows]
        found[f"{name}_loss"] = float(torch.stack([loss.next_token for loss in losses]).mean())
        found[f"{name}_right"] = float(torch.stack([loss.right for loss in losses]).mean())
    network.weights.rounding = before
    network.weights.refresh()
    return found
