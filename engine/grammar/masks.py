"""Masks of the tokens that may come next, filled on other threads while the model computes."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from llguidance import LLExecutor, LLMatcher

from engine.grammar.matcher import GrammarMatcher

_MOST_THREADS = 8


class MaskRows(NamedTuple):
    """Masks of some requests, plain data: the rank that plans sends them to the others as they are."""

    mask_NW: np.ndarray
    """int32 [requests, words]: bit b of word w is token 32 w + b."""
    failed: dict[int, str]
    """Row to the reason why there is no mask."""


class TokenMasks:
    """The masks of one step, on their way."""

    def __init__(self, request_ids: tuple[str, ...], rows: "Future[MaskRows]") -> None:
        self.request_ids = request_ids
        """Row n is that of `request_ids[n]`."""
        self._rows = rows

    def wait(self) -> MaskRows:
        """What the sampler calls once it has logits."""
        return self._rows.result()


class MaskFiller:
    """Fills the masks of one step at a time."""

    def __init__(self, num_threads: int | None = None) -> None:
        """`num_threads`: how many masks are filled at once; None: half of the cores."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._library = LLExecutor(num_threads or max(1, min(_MOST_THREADS, cores // 2)))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def fill(self, requests: Sequence[tuple[str, GrammarMatcher]]) -> TokenMasks:
        """Begin to fill one row for each request. No matcher may move before the rows are there."""
        num_words = requests[0][1].num_words
        mask_NW = np.empty((len(requests), num_words), dtype=np.int32)
        moving: list[tuple[LLMatcher, int]] = []
        widest: list[np.ndarray] = []
        for row, (_, matcher) in enumerate(requests):
            library = matcher.library
            if library is None:
                mask_NW[row] = matcher.fixed_row
            else:
                moving.append((library, row))
                widest.append(matcher.widest_row)
        request_ids = tuple(request_id for request_id, _ in requests)
        if moving:
            return TokenMasks(request_ids, self._thread.submit(self._run, mask_NW, moving, widest))
        rows: Future[MaskRows] = Future()
        rows.set_result(MaskRows(mask_NW, {}))
        return TokenMasks(request_ids, rows)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _run(self, mask_NW: np.ndarray, moving: list[tuple[LLMatcher, int]], widest: list[np.ndarray]) -> MaskRows:
        if len(moving) == 1:
            matcher, row = moving[0]
            matcher.unsafe_compute_mask_ptr(mask_NW[row].ctypes.data, mask_NW[row].nbytes)
        else:
            self._library.unsafe_compute_mask_ptr(moving, mask_NW.ctypes.data, mask_NW[0].nbytes, len(mask_NW))
        for (_, row), widest_W in zip(moving, widest, strict=True):
            mask_NW[row] &= widest_W
        # The library lets a matcher in an error state stop, with a mask that allows the end alone.
        return MaskRows(mask_NW, {row: matcher.stop_reason() for matcher, row in moving if matcher.is_error()})
