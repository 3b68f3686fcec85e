"""One request's life: a simulated engine behind the real client, and a hand-fed client for the rare turns."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.client import EngineDeadError, RequestOutput
from engine.clients import InProcessClient
from engine.config import EngineConfig
from engine.messages import EngineInfo, LogprobRow, RequestError, SamplingParams
from engine.runner.sim_executor import CostModel, Faults, SimExecutor, sim_config
from model.config import load_config
from server.generation import GenerationEvent, Generator
from server.text.stop import StopMatcher
from server.text.tokenizer import Tokenizer

PROMPT = [1000, 1001, 1002]


@pytest.fixture(scope="module")
def tokenizer(sim_model_dir: Path) -> Tokenizer:
    return Tokenizer.load(sim_model_dir, load_config(sim_model_dir).vocab_size)


Run = Callable[[InProcessClient], Awaitable[Any]]


@pytest.fixture
def with_engine(sim_model_dir: Path, tokenizer: Tokenizer) -> Callable[..., Any]:
    """with_engine(test, answer=...): runs `test(client)` and checks that the engine is empty after it."""

    def run(test: Run, *, answer: str = "", step_seconds: float = 0.0, faults: Faults | None = None) -> Any:
        ids = tokenizer.encode(answer, special=True)

        async def main() -> Any:
            model = load_config(sim_model_dir)
            config = EngineConfig(model_dir=str(sim_model_dir), simulate=True, max_model_len=2048)
            executor = SimExecutor(
                sim_config(config, model),
                model,
                script=lambda prompt: ids,
                sleep=step_seconds > 0,
                cost=CostModel(base_seconds=step_seconds),
                faults=faults,
            )
            client = InProcessClient(executor)
            try:
                result = await test(client)
                if client.dead_reason is None:
                    await settled(client)
                return result
            finally:
                await client.close()

        return asyncio.run(main())

    return run


async def settled(client: InProcessClient) -> None:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        stats, info = client.stats, client.info
        if (stats.num_free_pages, stats.num_free_slots) == (info.num_pages, info.num_slots):
            assert client.num_streams == 0
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"pages or slots are still held: {client.stats}")


async def collect(events: AsyncGenerator[GenerationEvent, None]) -> list[GenerationEvent]:
    async with aclosing(events):
        return [event async for event in events]


def joined(events: Sequence[GenerationEvent]) -> tuple[str, str]:
    assert [e.finish_reason is None for e in events] == [True] * (len(events) - 1) + [False]
    assert [e.usage is None for e in events] == [True] * (len(events) - 1) + [False]
    return "".join(e.reasoning for e in events), "".join(e.content for e in events)


def test_a_chat_answer(with_engine: Any, tokenizer: Tokenizer) -> None:
    async def test(client: InProcessClient) -> list[GenerationEvent]:
        generator = Generator(client, tokenizer)
        return await collect(generator.start(PROMPT, SamplingParams(max_tokens=100), starts_in="reasoning"))

    events = with_engine(test, answer="\nwhy 😀\n\n</think>\n\nBecause é.\n")
    assert joined(events) == ("why 😀", "Because é.\n")
    last = events[-1]
    assert (last.finish_reason, last.stop_reason, last.error) == ("stop", None, None)
    assert last.usage is not None
    assert last.usage.prompt_tokens == 3
    # Bytes are tokens here; `</think>` and the end of sequence token are no reasoning.
    assert last.usage.reasoning_tokens == len("\nwhy 😀\n\n".encode())
    assert last.usage.completion_tokens == sum(len(e.token_ids) for e in events) == 11 + 1 + 14 + 1


def test_a_raw_completion_keeps_everything(with_engine: Any, tokenizer: Tokenizer) -> None:
    async def test(client: InProcessClient) -> list[GenerationEvent]:
        return await collect(Generator(client, tokenizer).start(PROMPT, SamplingParams(max_tokens=100), parse="raw"))

    assert joined(with_engine(test, answer="\na</think>\nb")) == ("", "\na</think>\nb")


def test_length_ends_it_in_the_middle_of_a_character(with_engine: Any, tokenizer: Tokenizer) -> None:
    async def test(client: InProcessClient) -> list[GenerationEvent]:
        return await collect(Generator(client, tokenizer).start(PROMPT, SamplingParams(max_tokens=3)))

    events = with_engine(test, answer="a😀b")
    assert joined(events) == ("", "a\ufffd")
    assert events[-1].finish_reason == "length"
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 3


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_it_and_frees_the_engine(with_engine: Any, tokenizer: Tokenizer, include: bool) -> None:
    async def test(client: InProcessClient) -> list[GenerationEvent]:
        generator = Generator(client, tokenizer)
        sampling = SamplingParams(max_tokens=2000, ignore_eos=True)
        return await collect(
            generator.start(PROMPT, sampling, starts_in="reasoning", stop=["STOP", "xyz"], include_stop=include)
        )

    events = with_engine(test, answer="STOP</think>one STO two STOP three" + "." * 1000)
    assert joined(events) == ("STOP", "one STO two " + ("STOP" if include else ""))
    last = events[-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", "STOP")
    assert last.usage is not None
    assert last.usage.completion_tokens == 4 + 1 + len("one STO two STOP")


def test_a_held_beginning_of_a_stop_comes_out_at_the_end(with_engine: Any, tokenizer: Tokenizer) -> None:
    async def test(client: InProcessClient) -> list[GenerationEvent]:
        return await collect(Generator(client, tokenizer).start(PROMPT, SamplingParams(max_tokens=50), stop=["STOP"]))

    events = with_engine(test, answer="abcSTO")
    assert joined(events) == ("", "abcSTO")
    assert events[-1].stop_reason is None


def test_stop_token_ids(with_engine: Any, tokenizer: Tokenizer) -> None:
    (bang,) = tokenizer.encode("!")

    def answer(include: bool) -> list[GenerationEvent]:
        async def test(client: InProcessClient) -> list[GenerationEvent]:
            sampling = SamplingParams(max_tokens=50, stop_token_ids=(bang,))
            return await collect(Generator(client, tokenizer).start(PROMPT, sampling, include_stop=include))

        return with_engine(test, answer="ab! c")

    assert joined(answer(False)) == ("", "ab")
    assert joined(answer(True)) == ("", "ab!")
    assert answer(False)[-1].stop_reason == bang


def test_stop_strings_wait_for_min_tokens(with_engine: Any, tokenizer: Tokenizer) -> None:
    async def test(client: InProcessClient) -> list[GenerationEvent]:
        sampling = SamplingParams(max_tokens=50, min_tokens=3)
        return await collect(Generator(client, tokenizer).start(PROMPT, sampling, stop=["b"]))

    assert joined(with_engine(test, answer="abcabc")) == ("", "abca")


def test_closing_early_aborts(with_engine: Any, tokenizer: Tokenizer) -> None:
    async def test(client: InProcessClient) -> None:
        events = Generator(client, tokenizer).start(PROMPT, SamplingParams(max_tokens=2000, ignore_eos=True))
        await anext(events)
        await events.aclose()
        await settled(client)
        # Cancelling the reader does the same.
        events = Generator(client, tokenizer).start(PROMPT, SamplingParams(max_tokens=2000, ignore_eos=True))
        task = asyncio.create_task(collect(events))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await settled(client)
        # Never started: nothing was submitted.
        await Generator(client, tokenizer).start(PROMPT, SamplingParams()).aclose()

    with_engine(test, answer="x" * 1000, step_seconds=0.002)


def test_many_at_once_do_not_mix(with_engine: Any, tokenizer: Tokenizer) -> None:
    async def test(client: InProcessClient) -> list[list[GenerationEvent]]:
        generator = Generator(client, tokenizer)
        starts = [generator.start([n], SamplingParams(max_tokens=40), stop=["5"] * (n % 2)) for n in range(1000, 1064)]
        return await asyncio.gather(*map(collect, starts))

    answers = [joined(events)[1] for events in with_engine(test, answer="0123456789")]
    assert answers == ["0123456789", "01234"] * 32


def test_a_request_that_cannot_fit_ends_with_an_error(with_engine: Any, tokenizer: Tokenizer) -> None:
    async def test(client: InProcessClient) -> list[GenerationEvent]:
        return await collect(Generator(client, tokenizer).start([7] * 5000, SamplingParams(max_tokens=10)))

    (event,) = with_engine(test)
    assert event.finish_reason == "error"
    assert event.error is not None
    assert event.error.code == "too_large"


def test_a_dying_engine_ends_every_answer(with_engine: Any, tokenizer: Tokenizer) -> None:
    async def test(client: InProcessClient) -> list[list[GenerationEvent]]:
        generator = Generator(client, tokenizer)
        sampling = SamplingParams(max_tokens=100, ignore_eos=True)
        first = await asyncio.gather(*[collect(generator.start([n], sampling)) for n in range(1000, 1004)])
        assert client.dead_reason is not None
        return [*first, await collect(generator.start(PROMPT, sampling))]

    for events in with_engine(test, answer="x" * 200, faults=Faults(raise_in_step={9: RuntimeError("secret cause")})):
        assert events[-1].finish_reason == "error"
        assert events[-1].error is not None
        assert events[-1].error.code == "internal"
        assert "secret" not in events[-1].error.message
        assert events[-1].usage is not None


class HandFed:
    """An engine client that says what it is told to."""

    def __init__(self, outputs: Sequence[RequestOutput], then: Exception | None = None) -> None:
        self.outputs, self.then, self.aborted = outputs, then, False
        self.info = EngineInfo(
            protocol_version=1,
            model_dir="",
            vocab_size=2048,
            max_model_len=2048,
            eos_token_id=1,
            page_tokens=256,
            num_pages=1,
            num_slots=1,
            kv_bytes_per_page=1,
            dtype="",
            kv_cache_dtype="",
            numerics="",
            pid=0,
        )

    async def submit(self, request: Any) -> AsyncGenerator[RequestOutput, None]:
        try:
            for output in self.outputs:
                yield output
            if self.then is not None:
                raise self.then
        except GeneratorExit:
            self.aborted = True
            raise

    def answer(self, tokenizer: Tokenizer, sampling: SamplingParams, **more: Any) -> list[GenerationEvent]:
        return asyncio.run(collect(Generator(self, tokenizer).start(PROMPT, sampling, **more)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("outputs", "then", "code"),
    [
        ([], None, "internal"),
        ([], EngineDeadError("why"), "internal"),
        ([RequestOutput(token_ids=(5,), finish_reason="abort")], None, "internal"),
        (
            [RequestOutput(token_ids=(), finish_reason="error", error=RequestError("deadline_exceeded", "late"))],
            None,
            "deadline_exceeded",
        ),
    ],
)
def test_every_end_is_an_event(tokenizer: Tokenizer, outputs: Any, then: Any, code: str) -> None:
    last = HandFed(outputs, then).answer(tokenizer, SamplingParams())[-1]
    assert last.finish_reason == "error"
    assert last.error is not None
    assert last.error.code == code


def rows(ids: Sequence[int]) -> tuple[LogprobRow, ...]:
    return tuple(LogprobRow(-0.25 * (n + 1), (token_id, 5), (-0.25, float("-inf"))) for n, token_id in enumerate(ids))


TEXT = st.text("ab\n😀é</think>", max_size=12).map(lambda text: ("ids", text))
PIECES = st.lists(TEXT | st.sampled_from([("special", "</think>"), ("special", "｜DSML｜")]), max_size=4)


@given(
    pieces=PIECES,
    cuts=st.lists(st.integers(1, 5), max_size=40),
    stops=st.lists(st.text("ab\né", min_size=1, max_size=3), max_size=2),
    starts_in=st.sampled_from(["reasoning", "content"]),
    include=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_however_the_engine_cuts_its_outputs(
    sim_model_dir: Path, pieces: Any, cuts: list[int], stops: list[str], starts_in: Any, include: bool
) -> None:
    tokenizer = tokenizer_of(sim_model_dir)
    ids = [i for kind, text in pieces for i in tokenizer.encode(text, special=kind == "special")]
    more = {"starts_in": starts_in, "stop": stops, "include_stop": include}

    def outputs(cuts: list[int], logprobs: bool) -> list[RequestOutput]:
        made, start = [], 0
        for cut in [*cuts, len(ids) + 1]:
            part = tuple(ids[start : start + cut])
            if part:
                made.append(RequestOutput(token_ids=part, logprobs=rows(part) if logprobs else None))
            start += cut
        return [*made, RequestOutput(token_ids=(1,), finish_reason="stop", stop_token_id=1, logprobs=rows([1]))]

    one_by_one = HandFed(outputs([1] * len(ids), True)).answer(tokenizer, SamplingParams(logprobs=2), **more)
    expected = joined(one_by_one)
    for logprobs in (False, True):
        sampling = SamplingParams(logprobs=2 if logprobs else None)
        events = HandFed(outputs(cuts, logprobs)).answer(tokenizer, sampling, **more)
        assert joined(events) == expected
        assert (events[-1].usage, events[-1].stop_reason) == (one_by_one[-1].usage, one_by_one[-1].stop_reason)
    matcher = StopMatcher(stops)
    plain = joined(HandFed(outputs([1] * len(ids), False)).answer(tokenizer, SamplingParams(), starts_in=starts_in))
    shown = matcher.push(plain[1])
    shown += matcher.flush() if matcher.matched is None else matcher.matched if include else ""
    assert expected == (plain[0], shown)
    check_logprobs(one_by_one)


def check_logprobs(events: Sequence[GenerationEvent]) -> None:
    """Every token's own bytes begin where its offset says, and none comes before its text or stands for lost text."""
    for reasoning in (True, False):
        text, tokens = "", []
        for event in events:
            text += event.reasoning if reasoning else event.content
            tokens += [t for t in event.logprobs if t.reasoning == reasoning]
            if not reasoning and event.finish_reason is None:
                assert all(token.text_offset < len(text) for token in tokens)
        offsets = [token.text_offset for token in tokens]
        assert offsets == sorted(offsets)
        # Newlines at the edges of a part may be dropped; their tokens are still told.
        assert b"".join(token.bytes for token in tokens).decode().strip("\n") == text.strip("\n")


