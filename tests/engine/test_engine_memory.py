"""Shared prefixes, follow-up turns and far too little memory: every token is that of a run without a cache, and all
memory comes back. The simulated executor compares the contents of every page and slot that a request resumes from.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest

from engine.config import ResolvedConfig, SchedulingConfig
from engine.core import EngineCore
from engine.executor import StepError
from engine.messages import AbortRequest, AddRequest, StepOutputs, pack_ids, unpack_ids
from engine.runner.sim_executor import Faults, SimExecutor
from model.presets import preset

MakeMessage = Callable[..., AddRequest]
MakeConfig = Callable[..., ResolvedConfig]


class Engine:
    """A core whose books are checked after every step."""

    def __init__(self, config: ResolvedConfig, faults: Faults | None = None) -> None:
        self.core = EngineCore(SimExecutor(config, preset("nano"), eos_probability=0.01, faults=faults))
        self.tokens: dict[str, list[int]] = {}
        self.finish: dict[str, str] = {}
        self.cached: dict[str, int] = {}

    def step(self) -> None:
        self.core.step()
        self.core.scheduler.check()
        while self.core.outbox:
            frame = self.core.outbox.popleft()
            assert isinstance(frame, StepOutputs)
            ids = unpack_ids(frame.token_ids).tolist()
            for i, request_id in enumerate(frame.request_ids):
                self.tokens.setdefault(request_id, []).extend(ids[frame.cu_tokens[i] : frame.cu_tokens[i + 1]])
                self.cached[request_id] = frame.cached_tokens[i]
                finish = frame.finish[i]
                if finish is not None:
                    assert request_id not in self.finish
                    self.finish[request_id] = finish

    def drain(self) -> None:
        for _ in range(20_000):
            self.step()
            if not self.core.scheduler.has_work:
                break
        scheduler = self.core.scheduler
        assert not scheduler.requests, "requests never ended"
        assert scheduler.kv.num_available_pages == scheduler.config.num_pages
        assert scheduler.kv.num_free_slots == scheduler.config.max_num_seqs

    def ask(self, message: AddRequest) -> list[int]:
        self.core.inbox.put(message)
        self.drain()
        return self.tokens[message.request_id]


def conversation(make_message: MakeMessage, rng: random.Random, engine: Engine, num: int, **fields: Any) -> AddRequest:
    """A follow-up of an earlier answer, a fan-out of a shared beginning, or something new."""
    shared = [[i] * 700 for i in (5, 6)]
    old = [m for m in SENT[engine] if m.request_id in engine.finish]
    if old and rng.random() < 0.6:
        before = rng.choice(old)
        history = unpack_ids(before.prompt_token_ids).tolist() + engine.tokens.get(before.request_id, [])
        prompt = history[: rng.choice([len(history), len(history), rng.randrange(1, len(history) + 1)])]
    else:
        prompt = shared[rng.randrange(2)][: rng.randrange(1, 700)] if rng.random() < 0.5 else []
    prompt = (prompt + [rng.randrange(2, 2048) for _ in range(rng.choice([1, 2, 60, 300]))])[-1500:]
    positions = pack_ids(sorted({rng.randrange(1, len(prompt) + 1)})) if rng.random() < 0.5 else b""
    return make_message(f"r{num}", prompt, snapshot_positions=positions, **fields)


SENT: dict[Engine, list[AddRequest]] = {}


@pytest.mark.parametrize("seed", range(12))
def test_cached_answers_are_cold_answers(make_config: MakeConfig, make_message: MakeMessage, seed: int) -> None:
    rng = random.Random(seed)
    sizes = {"max_num_seqs": rng.choice([1, 3, 6]), "max_num_batched_tokens": rng.choice([40, 300, 2000])}
    scheduling = SchedulingConfig(
        step_seconds=1e6, interactive_itl_seconds=1e6, long_itl_seconds=1e6, output_quantile=rng.choice([0.3, 1.0])
    )
    config = make_config(
        num_pages=rng.choice([9, 14, 40]),
        num_host_pages=rng.choice([0, 3, 30]),
        num_snapshots=rng.choice([0, 2, 30]),
        max_model_len=2200,
        scheduling=scheduling,
        **sizes,
    )
    faults = Faults()
    if seed % 3 == 2:
        faults.raise_in_step = {rng.randrange(1, 800): StepError("out of memory") for _ in range(8)}
    engine = Engine(config, faults)
    SENT[engine] = []
    aborted = set()
    for num in range(60):
        fields = {"max_tokens": rng.choice([2, 30, 300]), "seed": num}
        message = conversation(make_message, rng, engine, num, **fields)
        SENT[engine].append(message)
        engine.core.inbox.put(message)
        for _ in range(rng.choice([0, 3, 40, 200])):
            engine.step()
        if rng.random() < 0.15:
            aborted.add(message.request_id)
            engine.core.inbox.put(AbortRequest(request_id=message.request_id))
    engine.drain()
    assert set(engine.finish) == {m.request_id for m in SENT[engine]}
    cold = Engine(make_config(num_pages=2000, max_num_seqs=100, max_model_len=2200, enable_prefix_cache=False))
    for message in SENT[engine]:
        cold.core.inbox.put(message)
    cold.drain()
    for request_id, tokens in engine.tokens.items():
        whole = cold.tokens[request_id]
        if engine.finish[request_id] in ("stop", "length"):
            assert tokens == whole
        else:
            assert tokens == whole[: len(tokens)]
    assert set(cold.cached.values()) == {0}
    if config.num_snapshots and config.num_pages == 40:
        assert sum(engine.cached.values()) > 0


def test_a_follow_up_resumes_at_the_exact_token(make_config: MakeConfig, make_message: MakeMessage) -> None:
    engine = Engine(make_config(num_snapshots=8, num_host_pages=8))
    prompt = list(range(2, 365))
    answer = engine.ask(make_message("first", prompt, max_tokens=10, ignore_eos=True))
    history = prompt + answer
    engine.ask(make_message("second", [*history, 77, 78, 79], max_tokens=3))
    assert engine.cached == {"first": 0, "second": len(history) - 1}
