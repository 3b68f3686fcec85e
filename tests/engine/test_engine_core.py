"""One core without a process: what it hears, what it answers, and how it dies."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from engine.config import ResolvedConfig
from engine.core import EngineCore
from engine.executor import StepError
from engine.messages import (
    AbortRequest,
    AddRequest,
    EngineDead,
    EngineInfo,
    FromEngine,
    Heartbeat,
    Ping,
    Shutdown,
    StepOutputs,
    decode_from_engine,
    encode,
)
from engine.outputs import split
from engine.runner.sim_executor import Faults, SimExecutor
from model.presets import preset

MakeMessage = Callable[..., AddRequest]


@pytest.fixture
def make_core(make_config: Callable[..., ResolvedConfig]) -> Callable[..., EngineCore]:
    def make(faults: Faults | None = None, **options: Any) -> EngineCore:
        return EngineCore(SimExecutor(make_config(), preset("nano"), faults=faults, **options), draw_seed=lambda: 99)

    return make


def ends(core: EngineCore) -> dict[str, str]:
    """Step until idle; how each request ended."""
    found: dict[str, str] = {}
    core.step()
    while core.scheduler.has_work:
        core.step()
    for frame in core.outbox:
        assert isinstance(frame, StepOutputs)
        found |= {i: o.finish_reason for i, o in split(frame) if o.finish_reason is not None}
    core.scheduler.check()
    return found


def test_an_invalid_request_is_answered_and_harms_nobody(
    make_core: Callable[..., EngineCore], make_message: MakeMessage
) -> None:
    core = make_core()
    core.inbox.put(make_message("good", 5, max_tokens=3))
    core.inbox.put(make_message("bad", [5000]))
    core.inbox.put(make_message("empty", []))
    core.step()
    errors = {i: o.error for f in core.outbox if isinstance(f, StepOutputs) for i, o in split(f) if o.error}
    assert errors["bad"] is not None and "0..2047" in errors["bad"].message
    assert ends(core) == {"good": "length", "bad": "error", "empty": "error"}


def test_the_same_id_twice_is_one_request(make_core: Callable[..., EngineCore], make_message: MakeMessage) -> None:
    core = make_core()
    core.inbox.put(make_message("a", 5, max_tokens=3))
    core.inbox.put(make_message("a", 9, max_tokens=7))
    assert ends(core) == {"a": "length"}
    assert core.scheduler.totals.generation_tokens == 3


def test_an_abort_before_its_request_is_planned(
    make_core: Callable[..., EngineCore], make_message: MakeMessage
) -> None:
    core = make_core()
    core.inbox.put(AbortRequest(request_id="a"))
    core.inbox.put(make_message("a", 5))
    core.inbox.put(AbortRequest(request_id="a"))
    assert ends(core) == {"a": "abort"}
    assert core.scheduler.totals.step_id == 0, "nothing was ever run"


def test_a_step_error_ends_its_requests_and_the_engine_goes_on(
    make_core: Callable[..., EngineCore], make_message: MakeMessage
) -> None:
    core = make_core(Faults(raise_in_step={2: StepError("out of memory")}))
    core.inbox.put(make_message("a", 5, max_tokens=9))
    core.step()
    core.inbox.put(make_message("b", 5, max_tokens=9))
    core.step()
    core.inbox.put(make_message("c", 5, max_tokens=2))
    assert ends(core) == {"a": "error", "b": "error", "c": "length"}
    assert core.scheduler.kv.num_free_slots == 8


def test_any_other_exception_ends_the_engine_and_says_why(
    make_core: Callable[..., EngineCore], make_message: MakeMessage
) -> None:
    core = make_core(Faults(raise_in_step={3: RuntimeError("illegal address")}))
    frames: list[FromEngine] = []
    core.inbox.put(make_message("a", 5, max_tokens=9))
    assert core.run(frames.append) is False
    assert isinstance(frames[0], EngineInfo)
    assert frames[-1] == EngineDead(reason="RuntimeError: illegal address")


def test_a_broken_link_ends_the_engine(make_core: Callable[..., EngineCore]) -> None:
    core = make_core()
    frames: list[FromEngine] = []
    core.inbox.put(RuntimeError("the engine's input has ended"))
    assert core.run(frames.append) is False
    assert frames[-1] == EngineDead(reason="RuntimeError: the engine's input has ended")


def test_an_idle_engine_beats_answers_and_leaves(make_core: Callable[..., EngineCore]) -> None:
    core = make_core()
    frames: list[FromEngine] = []
    beat = threading.Event()

    def send(frame: FromEngine) -> None:
        frames.append(frame)
        if isinstance(frame, Heartbeat):
            beat.set()

    thread = threading.Thread(target=core.run, args=(send,))
    thread.start()
    assert beat.wait(1.0), "no heartbeat within a second"
    beat.clear()
    core.inbox.put(Ping(nonce=17))
    assert beat.wait(0.4)
    core.inbox.put(Shutdown())
    thread.join(1.0)
    assert not thread.is_alive()
    assert [f.nonce for f in frames if isinstance(f, Heartbeat)][-1] == 17


def test_the_engine_draws_a_seed_when_there_is_none(
    make_core: Callable[..., EngineCore], make_message: MakeMessage
) -> None:
    core = make_core()
    core.inbox.put(make_message("drawn", 5, max_tokens=4, seed=None))
    core.inbox.put(make_message("given", 5, max_tokens=4, seed=99))
    core.step()
    frame = core.outbox[0]
    assert isinstance(frame, StepOutputs)
    drawn, given = (output.token_ids for _, output in split(frame))
    assert drawn == given


def test_output_frames_survive_the_wire(make_core: Callable[..., EngineCore], make_message: MakeMessage) -> None:
    core = make_core(eos_probability=0.3)
    for i in range(5):
        core.inbox.put(make_message(str(i), 5 + i, max_tokens=6, logprobs=3 if i % 2 else None))
    ends(core)
    for frame in core.outbox:
        assert isinstance(frame, StepOutputs)
        again = decode_from_engine(encode(frame))
        assert again == frame and list(split(again)) == list(split(frame))  # type: ignore[arg-type]
        for request_id, output in split(frame):
            assert (output.logprobs is not None) == (int(request_id) % 2 == 1)
            if output.logprobs is not None:
                assert len(output.logprobs) == len(output.token_ids) == 1 and len(output.logprobs[0].top_ids) == 3
