"""Endless rows for the training: examples packed side by side, in an order that only numbers decide.

    block b = rows b * 16 .. b * 16 + 15, packed from examples b * 4096, b * 4096 + 1, ...

Each example goes to the first row of its block with room for it, and begins there at a multiple of 128. A block is
closed when several examples in a row found no room. Blocks know nothing of each other, so any worker can make any.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedded.data.mixture import Stage, example_at
from embedded.data.render import Row, training_row
from embedded.data.seeds import check_training_seed
from model.tools.byte_tokenizer import PAD, SPECIAL_TOKENS
from server.text.tokenizer import Tokenizer

ALIGNMENT = 128
BLOCK_ROWS = 16
_BLOCK_EXAMPLES = 4096
_MOST_MISSES = 4
PAD_ID = SPECIAL_TOKENS.index(PAD)


@dataclass(frozen=True, slots=True)
class PackedRow:
    """S tokens of one or more examples."""

    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    """As in `render.Row`; 0 for padding."""
    starts: npt.NDArray[np.int32]
    """Of each token, the index of the first token of its example: a token sees nothing before it. Padding belongs to
    the example in front of it."""


class Stream:
    """Rows `first`, `first` + 1, ... of a stage; `state` is the number of the row that comes next."""

    def __init__(
        self, tokenizer: Tokenizer, stage: Stage, seed: int, *, row_tokens: int | None = None, first: int = 0
    ) -> None:
        """`row_tokens`, S, is the stage's where it is None. Raises ValueError."""
        check_training_seed(seed)
        self.state = first
        self._tokenizer = tokenizer
        self._stage = stage
        self._seed = seed
        self._row_tokens = checked_row_tokens(row_tokens or stage.row_tokens)
        self._block: list[PackedRow] = []
        self._block_number = -1

    def __iter__(self) -> Iterator[PackedRow]:
        return self

    def __next__(self) -> PackedRow:
        number, row = divmod(self.state, BLOCK_ROWS)
        if number != self._block_number:
            self._block = packed_block(self._tokenizer, self._stage, self._seed, number, self._row_tokens)
            self._block_number = number
        self.state += 1
        return self._block[row]


def packed_block(tokenizer: Tokenizer, stage: Stage, seed: int, number: int, row_tokens: int) -> list[PackedRow]:
    """BLOCK_ROWS rows."""
    ids = np.full((BLOCK_ROWS, row_tokens), PAD_ID, dtype=np.int32)
    weights = np.zeros((BLOCK_ROWS, row_tokens), dtype=np.float32)
    starts = np.zeros((BLOCK_ROWS, row_tokens), dtype=np.int32)
    used = [0] * BLOCK_ROWS
    misses = 0
    for index in range(number * _BLOCK_EXAMPLES, (number + 1) * _BLOCK_EXAMPLES):
        example = training_row(tokenizer, example_at(stage, seed, index))
        length = len(example.ids)
        if length > row_tokens:
            continue
        row = next((row for row in range(BLOCK_ROWS) if used[row] + length <= row_tokens), None)
        if row is None:
            misses += 1
            if misses == _MOST_MISSES:
                break
            continue
        start = used[row]
        _place(example, ids[row, start:], weights[row, start:])
        starts[row, start:] = start
        used[row] = -(-(start + length) // ALIGNMENT) * ALIGNMENT
    assert all(used), "an empty row: the stage's examples are longer than its rows"
    return [PackedRow(ids[row], weights[row], starts[row]) for row in range(BLOCK_ROWS)]


def checked_row_tokens(row_tokens: int) -> int:
    """Raises ValueError for a length that is no multiple of ALIGNMENT or takes more examples than a block has."""
    if row_tokens % ALIGNMENT or not 0 < row_tokens <= _BLOCK_EXAMPLES * ALIGNMENT // BLOCK_ROWS:
        most = _BLOCK_EXAMPLES * ALIGNMENT // BLOCK_ROWS
        raise ValueError(f"row_tokens must be a multiple of {ALIGNMENT} up to {most}; found {row_tokens}")
    return row_tokens


def _place(example: Row, ids: npt.NDArray[np.int32], weights: npt.NDArray[np.float32]) -> None:
    ids[: len(example.ids)] = example.ids
    weights[: len(example.ids)] = example.weights
