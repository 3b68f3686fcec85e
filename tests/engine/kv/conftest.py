"""Fixtures of the prefix cache's tests."""

import time
from collections.abc import Callable

import pytest


@pytest.fixture
def against_plain_python() -> Callable[[Callable[[], object]], float]:
    """How many times longer some work over 4,096 pages takes than a plain loop over 4,096 dictionary entries.

    The limits in milliseconds stand in tests/bench/bench_probe.py, which wants a core of its own. Here the core may be
    half a core or a slow one, and the loop, run in turns with the work, slows down with it.
    """
    table = {i.to_bytes(16, "little"): i for i in range(4096)}
    keys = list(table)

    def loop() -> list[tuple[bytes, int]]:
        return [(key, table[key]) for key in keys]

    def seconds(run: Callable[[], object]) -> float:
        start = time.thread_time()
        run()
        return time.thread_time() - start

    def ratio(run: Callable[[], object]) -> float:
        pairs = [(seconds(loop), seconds(run)) for _ in range(25)]
        return min(work for _, work in pairs) / min(plain for plain, _ in pairs)

    return ratio