_LOADED: dict[Path, Tokenizer] = {}


def tokenizer_of(model_dir: Path) -> Tokenizer:
    if model_dir not in _LOADED:
        _LOADED[model_dir] = Tokenizer.load(model_dir, load_config(model_dir).vocab_size)
    return _LOADED[model_dir]


def test_logprobs_follow_the_visible_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("why</think>é ST", special=True) + tokenizer.encode("OP!")
    outputs = [RequestOutput(token_ids=(i,), logprobs=rows([i])) for i in ids]
    client = HandFed(outputs)
    events = client.answer(tokenizer, SamplingParams(logprobs=2), starts_in="reasoning", stop=["STOP"])
    assert client.aborted
    tokens = [token for event in events for token in event.logprobs]
    assert [(t.reasoning, t.bytes, t.text_offset) for t in tokens] == [
        (True, b"w", 0),
        (True, b"h", 1),
        (True, b"y", 2),
        (False, b"\xc3", 0),
        (False, b"\xa9", 0),
        (False, b" ", 1),
    ]
    assert tokens[3].token == "\ufffd"
    assert (tokens[0].logprob, tokens[0].top[1].logprob, tokens[0].top[1].token_id) == (-0.25, -9999.0, 5)
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == len(ids) - 1


def test_usage_counts_cached_tokens(tokenizer: Tokenizer) -> None:
    outputs = [
        RequestOutput(token_ids=(300,), cached_tokens=256, queued_seconds=0.5),
        RequestOutput(token_ids=(1,), finish_reason="stop", stop_token_id=1),
    ]
    events = HandFed(outputs).answer(tokenizer, SamplingParams())
    assert events[0].queued_seconds == 0.5
    assert events[-1].usage is not None
    assert events[-1].usage.cached_tokens == 256


def test_the_cost_of_a_token(tokenizer: Tokenizer) -> None:
    """Prints microseconds for each token; the bound is loose because the machine is shared."""
    ids = [*tokenizer.encode("some words, and more of them\n"), *tokenizer.encode("é😀")] * 300
    outputs = [RequestOutput(token_ids=(i,)) for i in ids]
    for name, more in {"plain": {}, "16 stops": {"stop": [f"<|stop {n}|>" for n in range(16)]}}.items():
        best = 1e9
        for _ in range(3):
            start = time.process_time()
            HandFed(outputs).answer(tokenizer, SamplingParams(max_tokens=10**6), **more)
            best = min(best, time.process_time() - start)
        print(f"{name}: {best / len(ids) * 1e6:.1f} us/token")
        assert best / len(ids) < 100e-6
