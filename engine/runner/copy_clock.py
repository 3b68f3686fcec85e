"""How long the copies of a step take, between the device and the host."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Direction = Literal["load", "save"]


class CopyClock:
    """Seconds of one step's copies in each direction.

    On a CPU a copy is over when the call returns. On CUDA copies are queued on the stream that computes: events beside
    them tell the time, and are read once, at the end of the step.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds: dict[Direction, float] = {"load": 0.0, "save": 0.0}
        self._events: list[tuple[Direction, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timing(self, direction: Direction) -> Iterator[None]:
        """Count what is copied inside."""
        if not self._on_cuda:
            started = time.perf_counter()
            yield
            self._seconds[direction] += time.perf_counter() - started
            return
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        yield
        end.record()
        self._events.append((direction, begin, end))

    def read(self) -> dict[Direction, float]:
        """Seconds by direction; waits for the copies."""
        for direction, begin, end in self._events:
            end.synchronize()
            self._seconds[direction] += begin.elapsed_time(end) / 1000.0
        self._events.clear()
        return self._seconds
