"""Batches from several processes, the same whatever their number.

    worker w: blocks w, w + W, w + 2W, ...  ── a short queue each ──>  Batches takes block 0, 1, 2, ... in turn

Each worker knows the whole recipe and nothing of the others.
"""

import multiprocessing
import queue
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from embedded.data.mixture import STAGES
from embedded.data.seeds import check_training_seed
from embedded.data.stream import BLOCK_ROWS, PackedRow, checked_row_tokens, packed_block
from server.text.tokenizer import Tokenizer

_WAITING_BLOCKS = 2
"""Of each worker."""
_PATIENCE_SECONDS = 5.0
"""Between two looks at whether a worker is still there."""


@dataclass(frozen=True, slots=True)
class Batch:
    """[B, S] of each; see `stream.PackedRow`."""

    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    starts: npt.NDArray[np.int32]


class Batches:
    """An endless iterator; close it, or use it in a `with`. `state` is the number of the first row of the next batch:
    `first=state` goes on there."""

    def __init__(
        self,
        tokenizer_dir: Path,
        vocab_size: int,
        stage_name: str,
        seed: int,
        *,
        batch_rows: int,
        workers: int,
        row_tokens: int | None = None,
        first: int = 0,
    ) -> None:
        """B is `batch_rows`; S is `row_tokens`, or the stage's where that is None. Raises ValueError, KeyError."""
        check_training_seed(seed)
        row_tokens = checked_row_tokens(row_tokens or STAGES[stage_name].row_tokens)
        if batch_rows < 1 or workers < 1:
            raise ValueError(f"batch_rows and workers must be at least 1; found {batch_rows} and {workers}")
        self.state = first
        self._batch_rows = batch_rows
        self._block: list[PackedRow] = []
        self._block_number = -1
        context = multiprocessing.get_context("spawn")
        self._stop: Event = context.Event()
        self._queues: list[Queue[list[PackedRow]]] = [context.Queue(_WAITING_BLOCKS) for _ in range(workers)]
        self._first_block = first // BLOCK_ROWS
        self._workers: list[BaseProcess] = []
        for n in range(workers):
            recipe = _Recipe(tokenizer_dir, vocab_size, stage_name, seed, row_tokens, self._first_block + n, workers)
            worker = context.Process(target=_work, args=(recipe, self._queues[n], self._stop), daemon=True)
            worker.start()
            self._workers.append(worker)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Raises RuntimeError if a worker died."""
        rows = [self._row(self.state + n) for n in range(self._batch_rows)]
        self.state += self._batch_rows
        return Batch(
            np.stack([row.ids for row in rows]),
            np.stack([row.weights for row in rows]),
            np.stack([row.starts for row in rows]),
        )

    def close(self) -> None:
        """End the workers."""
        self._stop.set()
        for worker in self._workers:
            worker.terminate()
            worker.join()
        for waiting in self._queues:
            waiting.cancel_join_thread()
            waiting.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _row(self, number: int) -> PackedRow:
        block, row = divmod(number, BLOCK_ROWS)
        if block != self._block_number:
            self._block = self._take((block - self._first_block) % len(self._workers))
            self._block_number = block
        return self._block[row]

    def _take(self, n: int) -> list[PackedRow]:
        while True:
            try:
                return self._queues[n].get(timeout=_PATIENCE_SECONDS)
            except queue.Empty:
                if not self._workers[n].is_alive():
                    raise RuntimeError(f"data worker {n} ended with {self._workers[n].exitcode}") from None


@dataclass(frozen=True, slots=True)
class _Recipe:
    tokenizer_dir: Path
    vocab_size: int
    stage_name: str
    seed: int
    row_tokens: int
    block: int
    """The first one,"""
    step: int
    """and how many blocks further the next one is."""


def _work(recipe: _Recipe, blocks: "Queue[list[PackedRow]]", stop: Event) -> None:
    tokenizer = Tokenizer.load(recipe.tokenizer_dir, recipe.vocab_size)
    stage = STAGES[recipe.stage_name]
    number = recipe.block
    while not stop.is_set():
        blocks.put(packed_block(tokenizer, stage, recipe.seed, number, recipe.row_tokens))
        number += recipe.step
