"""A request as the symbolic device knows it, and the rows that its pages and its slot must hold."""

from dataclasses import dataclass, field

import numpy as np
from symbolic import tags
from symbolic.tags import NOTHING

from engine.plan import NewRequest
from model.config import CSA_RATIO, HCA_RATIO
from model.kv_layout import PAGE_TOKENS

CSA_ROWS = PAGE_TOKENS // CSA_RATIO
HCA_ROWS = PAGE_TOKENS // HCA_RATIO
PAGE_ROWS = 2 * CSA_ROWS + HCA_ROWS
_INDEX_MARK, _HCA_MARK = 0x1111_1111_1111_1111, 0x2222_2222_2222_2222
"""Entries of different classes have different tags."""
NUM_ACCUMULATORS = 5


def _hidden() -> np.ndarray:
    """bool [entries, PAGE_ROWS]: rows of a page that nobody may see when it has that many CSA entries."""
    hidden = np.ones((CSA_ROWS + 1, PAGE_ROWS), dtype=bool)
    for entries in range(CSA_ROWS + 1):
        hidden[entries, :entries] = False
        hidden[entries, CSA_ROWS : CSA_ROWS + entries] = False
        hidden[entries, 2 * CSA_ROWS : 2 * CSA_ROWS + entries * CSA_RATIO // HCA_RATIO] = False
    return hidden


HIDDEN = _hidden()


@dataclass(slots=True, kw_only=True, eq=False)
class Live:
    """A request as the device knows it."""

    new: NewRequest
    root: int
    num_tokens: int
    num_computed: int
    """-1: the slot has not been made what it must be."""
    tags_N: np.ndarray
    """uint64 [capacity]: of all known tokens."""
    rows_PR: np.ndarray
    """uint64 [pages, PAGE_ROWS]: what its pages must hold, as far as tokens are known."""
    table_P: np.ndarray
    """int64 [pages]."""
    num_pages: int = 0
    ended: bool = False
    """A step failed it: it may only be forgotten."""
    page_ids: list[int] = field(default_factory=list)

    @staticmethod
    def learn(new: NewRequest, root: int, most: int) -> "Live":
        """`most`: tokens that it may ever have."""
        known, num_pages = len(new.token_ids), -(-most // PAGE_TOKENS)
        tags_N = np.zeros(num_pages * PAGE_TOKENS, dtype=np.uint64)
        tags_N[:known] = tags.history(new.token_ids) + np.uint64(root)
        by_page = tags_N.reshape(num_pages, PAGE_TOKENS)
        csa = by_page[:, CSA_RATIO - 1 :: CSA_RATIO]
        hca = by_page[:, HCA_RATIO - 1 :: HCA_RATIO]
        return Live(
            new=new,
            root=root,
            num_tokens=known,
            num_computed=-1 if new.num_computed_tokens else 0,
            tags_N=tags_N,
            rows_PR=np.concatenate([csa, csa ^ np.uint64(_INDEX_MARK), hca ^ np.uint64(_HCA_MARK)], axis=1),
            table_P=np.zeros(num_pages, dtype=np.int64),
        )

    def accumulators(self, position: int) -> list[int]:
        """What they must hold after `position` tokens: overlap, accumulator, both of the index keys, HCA."""
        group = position // CSA_RATIO * CSA_RATIO
        overlap = int(self.tags_N[group - 1]) if group else NOTHING
        last = int(self.tags_N[position - 1])
        current = last if position > group else NOTHING
        return (
            [
                overlap,
                current,
                overlap ^ _INDEX_MARK,
                current ^ _INDEX_MARK,
                last ^ _HCA_MARK if position % HCA_RATIO else NOTHING,
            ]
            if position
            else [NOTHING] * NUM_ACCUMULATORS
        )

    def append(self, tag: int) -> None:
        position = self.num_tokens
        self.tags_N[position] = tag
        self.num_tokens += 1
        page, inside = divmod(position, PAGE_TOKENS)
        if inside % CSA_RATIO == CSA_RATIO - 1:
            self.rows_PR[page, inside // CSA_RATIO] = tag
            self.rows_PR[page, CSA_ROWS + inside // CSA_RATIO] = tag ^ _INDEX_MARK
        if inside % HCA_RATIO == HCA_RATIO - 1:
            self.rows_PR[page, 2 * CSA_ROWS + inside // HCA_RATIO] = tag ^ _HCA_MARK
