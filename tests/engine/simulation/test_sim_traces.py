"""Trace readers on rows of each form, texts, and the bound of hits against a brute-force cache."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.simulation.traces import TraceError, blocks, read_trace
from engine.simulation.workload import (
    PrefixHistory,
    SimRequest,
    Text,
    Trace,
    hit_rate_bound,
    merge,
    reusable_tokens,
    seed_of,
)

VOCAB = 129280


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def shared(a: np.ndarray, b: np.ndarray) -> int:
    """Leading tokens that two arrays have in common."""
    count = min(len(a), len(b))
    different = np.flatnonzero(a[:count] != b[:count])
    return int(different[0]) if len(different) else count


def test_mooncake_rows(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1200, "output_length": 52, "hash_ids": [0, 1, 2]},
        {"timestamp": 105, "input_length": 1800, "output_length": 26, "hash_ids": [0, 3, 4, 5]},
        {"timestamp": 274.5, "input_length": 1300, "output_length": 52, "hash_ids": [0, 1, 6]},
        {"created_time": 300, "input_tokens": 700, "output_tokens": 0},
    ]
    trace = read_trace(write(tmp_path / "mooncake.jsonl", rows))
    assert [r.arrival for r in trace.requests] == [0.0, 0.105, 0.2745, 0.3]
    assert [r.prompt.num_tokens for r in trace.requests] == [1200, 1800, 1300, 700]
    assert [r.answer.num_tokens for r in trace.requests] == [52, 26, 52, 1]
    tokens = [r.prompt.tokens(VOCAB) for r in trace.requests]
    assert shared(tokens[0], tokens[1]) == 512 and shared(tokens[0], tokens[2]) == 1024
    assert shared(tokens[0], tokens[3]) == 0
    assert reusable_tokens(trace) == {"r0": 0, "r1": 512, "r2": 1024, "r3": 0}
    assert hit_rate_bound(trace) == (512 + 1024) / 5000
    assert len(read_trace(tmp_path / "mooncake.jsonl", max_requests=2).requests) == 2


def test_sessions_grow_by_their_own_answers(tmp_path: Path) -> None:
    rows = [
        {"session_id": "s", "input_length": 1536, "output_length": 320, "hash_ids": [0, 1, 2], "timestamp": 2000.0},
        {"session_id": "t", "input_length": 600, "output_length": 10, "hash_ids": [0, 9]},
        {"session_id": "s", "input_length": 768, "output_length": 180, "hash_ids": [1000, 1001], "delay": 2450.0},
    ]
    first, other, second = read_trace(write(tmp_path / "sessions.jsonl", rows)).requests
    assert second.after == (first.request_id,) and second.delay == 2.45 and not other.after
    assert second.prompt.num_tokens == 1536 + 320 + 768
    conversation = np.concatenate([first.prompt.tokens(VOCAB), first.answer.tokens(VOCAB)])
    assert shared(second.prompt.tokens(VOCAB), conversation) == 1536 + 320
    assert shared(other.prompt.tokens(VOCAB), conversation) == 512
    assert (first.kind, second.kind, other.kind) == ("first turn", "later turn", "first turn")


def test_session_rows_that_hold_whole_prompts(tmp_path: Path) -> None:
    mode = {"session_id": "s", "output_length": 5, "context_mode": "message_array_with_responses"}
    rows = [
        {**mode, "input_length": 512, "hash_ids": [0]},
        {**mode, "input_length": 1024, "hash_ids": [0, 1], "delay": 10},
    ]
    _, second = read_trace(write(tmp_path / "whole.jsonl", rows)).requests
    assert second.prompt.num_tokens == 1024 and second.after == ("r0",)


def agent_session(name: str = "x") -> dict[str, Any]:
    call = {"type": "n", "model": "m", "stop": "tool_use"}
    inner = {"type": "s", "model": "h"}
    return {
        "id": name,
        "models": ["m", "h"],
        "block_size": 64,
        "hash_id_scope": "local",
        "requests": [
            {**call, "t": 0.0, "in": 130, "out": 20, "hash_ids": [0, 1, 2], "api_time": 3.0},
            {
                "type": "subagent",
                "t": 4.0,
                "agent_id": "agent_001",
                "subagent_type": "Explore",
                "status": "completed",
                "models": ["h"],
                "requests": [
                    {**inner, "t": 0.0, "in": 64, "out": 8, "hash_ids": [7], "api_time": 1.0},
                    {**inner, "t": 1.5, "in": 128, "out": 8, "hash_ids": [7, 8], "think_time": 0.25},
                ],
            },
            {**call, "t": 20.0, "in": 192, "out": 30, "hash_ids": [0, 1, 9], "think_time": 2.0},
            {**call, "t": 30.0, "in": 256, "out": 30, "hash_ids": [0, 1, 9, 10], "api_time": 2.0},
        ],
    }


def test_agent_sessions_with_subagents(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(agent_session()), encoding="utf-8")
    first, inner, last_inner, second, third = read_trace(path).requests
    assert [r.kind for r in (first, inner, last_inner, second)] == ["agent", "subagent", "subagent", "agent"]
    assert inner.after == (first.request_id,) and inner.delay == 1.0
    assert last_inner.after == (inner.request_id,) and last_inner.delay == 0.25
    # The parent goes on when both have ended.
    assert set(second.after) == {first.request_id, last_inner.request_id} and second.delay == 2.0
    assert third.after == (second.request_id,) and third.delay == 10.0
    assert shared(first.prompt.tokens(VOCAB), second.prompt.tokens(VOCAB)) == 128


def test_a_folder_of_agent_sessions_keeps_their_ids_apart(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [agent_session("x"), agent_session("y")])
    (tmp_path / "b.json").write_text(json.dumps(agent_session("z")), encoding="utf-8")
    trace = read_trace(tmp_path, stagger=10.0)
    assert len(trace.requests) == 15
    starts = [r for r in trace.requests if not r.after]
    assert [r.arrival for r in starts] == [0.0, 10.0, 20.0]
    tokens = [r.prompt.tokens(VOCAB) for r in starts]
    assert shared(tokens[0], tokens[1]) == shared(tokens[1], tokens[2]) == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [], "output_length": 5}, "line 1: expected input_length"),
        ({"input_length": "many", "output_length": 5}, "input_length: expected a whole number from 1"),
        ({"input_length": 0, "output_length": 5}, "input_length"),
        ({"input_length": 5}, "output_length: expected a whole number from 0 on, found None"),
        ({"input_length": 5, "output_length": 5, "hash_ids": "abc"}, "hash_ids"),
        ({"input_length": 5, "output_length": 5, "timestamp": "noon"}, "timestamp: expected a number"),
        ({"requests": [{"type": "n", "in": 5}], "block_size": 64}, "out: expected"),
        ({"requests": [7], "block_size": 64}, "expected objects"),
        ([1, 2], "expected a JSON object"),
    ],
)
def test_rows_that_cannot_be_read_are_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        read_trace(write(tmp_path / "bad.jsonl", [row]))


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"input_length": 1, "output_length": 1}\n{oops\n', encoding="utf-8")
    with pytest.raises(TraceError, match="line 2: not JSON"):
        read_trace(path)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(TraceError, match="no request"):
        read_trace(path)
    with pytest.raises(OSError):
        read_trace(tmp_path / "absent.jsonl")


def test_blocks_are_cut_and_filled() -> None:
    assert list(blocks(655, [46, 47], block_tokens=512, namespace="", own="r").lengths) == [512, 143]
    assert list(blocks(700, [46], block_tokens=512, namespace="", own="r").lengths) == [512, 188]
    assert list(blocks(512, [46, 47, 48], block_tokens=512, namespace="", own="r").lengths) == [512]
    assert list(blocks(5, [], block_tokens=512, namespace="", own="r").lengths) == [5]


texts = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=5).map(
    lambda parts: Text([seed_of(p[0]) for p in parts], [p[1] for p in parts])
)


@settings(max_examples=200, deadline=None)
@given(known=st.lists(texts, max_size=6), asked=texts)
def test_the_history_matches_like_a_cache_of_tokens(known: list[Text], asked: Text) -> None:
    """Brute force over token arrays. Segments that differ share no first token here."""
    history = PrefixHistory()
    for text in known:
        history.add(text)
    tokens = asked.tokens(VOCAB)
    best = max((shared(tokens, text.tokens(VOCAB)) for text in known), default=0)
    found = history.match(asked)
    # The same tokens cut into segments differently may be missed, never invented.
    assert found <= best
    cuts = {tuple(text.segments()) for text in known}
    if tuple(asked.segments()) in cuts:
        assert found == asked.num_tokens == best


def test_history_finds_parts_of_a_segment() -> None:
    history = PrefixHistory()
    history.add(Text([1, 2], [10, 100]))
    assert history.match(Text([1, 2, 3], [10, 40, 7])) == 50
    assert history.match(Text([1, 2, 3], [10, 100, 7])) == 110
    assert history.match(Text([1, 2], [10, 500])) == 110
    assert history.match(Text([2], [5])) == 0
    assert history.match(Text([1, 2], [9, 5])) == 9


@settings(max_examples=100, deadline=None)
@given(a=texts, b=texts)
def test_tokens_after_a_known_text_are_the_same_tokens(a: Text, b: Text) -> None:
    assert np.array_equal(b.tokens_after(VOCAB, (a, a.tokens(VOCAB))), b.tokens(VOCAB))
    longer = a + b
    assert np.array_equal(longer.tokens_after(VOCAB, (a, a.tokens(VOCAB))), longer.tokens(VOCAB))
    assert np.array_equal(a.tokens_after(VOCAB, None), a.tokens(VOCAB))


def test_tokens_are_in_the_vocabulary_and_well_spread() -> None:
    tokens = Text([seed_of("a")], [100_000]).tokens(2048)
    assert tokens.dtype == np.int32 and tokens.min() == 2 and tokens.max() == 2047
    counts = np.bincount(tokens, minlength=2048)[2:]
    assert counts.min() > 10 and counts.max() < 110


def test_a_million_tokens_take_milliseconds() -> None:
    text = Text([seed_of(i) for i in range(2000)], [512] * 2000)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        text.tokens(VOCAB)
        times.append(time.perf_counter() - start)
    assert np.median(times) < 0.25


def one(name: str, *, after: tuple[str, ...] = ()) -> SimRequest:
    text = Text([seed_of(name)], [4])
    return SimRequest(request_id=name, prompt=text, answer=text, kind="k", after=after)


def test_traces_are_checked_and_merged() -> None:
    with pytest.raises(AssertionError, match="twice"):
        Trace(name="t", requests=(one("a"), one("a")))
    with pytest.raises(AssertionError, match="comes later"):
        Trace(name="t", requests=(one("a", after=("b",)), one("b")))
    first, second = Trace(name="p", requests=(one("a"), one("b", after=("a",)))), Trace(name="q", requests=(one("a"),))
    assert [(r.request_id, r.after) for r in merge("m", first, second).requests] == [
        ("p/a", ()),
        ("p/b", ("p/a",)),
        ("q/a", ()),
    ]
    assert [r.request_id for r in merge("m", first, Trace(name="q", requests=(one("c"),))).requests] == ["a", "b", "c"]
