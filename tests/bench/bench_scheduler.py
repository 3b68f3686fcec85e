"""CPU time of a step's planning with 256 running and 1,000 waiting requests: `python -m tests.bench.bench_scheduler`.

Writes tests/bench/results/scheduler.json. Times are CPU time of the thread, of `schedule` and of `update`; a busy
machine takes the core away in between, which wall time would count. Garbage collection stays on.
"""

import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engine.config import ResolvedConfig, SchedulingConfig
from engine.messages import AddRequest, SamplingParams, pack_ids
from engine.plan import StepPlan, StepResult
from engine.request import Request
from engine.scheduler import Scheduler
from model.presets import preset

RESULTS = Path(__file__).parent / "results" / "scheduler.json"
NUM_RUNNING, NUM_WAITING, NUM_TENANTS, NUM_STEPS = 256, 1000, 50, 600


def make_scheduler(num_pages: int, max_num_seqs: int) -> Scheduler:
    config = ResolvedConfig(
        model_dir="",
        device="cuda",
        dtype="bfloat16",
        numerics="plain",
        row_format="fp8",
        index_format="fp8",
        deterministic=False,
        max_model_len=1 << 20,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=8192,
        num_pages=num_pages,
        num_threads=1,
        scheduling=SchedulingConfig(),
    )
    return Scheduler(config, config.layout(preset("flash")), eos_token_id=1)


def requests() -> Iterator[Request]:
    """Chats of 20 to 4,000 tokens of many tenants, without end."""
    rng = np.random.default_rng(0)
    order = 0
    while True:
        order += 1
        prompt = rng.integers(2, 2000, int(np.exp(rng.uniform(3.0, 8.3))))
        message = AddRequest(
            request_id=f"request-{order}",
            prompt_token_ids=pack_ids(prompt),
            sampling=SamplingParams(max_tokens=int(rng.integers(100, 2000)), seed=0, ignore_eos=True),
            tenant=f"tenant-{order % NUM_TENANTS}",
            deadline=1e9,
        )
        yield Request(message, vocab_size=129280, order=order, seed=0)


def long_request() -> Request:
    message = AddRequest(
        request_id="long",
        prompt_token_ids=pack_ids(np.full(1_000_000, 5)),
        sampling=SamplingParams(max_tokens=16, seed=0),
        tenant="tenant-0",
    )
    return Request(message, vocab_size=129280, order=0, seed=0)


def result_of(plan: StepPlan, scheduler: Scheduler) -> StepResult:
    ids = tuple(s.request_id for s in plan.scheduled if s.samples)
    return StepResult(
        step_id=plan.step_id,
        request_ids=ids,
        token_ids=(7,) * len(ids),
        logprobs=(None,) * len(ids),
        seconds=scheduler.costs.predict(scheduler.predicted_features),
    )


def measure(scheduler: Scheduler, arrivals: Iterator[Request]) -> dict[str, float]:
    """Percentiles over steps in which as many requests arrive as end; the state is filled before."""
    now = 0.0
    schedule: list[float] = []
    update: list[float] = []
    filling = True
    while len(schedule) < NUM_STEPS:
        while scheduler.num_waiting < NUM_WAITING:
            scheduler.add(next(arrivals))
        began = time.thread_time()
        plan = scheduler.schedule(now)
        planned = time.thread_time()
        result = result_of(plan, scheduler)
        committed = time.thread_time()
        scheduler.update(plan, result, now)
        ended = time.thread_time()
        now += result.seconds
        filling = filling and (scheduler.kv.num_free_slots > 0 and scheduler.num_running < NUM_RUNNING)
        if not filling:
            schedule.append((planned - began) * 1e6)
            update.append((ended - committed) * 1e6)
    return {
        "schedule_p50_us": round(statistics.median(schedule), 1),
        "schedule_p99_us": round(float(np.percentile(schedule, 99)), 1),
        "update_p50_us": round(statistics.median(update), 1),
        "update_p99_us": round(float(np.percentile(update, 99)), 1),
        "num_running": scheduler.num_running,
        "num_waiting": scheduler.num_waiting,
    }


def main() -> None:
    slots_full = measure(make_scheduler(num_pages=80_000, max_num_seqs=NUM_RUNNING), requests())
    # Slots are there but no pages: every step looks for a request that fits.
    pages_full = make_scheduler(num_pages=1_700, max_num_seqs=2 * NUM_RUNNING)
    pages_short = measure(pages_full, requests())
    with_long = make_scheduler(num_pages=80_000, max_num_seqs=NUM_RUNNING)
    with_long.add(long_request())
    beside_long = measure(with_long, requests())
    report = {
        "slots_full": slots_full,
        "pages_short": pages_short,
        "beside_a_long_prompt": beside_long,
        "num_cores": os.cpu_count(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
