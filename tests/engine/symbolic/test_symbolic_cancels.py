"""Requests that are killed at any point of their lives: whatever they held comes back, to the last page and byte."""

import logging
import random
from collections import Counter

import numpy as np
import pytest
from symbolic.driver import Episode, Run
from symbolic.traffic import MODEL, AbortInFlight, Kind, Step, random_config

from engine.messages import AbortRequest, AddRequest, SamplingParams, pack_ids
from engine.request import RequestStatus

BATCH = 100
"""Kills in one engine; then it must be idle, and empty once its cache is dropped."""


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("engine").setLevel(logging.CRITICAL)


class Killer:
    """One engine in which hardly anybody lives to the end."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        kind: Kind = self.rng.choice(("plain", "crowded", "crowded", "storm", "full"))
        config = random_config(self.rng, kind)
        self.crowded = kind == "crowded"
        self.run = Run(Episode(seed=seed, config=config, ops=[]))
        self.draw = np.random.default_rng(seed)
        self.stem = self.ids(1400)
        self.killed: Counter[str] = Counter()
        self.sent = 0

    def ids(self, count: int) -> np.ndarray:
        return self.draw.integers(2, MODEL.vocab_size, count).astype(np.int32)

    def send(self, num_prompt: int | None = None, num_answer: int | None = None) -> str:
        rng = self.rng
        if num_prompt is None:
            num_prompt = (
                rng.randrange(100, 250) if self.crowded else rng.choice((255, 256, 600, rng.randrange(1, 1100)))
            )
        if num_answer is None:
            num_answer = 300 if self.crowded else rng.choice((1, 20, 140))
        prompt = np.concatenate([self.stem[:num_prompt], self.ids(rng.choice((1, 3, 40)))])
        self.sent += 1
        message = AddRequest(
            request_id=f"r{self.sent}",
            prompt_token_ids=pack_ids(prompt),
            sampling=SamplingParams(max_tokens=num_answer, seed=1, ignore_eos=True),
            priority=rng.choice((0, 0, 1)),
            snapshot_positions=pack_ids([rng.randrange(1, len(prompt) + 1)]),
        )
        self.run.do(message)
        return message.request_id

    def stage(self, request_id: str) -> str:
        request = self.run.scheduler.requests.get(request_id)
        if request is None:
            return "not heard of"
        if request.status is RequestStatus.QUEUED:
            return "preempted" if request.num_preemptions else "queued"
        if request.num_computed_tokens < request.num_prompt_tokens:
            return "prompt"
        return "answer"

    def kill(self, request_id: str) -> None:
        """Between two steps or while one is under way."""
        in_flight = self.rng.random() < 0.5
        self.killed[("in flight, " if in_flight else "") + self.stage(request_id)] += 1
        self.run.do(AbortInFlight(request_id) if in_flight else AbortRequest(request_id=request_id))

    def kill_many(self, count: int) -> Counter[str]:
        """Also how many were killed at which stage of their lives."""
        for _ in range(20 if self.crowded else 0):
            # So many short answers that memory is promised for no longer ones.
            self.send(2, 1)
            self.run.do(Step())
        living: list[str] = []
        while sum(self.killed.values()) < count:
            living = [r for r in living if r not in self.run.finish]
            while len(living) < self.run.episode.config.max_num_seqs + 1:
                living.append(self.send())
            for _ in range(self.rng.choice((0, 1, 2, 30 if self.crowded else 4))):
                self.run.do(Step())
            for request_id in self.rng.sample(living, self.rng.randrange(min(4, len(living)) + 1)):
                self.kill(request_id)
                living.remove(request_id)
        self.run.drain()
        return self.killed


def kill_in(seeds: range) -> Counter[str]:
    killed: Counter[str] = Counter()
    for seed in seeds:
        killed += Killer(seed).kill_many(BATCH)
    return killed


STAGES = {"not heard of", "queued", "preempted", "prompt", "answer"}


def test_nothing_is_left_of_the_killed() -> None:
    """A part of the 10,000."""
    killed = kill_in(range(16))
    assert sum(killed.values()) >= 1600
    assert STAGES | {f"in flight, {stage}" for stage in STAGES} == set(killed), killed


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_nothing_is_left_of_ten_thousand_killed() -> None:
    assert sum(kill_in(range(100)).values()) >= 10_000
