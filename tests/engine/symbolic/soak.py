"""Runs symbolic episodes until a number of operations is reached.

Stops at the first violation, with its seed and the shortest operations that show it.
"""

import argparse
import logging
import multiprocessing
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

_HERE = Path(__file__).resolve()
sys.path[:0] = [str(_HERE.parents[3]), str(_HERE.parents[1])]

from symbolic.driver import Episode, run_episode  # noqa: E402

MOST_LIVE = 12


def run_one(job: tuple[int, int]) -> tuple[int, Counter[str]]:
    """Operations, those of the drain included, and what was ordered."""
    logging.disable(logging.CRITICAL)
    run = run_episode(replace(Episode.draw(*job), most_live=MOST_LIVE), shrink_seconds=120.0)
    return run.num_ops, Counter(run.device.num_orders) + Counter(preemptions=run.scheduler.totals.num_preemptions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", type=int, default=200_000)
    parser.add_argument("--episode-ops", type=int, default=2000)
    parser.add_argument("--first-seed", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    started = reported = time.monotonic()
    done, orders = 0, Counter[str]()
    jobs = ((args.first_seed + i, args.episode_ops) for i in range(args.ops))
    with multiprocessing.Pool(args.workers) as pool:
        for num_ops, ordered in pool.imap(run_one, jobs):
            done += num_ops
            orders += ordered
            now = time.monotonic()
            if now - reported > 30.0 or done >= args.ops:
                reported = now
                print(f"{done} operations, {done / (now - started):.0f}/s, {dict(orders)}", flush=True)
            if done >= args.ops:
                return


if __name__ == "__main__":
    main()
