"""Requests with grammars in the engine's own loop, on the simulated executor."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.client import RequestOutput
from engine.config import ResolvedConfig
from engine.core import EngineCore
from engine.messages import AbortRequest, AddRequest, Grammar, StepOutputs
from engine.outputs import split
from engine.runner.sim_executor import SimExecutor
from model.presets import preset

EOS, FIRST_BYTE = 1, 3
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}, "c": {"const": 7}},
    "required": ["a", "b", "c"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
SMALL = Grammar(text=json.dumps({"grammars": [{"json_schema": SCHEMA}]}))


@pytest.fixture
def make_core(make_config: Callable[..., ResolvedConfig], byte_model: Path) -> Callable[..., EngineCore]:
    def make(script: Any = None, **changes: Any) -> EngineCore:
        config = replace(make_config(**changes), model_dir=str(byte_model))
        return EngineCore(SimExecutor(config, preset("nano"), script=script), draw_seed=lambda: 99)

    return make


@pytest.fixture
def ask(make_message: Callable[..., AddRequest]) -> Callable[..., AddRequest]:
    def make(request_id: str, grammar: Grammar | None = SMALL, prompt: Any = 8, **fields: Any) -> AddRequest:
        fields.setdefault("max_tokens", 200)
        return msgspec.structs.replace(make_message(request_id, prompt, **fields), grammar=grammar)

    return make


def run(core: EngineCore, *messages: Any, seconds: float = 20.0) -> dict[str, list[RequestOutput]]:
    """Step until every request has ended."""
    for message in messages:
        core.inbox.put(message)
    wanted = {m.request_id for m in messages}
    found: dict[str, list[RequestOutput]] = {request_id: [] for request_id in wanted}
    deadline = time.monotonic() + seconds
    while not all(rows and rows[-1].finish_reason for rows in found.values()):
        assert time.monotonic() < deadline, "requests without an end"
        core.step(0.01)
        core.scheduler.check()
        while core.outbox:
            frame = core.outbox.popleft()
            assert isinstance(frame, StepOutputs)
            for request_id, output in split(frame):
                found[request_id].append(output)
    return found


def text(outputs: list[RequestOutput]) -> str:
    tokens = [t for output in outputs for t in output.token_ids if t != EOS]
    return bytes(t - FIRST_BYTE for t in tokens).decode()


def test_an_answer_follows_its_grammar_and_ends_with_it(
    make_core: Callable[..., EngineCore], ask: Callable[..., AddRequest]
) -> None:
    core = make_core()
    requests = [ask(f"r{n}", seed=n) for n in range(6)]
    found = run(core, *requests, ask("free", None, max_tokens=40))
    for request in requests:
        outputs = found[request.request_id]
        assert outputs[-1].finish_reason == "stop" and outputs[-1].stop_token_id == EOS
        answer = json.loads(text(outputs))
        assert answer["a"] in ("x", "y") and answer["b"] in (True, False) and answer["c"] == 7
    assert found["free"][-1].finish_reason == "length"
    assert len({text(found[f"r{n}"]) for n in range(6)}) > 1
    assert len(core.scheduler.grammars) == 0 and core.scheduler.stats().num_grammars == 0


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 150}, {"ignore_eos": True, "min_tokens": 150}])
def test_a_grammar_that_has_ended_ends_the_answer(
    make_core: Callable[..., EngineCore], ask: Callable[..., AddRequest], fields: dict[str, Any]
) -> None:
    outputs = run(make_core(), ask("r", **fields))["r"]
    assert outputs[-1].finish_reason == "stop" and json.loads(text(outputs))["c"] == 7


def test_thinking_is_free_and_cannot_end_the_answer(
    make_core: Callable[..., EngineCore], ask: Callable[..., AddRequest], special_id: Callable[[str], int]
) -> None:
    after = special_id("</think>")
    core = make_core(script=lambda prompt: [FIRST_BYTE + 65, after, *(FIRST_BYTE + b for b in b"yes")])
    yes = Grammar(text='start: "yes" | "no"', after=after)
    found = run(core, ask("good", yes))
    assert found["good"][-1].finish_reason == "stop"
    core = make_core(script=lambda prompt: [FIRST_BYTE + 65])
    found = run(core, ask("ends in its thoughts", yes))
    assert found["ends in its thoughts"][-1].finish_reason == "error"


def test_a_bad_grammar_ends_its_own_request_only(
    make_core: Callable[..., EngineCore], ask: Callable[..., AddRequest]
) -> None:
    core = make_core()
    found = run(
        core,
        ask("syntax", Grammar(text="start: (((")),
        ask("marker", Grammar(text='start: "a"', after=10**6)),
        ask("good"),
        ask("free", None, max_tokens=5),
    )
    assert {i: rows[-1].finish_reason for i, rows in found.items()} == {
        "syntax": "error",
        "marker": "error",
        "good": "stop",
        "free": "length",
    }
    for name in ("syntax", "marker"):
        assert found[name][-1].error is not None and found[name][-1].error.code == "internal"


def test_an_answer_outside_its_grammar_is_an_error(
    make_core: Callable[..., EngineCore], ask: Callable[..., AddRequest]
) -> None:
    core = make_core(script=lambda prompt: [FIRST_BYTE + byte for byte in b'{"a":"z"}'])
    outputs = run(core, ask("r"))["r"]
    assert outputs[-1].finish_reason == "error" and outputs[-1].error is not None
    assert "grammar" in outputs[-1].error.message and "z" not in text(outputs)


def test_a_request_may_leave_while_its_grammar_is_compiled(
    make_core: Callable[..., EngineCore], ask: Callable[..., AddRequest]
) -> None:
    core = make_core()
    core.inbox.put(ask("gone"))
    core.inbox.put(AbortRequest(request_id="gone"))
    core.step()
    frame = core.outbox.popleft()
    assert isinstance(frame, StepOutputs)
    assert [(i, o.finish_reason) for i, o in split(frame)] == [("gone", "abort")]
    # The matcher that comes later belongs to nobody.
    assert run(core, ask("next"))["next"][-1].finish_reason == "stop"
    assert not core.scheduler.requests


def test_a_model_without_a_tokenizer_refuses_grammars(
    make_config: Callable[..., ResolvedConfig], ask: Callable[..., AddRequest], tmp_path: Path
) -> None:
    core = EngineCore(SimExecutor(replace(make_config(), model_dir=str(tmp_path)), preset("nano")))
    found = run(core, ask("r"), ask("free", None, max_tokens=3))
    assert found["r"][-1].error is not None and "tokenizer" in found["r"][-1].error.message
    assert found["free"][-1].finish_reason == "length"


def test_a_preempted_request_keeps_its_place_in_the_grammar(
    make_core: Callable[..., EngineCore], ask: Callable[..., AddRequest], make_config: Callable[..., ResolvedConfig]
) -> None:
    scheduling = replace(make_config().scheduling, output_quantile=0.01)
    grammar = Grammar(text="start: /[ab]{200}/ /[cd]{80}/")
    requests = [ask(f"r{n}", grammar, 8 + n, seed=n, max_tokens=400) for n in range(3)]
    core = make_core(num_pages=4, scheduling=scheduling)
    # Short answers are what the engine has seen, so it promises few pages and runs out of them.
    run(core, *(ask(f"short{n}", None, 4, max_tokens=2) for n in range(40)))
    crowded = run(core, *requests)
    assert core.scheduler.totals.num_preemptions > 0
    alone = {r.request_id: run(make_core(), r)[r.request_id] for r in requests}
    for request_id, outputs in crowded.items():
        assert outputs[-1].finish_reason == "stop"
        assert text(outputs) == text(alone[request_id]) and len(text(outputs)) == 280


def test_memory_of_grammars_is_counted(make_core: Callable[..., EngineCore], ask: Callable[..., AddRequest]) -> None:
    core = make_core()
    for n in range(3):
        core.inbox.put(ask(f"r{n}"))
    core.step()
    seen = []
    while core.scheduler.has_work or not seen:
        core.step(0.01)
        seen += [frame.stats for frame in core.outbox if isinstance(frame, StepOutputs)]
        core.outbox.clear()
    assert max(stats.num_grammars for stats in seen) == 3
    assert seen[-1].num_grammars == 0 and seen[0].grammar_bytes > seen[-1].grammar_bytes > 0
