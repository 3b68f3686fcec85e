"""Runs a recipe: batches, losses, AdamW, reports and states. It can be stopped anywhere, and goes on where it saved."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from embedded.training import state
from embedded.training.initial import initialise
from embedded.training.network import Losses, Network
from embedded.training.pieces import Pieces
from embedded.training.recipe import Recipe, Stage
from embedded.training.rows import BLOCK, Rows
from embedded.training.state import Progress

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]
"""ids int32 [B, S], weights fp32 [B, S], starts int32 [B, S]."""
Batches = Callable[[Stage, int], Iterator[Batch]]
"""The batches of a stage from a step on."""
REPORT_SECONDS = 20.0
LARGEST_JUMP = 1 << 17
"""Tokens that may be left out in front of a block."""
_JUMP_SHARE = 0.5
"""Of the rows, those with jumps."""
_MOST_JUMPS = 3


class DivergedError(RuntimeError):
    """A loss is not a number."""


@dataclass(slots=True)
class _Report:
    """Sums since the last report."""

    began: float = field(default_factory=time.monotonic)
    steps: int = 0
    tokens: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, losses: Losses, tokens: int, gradient: Tensor) -> None:
        self.steps += 1
        self.tokens += tokens
        names = ("next_token", "token_after", "index", "right", "drafted")
        for name, value in {**{n: getattr(losses, n) for n in names}, "gradient": gradient}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()

    def line(self) -> dict[str, float]:
        seconds = time.monotonic() - self.began
        means = {name: round(float(total) / self.steps, 4) for name, total in self.sums.items()}
        return {**means, "tokens_per_second": round(self.tokens / seconds)}


class Trainer:
    """One run of a recipe in a directory."""

    def __init__(
        self, recipe: Recipe, directory: Path, batches: Batches, *, device: str = "cpu", compiled: bool = False
    ) -> None:
        """Goes on from the newest state in `directory`, or begins.

        Raises:
            StateError: the directory holds states of another recipe.
        """
        self.recipe = recipe
        self._directory = directory
        self._batches = batches
        self._device = torch.device(device)
        self.network = Network(recipe.model, device, pieces=Pieces.compiled() if compiled else None)
        self._optimizer = torch.optim.AdamW(
            self._groups(), lr=recipe.rate, betas=recipe.betas, fused=self._device.type == "cuda"
        )
        found = state.restore(directory, self.network, self._optimizer, recipe.identity)
        if found is None:
            initialise(self.network.model, recipe.seed)
        self.progress = found or Progress(recipe=recipe.identity)
        self._generator = torch.Generator()

    def run(self, *, seconds: float, save_seconds: float = 120.0, say: Callable[[str], None] = print) -> bool:
        """Train until the recipe is over (True) or `seconds` have gone by (False); a state is saved at the end."""
        began = saved = time.monotonic()
        report = _Report()
        while self.progress.stage < len(self.recipe.stages):
            stage = self.recipe.stages[self.progress.stage]
            self.network.sparse = stage.sparse
            self.network.weights.rounding = stage.rounded
            for batch in self._batches(stage, self.progress.step):
                before = time.monotonic()
                losses, gradient = self._step(stage, batch)
                report.add(losses, batch[0].size, gradient)
                now = time.monotonic()
                self.progress.seconds += now - before
                if now - report.began >= REPORT_SECONDS:
                    self._tell(report, say)
                    report = _Report()
                over = now - began >= seconds
                if over or now - saved >= save_seconds:
                    state.save(self._directory, self.network, self._optimizer, self.progress)
                    saved = now
                if over:
                    return False
                if self.progress.step == stage.steps:
                    break
            self.progress.stage, self.progress.step = self.progress.stage + 1, 0
        state.save(self._directory, self.network, self._optimizer, self.progress)
        return True

    def _step(self, stage: Stage, batch: Batch) -> tuple[Losses, Tensor]:
        recipe, progress = self.recipe, self.progress
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.rate_at(progress.stage, progress.step, progress.total_steps)
        self.network.weights.refresh()
        rows = self._rows(stage, batch)
        with self._autocast():
            losses: Losses = self.network(rows)
        total = losses.next_token + recipe.draft_weight * losses.token_after + recipe.index_weight * losses.index
        total.backward()
        gradient = torch.nn.utils.clip_grad_norm_(self.network.parameters(), recipe.most_gradient)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.network.balance(losses.loads, recipe.balance_step)
        progress.step += 1
        progress.total_steps += 1
        progress.total_tokens += batch[0].size
        return losses, gradient

    def _rows(self, stage: Stage, batch: Batch) -> Rows:
        ids, weights, starts = (torch.from_numpy(part).to(self._device) for part in batch)
        jumps = self._jumps(*ids.shape).to(self._device) if stage.jumps else None
        return Rows.of(ids.long(), weights, starts.long(), jumps)

    def _jumps(self, rows: int, tokens: int) -> Tensor:
        """int64 [B, N]: some rows leave out many tokens in front of a few blocks. By the step alone."""
        generator = self._generator.manual_seed(self.recipe.seed * 1_000_003 + self.progress.total_steps)
        num_blocks = tokens // BLOCK
        jumps = torch.zeros(rows, num_blocks, dtype=torch.int64)
        for row in range(rows):
            if float(torch.rand((), generator=generator)) >= _JUMP_SHARE:
                continue
            for _ in range(int(torch.randint(1, _MOST_JUMPS + 1, (), generator=generator))):
                block = int(torch.randint(num_blocks, (), generator=generator))
                # Short and long jumps are equally likely, by their logarithm.
                most = LARGEST_JUMP // BLOCK
                jumps[row, block] = BLOCK * int(most ** float(torch.rand((), generator=generator)))
        return jumps

    def _autocast(self) -> AbstractContextManager[object]:
        if self._device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()

    def _groups(self) -> list[dict[str, object]]:
        """Matrices decay; norms, biases, embeddings and hyper-connections do not."""
        decaying: list[nn.Parameter] = []
        other: list[nn.Parameter] = []
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                is_matrix = parameter.dim() >= 2 and not any(part in name for part in ("embed.", "hc_", "ape"))
                (decaying if is_matrix else other).append(parameter)
        return [
            {"params": decaying, "weight_decay": self.recipe.weight_decay},
            {"params": other, "weight_decay": 0.0},
        ]

    def _tell(self, report: _Report, say: Callable[[str], None]) -> None:
        p = self.progress
        line = {
            "stage": p.stage,
            "step": p.step,
            "tokens": p.total_tokens,
            "seconds": round(p.seconds),
            **report.line(),
        }
        if not all(np.isfinite(value) for value in line.values()):
            raise DivergedError(f"stage {p.stage}, step {p.step}: {json.dumps(line)}")
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        say(json.dumps(line))
