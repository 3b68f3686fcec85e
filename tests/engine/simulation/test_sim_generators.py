"""Made-up traffic: seeded, of the promised shape, shared where it shall be."""

import inspect

import numpy as np
import pytest

from engine.simulation.generators import (
    GENERATORS,
    agent_sessions,
    agents_and_long,
    cancel_storm,
    chat_and_long,
    fan_out,
    interleaved_sessions,
)
from engine.simulation.workload import Trace, hit_rate_bound, reusable_tokens

MODEL_TOKENS = 1 << 20


def summary(trace: Trace) -> list[tuple[object, ...]]:
    return [
        (r.request_id, r.arrival, r.after, r.delay, r.cancel_after, tuple(r.prompt.segments()), r.answer.num_tokens)
        for r in trace.requests
    ]


SMALL = {"seconds": 300.0, "num_requests": 60, "num_sessions": 3}


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_seeds_decide_everything(name: str) -> None:
    generate = GENERATORS[name]
    given = {k: v for k, v in SMALL.items() if k in inspect.signature(generate).parameters}
    assert summary(generate(**given)) == summary(generate(**given))
    assert summary(generate(**given)) != summary(generate(**given, seed=1))
    trace = generate(**given)
    assert trace.requests and all(r.prompt.num_tokens + r.answer.num_tokens <= MODEL_TOKENS for r in trace.requests)


def test_chat_and_long() -> None:
    trace = chat_and_long(seconds=3600.0)
    chats = [r for r in trace.requests if r.kind == "chat"]
    longs = [r for r in trace.requests if r.kind == "long"]
    assert len(chats) == pytest.approx(1.6 * 3600, rel=0.05)
    assert np.mean([r.prompt.num_tokens for r in chats]) == pytest.approx(5000, rel=0.05)
    assert [r.arrival for r in longs] == [150.0 + 300.0 * i for i in range(12)]
    assert all(r.prompt.num_tokens == 1_000_000 for r in longs)
    assert hit_rate_bound(trace) == 0.0
    hits = reusable_tokens(chat_and_long(seconds=60.0, context_tokens=50_000, num_keys=4))
    assert [hits[f"chat{i}"] for i in range(8)] == [0] * 4 + [50_000] * 4


def test_agents_reuse_most_of_what_they_send() -> None:
    """Kv-and-scheduling 1.3: agents reuse some 95 % of their input."""
    trace = agent_sessions(seconds=800.0)
    assert 0.9 < hit_rate_bound(trace) < 0.99
    hits = reusable_tokens(trace)
    by_id = {r.request_id: r for r in trace.requests}
    for request in trace.requests:
        for before in request.after:
            assert hits[request.request_id] == by_id[before].conversation.num_tokens
    mixed = agents_and_long(seconds=900.0)
    assert {r.kind for r in mixed.requests} == {"agent first", "agent", "long"}


def test_interleaved_sessions_can_hit_all_but_what_is_new() -> None:
    trace = interleaved_sessions(num_sessions=3, turns=3, context_tokens=300_000, new_tokens=1000, answer=100)
    assert len(trace.requests) == 9
    hits = reusable_tokens(trace)
    later = [r for r in trace.requests if r.after]
    assert len(later) == 6 and all(r.prompt.num_tokens - hits[r.request_id] == 1000 for r in later)


def test_a_fan_out_shares_its_system_prompt() -> None:
    trace = fan_out(num_requests=100, system_tokens=30_000)
    hits = reusable_tokens(trace)
    assert hits["fan0"] == 0 and all(hits[f"fan{i}"] == 30_000 for i in range(1, 100))


def test_a_cancel_storm_cancels() -> None:
    trace = cancel_storm(num_requests=1000, cancelled=0.7, patience_seconds=2.0)
    patience = [r.cancel_after for r in trace.requests if r.cancel_after is not None]
    assert len(patience) == pytest.approx(700, rel=0.1) and np.mean(patience) == pytest.approx(2.0, rel=0.15)
