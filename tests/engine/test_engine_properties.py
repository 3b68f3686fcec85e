"""Random traffic over scheduler, books and the checking executor.

Whatever happens, everybody gets an answer, all memory comes back, and a request's tokens depend on the request alone.
"""

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from engine.config import ResolvedConfig
from engine.core import EngineCore
from engine.executor import StepError
from engine.messages import AbortRequest, AddRequest, StepOutputs, unpack_ids
from engine.runner.sim_executor import Faults, SimExecutor
from model.presets import preset

MakeMessage = Callable[..., AddRequest]
MakeConfig = Callable[..., ResolvedConfig]


class Answers:
    """Collects the frames of a core and holds each request to one ending."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.finish: dict[str, str] = {}

    def step(self) -> None:
        self.core.step()
        self.core.scheduler.check()
        while self.core.outbox:
            frame = self.core.outbox.popleft()
            assert isinstance(frame, StepOutputs)
            ids = unpack_ids(frame.token_ids).tolist()
            assert len(set(frame.request_ids)) == len(frame.request_ids), "two rows for one request"
            for i, request_id in enumerate(frame.request_ids):
                assert request_id not in self.finish, f"{request_id} speaks after its end"
                self.tokens[request_id] += ids[frame.cu_tokens[i] : frame.cu_tokens[i + 1]]
                finish = frame.finish[i]
                if finish is not None:
                    self.finish[request_id] = finish
                    assert (frame.errors[i] is not None) == (finish == "error")
                    assert finish != "stop" or self.tokens[request_id][-1] == frame.stop_ids[i]

    def run_until_idle(self, most_steps: int = 20_000) -> None:
        self.step()
        for _ in range(most_steps):
            if not self.core.scheduler.has_work:
                break
            self.step()
        scheduler = self.core.scheduler
        assert not scheduler.requests, "requests never ended"
        assert scheduler.kv.num_available_pages == scheduler.config.num_pages, "pages are lost"
        assert scheduler.kv.num_free_slots == scheduler.config.max_num_seqs, "slots are lost"
        # The runner is told, too.
        self.step()


def random_message(make_message: MakeMessage, rng: random.Random, request_id: str) -> AddRequest:
    num_prompt = rng.choice([1, 2, 127, 128, 129, 255, 256, 257, rng.randrange(1, 900)])
    fields: dict[str, Any] = {"max_tokens": rng.choice([1, 2, 5, 40, 300]), "seed": rng.randrange(1 << 63)}
    if rng.random() < 0.2:
        fields["ignore_eos"] = True
    if rng.random() < 0.2:
        fields["stop_token_ids"] = tuple(rng.sample(range(2048), 40))
        fields["min_tokens"] = rng.randrange(fields["max_tokens"])
    if rng.random() < 0.2:
        fields["priority"] = rng.randrange(-2, 3)
    return make_message(request_id, [rng.randrange(2048) for _ in range(num_prompt)], **fields)


def expected_tokens(message: AddRequest, config: ResolvedConfig, eos_probability: float) -> tuple[list[int], str]:
    """The answer of a request that runs alone, in whole steps."""
    alone = replace(config, max_num_batched_tokens=1 << 20, num_pages=1024)
    answers = Answers(EngineCore(SimExecutor(alone, preset("nano"), eos_probability=eos_probability)))
    answers.core.inbox.put(message)
    answers.run_until_idle()
    return answers.tokens[message.request_id], answers.finish[message.request_id]


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic(make_config: MakeConfig, make_message: MakeMessage, seed: int) -> None:
    rng = random.Random(seed)
    config = make_config(
        max_num_batched_tokens=rng.choice([3, 17, 128, 700, 4096]),
        max_num_seqs=rng.choice([1, 3, 16]),
        num_pages=rng.choice([5, 12, 64]),
        max_model_len=1100,
    )
    core = EngineCore(SimExecutor(config, preset("nano"), eos_probability=0.03), draw_seed=lambda: 11)
    answers = Answers(core)
    sent: dict[str, AddRequest] = {}
    aborted: set[str] = set()
    for _ in range(500):
        for _ in range(rng.choice([0, 0, 0, 0, 1, 2])):
            message = random_message(make_message, rng, f"r{len(sent)}")
            sent[message.request_id] = message
            core.inbox.put(message)
        if sent and rng.random() < 0.15:
            aborted.add(rng.choice(list(sent)))
            core.inbox.put(AbortRequest(request_id=rng.choice(sorted(aborted))))
        answers.step()
    answers.run_until_idle()
    assert set(answers.finish) == set(sent), "a request has no answer"
    assert {i for i, f in answers.finish.items() if f == "abort"} <= aborted
    for request_id in rng.sample(sorted(sent), min(25, len(sent))):
        if answers.finish[request_id] in ("stop", "length"):
            whole = (answers.tokens[request_id], answers.finish[request_id])
            assert whole == expected_tokens(sent[request_id], config, 0.03)
        elif answers.finish[request_id] == "abort":
            tokens, _ = expected_tokens(sent[request_id], config, 0.03)
            assert tokens[: len(answers.tokens[request_id])] == answers.tokens[request_id]


@pytest.mark.parametrize("batched_tokens", [1, 7, 128, 300, 1000, 5000])
def test_tokens_do_not_depend_on_budget_or_neighbours(
    make_config: MakeConfig, make_message: MakeMessage, batched_tokens: int
) -> None:
    message = make_message("watched", 700, max_tokens=20, seed=3)
    alone = expected_tokens(message, make_config(), 0.0)
    config = make_config(max_num_batched_tokens=batched_tokens)
    answers = Answers(EngineCore(SimExecutor(config, preset("nano"))))
    for i in range(5):
        answers.core.inbox.put(make_message(f"before{i}", 100 + i, max_tokens=3 + i, seed=i))
    answers.core.inbox.put(message)
    for i in range(5):
        answers.core.inbox.put(make_message(f"after{i}", 200 + i, max_tokens=3, seed=i))
    answers.run_until_idle()
    assert (answers.tokens["watched"], answers.finish["watched"]) == alone


def test_the_seed_matters_and_equal_requests_are_equal(make_config: MakeConfig, make_message: MakeMessage) -> None:
    answers = Answers(EngineCore(SimExecutor(make_config(), preset("nano"))))
    for request_id, seed in (("a", 1), ("b", 1), ("c", 2)):
        answers.core.inbox.put(make_message(request_id, 50, max_tokens=10, seed=seed))
    answers.run_until_idle()
    assert answers.tokens["a"] == answers.tokens["b"] != answers.tokens["c"]


@pytest.mark.parametrize("seed", range(3))
def test_random_failures_end_the_failed_only(make_config: MakeConfig, make_message: MakeMessage, seed: int) -> None:
    rng = random.Random(seed)
    config = make_config(max_num_batched_tokens=200, num_pages=30)
    doomed = {f"r{i}": "NaN logits" for i in rng.sample(range(60), 10)}
    steps: dict[int, Exception] = {i: StepError("out of memory") for i in rng.sample(range(1, 150), 8)}
    executor = SimExecutor(config, preset("nano"), faults=Faults(raise_in_step=steps, fail_requests=doomed))
    answers = Answers(EngineCore(executor))
    for i in range(60):
        answers.core.inbox.put(random_message(make_message, rng, f"r{i}"))
        answers.step()
    answers.run_until_idle()
    assert len(answers.finish) == 60
    assert all(answers.finish[i] == "error" for i in doomed)
    assert any(answers.finish[f"r{i}"] in ("stop", "length") for i in range(60))
