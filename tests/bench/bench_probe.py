"""CPU time of finding a cached prompt of a million tokens: `python -m tests.bench.bench_probe`.

Writes tests/bench/results/probe.json: medians and the best of 50, in milliseconds of the thread's CPU time. The
prompt is cached whole, with a snapshot in every tenth of its 4,096 pages. The limits are 50 ms for the keys, which are
made off the step loop, and 5 ms for match and plan together, which are not.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engine.kv.hashing import PageHasher, PageKeys
from engine.kv.prefix_index import PrefixIndex
from engine.kv.resume import plan_resume
from engine.kv.snapshot_store import SnapshotStore

NUM_PAGES, PAGE_TOKENS = 4096, 256
OUT = Path(__file__).parent / "results" / "probe.json"


class Costs:
    """Work in tokens; a replay is never worth it."""

    def prefill_seconds(self, start: int, end: int) -> float:
        return float(end - start)

    def replay_seconds(self, position: int) -> float:
        return 1e9

    def load_seconds(self, num_bytes: int) -> float:
        return 0.0


def main() -> None:
    index = PrefixIndex(page_tokens=PAGE_TOKENS, page_bytes=1, num_host_pages=0, seconds_saved=lambda start, end: 1.0)
    store = SnapshotStore(num_places=NUM_PAGES, bytes_per_snapshot=1)
    tokens = np.random.default_rng(0).integers(0, 129280, NUM_PAGES * PAGE_TOKENS + 9, dtype=np.int32)
    hasher = PageHasher(bytes(32), "", PAGE_TOKENS)
    keys = PageKeys(hasher, "", tokens)
    tip = index.root(keys.root)
    index.acquire(tip)
    for page_id in range(NUM_PAGES):
        tails = []
        if page_id % 10 == 0:
            tail = tokens[page_id * PAGE_TOKENS :][:9].tobytes()
            position = page_id * PAGE_TOKENS + 9
            snapshot = store.order(tip.key + tail, position, "turn_end", seconds_saved=1.0, now=float(page_id))
            assert snapshot is not None
            store.commit(snapshot)
            tails = [tail]
        tip = index.publish(tip, keys, page_id, 0.0, tails).node

    def probe() -> None:
        plan = plan_resume(
            index.match(keys, tokens), len(tokens), store, Costs(), page_tokens=PAGE_TOKENS, bytes_per_page=1
        )
        assert plan.resume_at == 4090 * PAGE_TOKENS + 9

    result: dict[str, Any] = {
        "tokens": len(tokens),
        "keys": measure(lambda: PageKeys(hasher, "", tokens)),
        "probe": measure(probe),
        "num_cores": os.cpu_count(),
        "load_average": os.getloadavg(),
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def measure(run: Callable[[], object]) -> dict[str, float]:
    times = []
    for _ in range(50):
        start = time.thread_time()
        run()
        times.append(1e3 * (time.thread_time() - start))
    return {"median_ms": round(statistics.median(times), 3), "best_ms": round(min(times), 3)}


if __name__ == "__main__":
    main()
