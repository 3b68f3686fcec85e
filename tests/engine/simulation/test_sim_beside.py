"""Short chats beside a long prompt on the virtual clock, on a machine like two cores of a CPU."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.config import CPU_STEP_SECONDS, EngineConfig, MachineFacts, resolve
from engine.scheduler import Scheduler
from engine.simulation.clock import Run, simulate
from engine.simulation.hardware import Machine, StepWork, gpu
from engine.simulation.workload import SimRequest, Text, Trace, seed_of
from model.presets import preset

NANO = replace(preset("nano"), index_n_heads=4)
LONG_TOKENS = 60_000
WARM_SECONDS = 20.0


class Cpu(Machine):
    """Steps as they were measured on two cores, with the noise of a machine that has other work."""

    def __init__(self, *machine: Any, slowdown: float) -> None:
        super().__init__(*machine)
        self._slowdown = slowdown
        self._noise = np.random.default_rng(0)

    def step_seconds(self, work: StepWork) -> float:
        rows = len(work.decode_contexts) + sum(rows for _, rows in work.chunks)
        if not rows:
            return 0.0
        context = sum(work.decode_contexts) + sum(rows * (start + rows / 2) for start, rows in work.chunks)
        seconds = 0.015 + 0.001 * len(work.decode_contexts) + 4e-4 * rows + 2.3e-9 * context
        return self._slowdown * seconds * (1.0 + 0.1 * abs(float(self._noise.standard_normal())))


def request(name: str, kind: str, prompt: int, answer: int, arrival: float) -> SimRequest:
    return SimRequest(
        request_id=name,
        prompt=Text([seed_of(name)], [prompt]),
        answer=Text([seed_of(name, "answer")], [answer]),
        kind=kind,
        arrival=arrival,
    )


def run(slowdown: float, *, long: bool, num_chats: int) -> Run:
    config = resolve(
        EngineConfig(model_dir="", device="cpu", kv_cache_bytes=200 << 20, max_num_seqs=32, long_prompt_tokens=50_000),
        NANO,
        MachineFacts(device="cpu", has_bf16=True, free_bytes=1 << 40, num_cores=2),
    )
    layout = config.layout(NANO)
    requests = [request("warm", "warm", 3000, 16, 0.0)]
    requests += [request("long", "long", LONG_TOKENS, 1, WARM_SECONDS)] * long
    # Now and then at any moment of a step.
    requests += [request(f"chat {n}", "chat", 50, 16, WARM_SECONDS + 0.013 + 1.017 * n) for n in range(num_chats)]
    scheduler = Scheduler(config, layout, eos_token_id=1)
    return simulate(
        Trace(name="beside", requests=tuple(requests)), scheduler, Cpu(NANO, layout, gpu("h200"), slowdown=slowdown)
    )


def p99(values: Any) -> float:
    return float(np.percentile(values, 99))


def ttft(found: Run, request_id: str) -> float:
    seconds = found.records[request_id].ttft
    assert seconds is not None
    return seconds


@pytest.mark.parametrize("slowdown", [1.0, 2.0])
def test_chats_keep_their_times_and_the_long_one_moves(slowdown: float) -> None:
    idle, alone = run(slowdown, long=False, num_chats=40), run(slowdown, long=True, num_chats=0)
    beside = run(slowdown, long=True, num_chats=int(2.5 * ttft(alone, "long")))
    end = WARM_SECONDS + ttft(beside, "long")
    assert ttft(beside, "long") <= 2.5 * ttft(alone, "long")
    chats = [r for r in beside.records.values() if r.request.kind == "chat" and r.request.arrival < end]
    assert len(chats) > 25
    on_idle = p99([ttft(idle, f"chat {n}") for n in range(40)])
    assert p99([ttft(beside, chat.request.request_id) for chat in chats]) <= 2 * on_idle + CPU_STEP_SECONDS
    assert p99(np.concatenate([chat.itls for chat in chats])) <= 1.3 * CPU_STEP_SECONDS
