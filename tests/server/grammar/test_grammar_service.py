"""The processes that check grammars: remembered answers, deadlines, bounds on memory, and a new one for a dead one."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from server.errors import ApiError
from server.grammar.messages import GrammarJob, ToolSpec
from server.grammar.service import MOST_JOB_BYTES, GrammarService

MakeService = Callable[..., AbstractAsyncContextManager[GrammarService]]
COLOUR = GrammarJob(format="choice", value=["red", "green"], format_param="guided_choice")


@pytest.fixture
def make_service(grammar_model: Path) -> MakeService:
    @asynccontextmanager
    async def make(**options: Any) -> AsyncIterator[GrammarService]:
        options.setdefault("num_workers", 1)
        service = GrammarService(str(grammar_model), vocab_size=512, eos_token_id=1, **options)
        try:
            yield service
        finally:
            await service.close()

    return make


def nested(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def test_an_answer_is_written_once(make_service: MakeService) -> None:
    async def run() -> None:
        async with make_service() as service:
            first, second = await asyncio.gather(service.write(COLOUR), service.write(COLOUR))
            assert first.text == second.text and "green" in first.text
            used = service.used_bytes
            began = time.monotonic()
            assert (await service.write(COLOUR)).text == first.text
            assert time.monotonic() - began < 0.05 and service.used_bytes == used > 0

    asyncio.run(run())


def test_a_refusal_names_field_and_keyword(make_service: MakeService) -> None:
    async def run() -> None:
        async with make_service() as service:
            schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
            job = GrammarJob(format="json_schema", value=schema, format_param="response_format.json_schema.schema")
            for _ in range(2):
                with pytest.raises(ApiError) as caught:
                    await service.write(job)
                assert caught.value.status == 400
                assert caught.value.param == "response_format.json_schema.schema"
                assert "`uniqueItems` at #/properties/a" in caught.value.message

    asyncio.run(run())


def test_what_takes_too_long_costs_the_process_its_life_and_nobody_else(make_service: MakeService) -> None:
    async def run() -> None:
        async with make_service(deadline_seconds=1e-4) as service:
            with pytest.raises(ApiError) as caught:
                await service.write(COLOUR)
            assert caught.value.status == 400 and "takes longer than" in caught.value.message
            assert service.num_killed == 1
            # Another process took its place; the next job has the usual time.
            service._deadline_seconds = 10.0
            assert "blue" in (await service.write(GrammarJob(format="choice", value=["blue"], format_param="x"))).text
            # The one that took too long is not tried again.
            with pytest.raises(ApiError):
                await service.write(COLOUR)
            assert service.num_killed == 1

    asyncio.run(run())


def test_a_process_that_gets_no_processor_proves_nothing_about_the_grammar(make_service: MakeService) -> None:
    async def run() -> None:
        async with make_service() as service:
            await service.write(COLOUR)
            (worker,) = service._idle._queue  # type: ignore[attr-defined]
            os.kill(worker.process.pid, signal.SIGSTOP)
            service._deadline_seconds = 0.01
            blue = GrammarJob(format="choice", value=["blue"], format_param="x")
            with pytest.raises(ApiError) as caught:
                await service.write(blue)
            assert caught.value.status == 503 and "too busy" in caught.value.message
            # Nothing is remembered of it.
            service._deadline_seconds = 10.0
            assert "blue" in (await service.write(blue)).text

    asyncio.run(run())


def test_what_takes_too_much_memory_is_refused(make_service: MakeService) -> None:
    job = GrammarJob(format="choice", value=[f"{n:0100}" for n in range(9000)], format_param="guided_choice")

    async def run() -> None:
        async with make_service(memory_bytes=2 << 20, deadline_seconds=20.0) as service:
            with pytest.raises(ApiError) as caught:
                await service.write(job)
            assert caught.value.status == 400
            assert "MiB" in caught.value.message or "too large" in caught.value.message
            assert "red" in (await service.write(COLOUR)).text

    asyncio.run(run())


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (nested(80), "levels of schemas"),
        ({"enum": ["x" * MOST_JOB_BYTES]}, "bytes; at most"),
        ({"$ref": "#"}, "nsatisfiable"),
        ({"type": "object", "required": ["a"], "properties": {"a": False}}, "nsatisfiable"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "`x-guidance`"),
        ({"type": "string", "nullable": True}, "`nullable`"),
        ({"items": [{}]}, "`prefixItems`"),
        ([], "an object or a boolean"),
    ],
)
def test_schemas_that_cannot_be_kept(make_service: MakeService, value: Any, why: str) -> None:
    async def run() -> None:
        async with make_service() as service:
            with pytest.raises(ApiError) as caught:
                await service.write(GrammarJob(format="json_schema", value=value, format_param="schema"))
            assert caught.value.status == 400 and why in caught.value.message and len(caught.value.message) < 800

    asyncio.run(run())


def test_the_cache_is_bounded_by_bytes(make_service: MakeService) -> None:
    async def run() -> None:
        async with make_service(cache_bytes=4000) as service:
            for n in range(12):
                await service.write(GrammarJob(format="choice", value=[f"{n}" * 200], format_param="x"))
            assert 0 < service.used_bytes <= 4000

    asyncio.run(run())


def test_a_client_that_leaves_does_not_take_the_answer_with_it(make_service: MakeService) -> None:
    async def run() -> None:
        async with make_service() as service:
            leaving = asyncio.create_task(service.write(COLOUR))
            staying = asyncio.create_task(service.write(COLOUR))
            await asyncio.sleep(0)
            leaving.cancel()
            assert "red" in (await staying).text
            with pytest.raises(asyncio.CancelledError):
                await leaving

    asyncio.run(run())


def test_a_model_without_a_tokenizer_is_a_server_error(tmp_path: Path) -> None:
    async def run() -> None:
        service = GrammarService(str(tmp_path), vocab_size=512, eos_token_id=1, num_workers=1)
        with pytest.raises(ApiError) as caught:
            await service.write(COLOUR)
        assert caught.value.status == 500
        await service.close()

    asyncio.run(run())


def test_tools_that_are_not_strict_are_counted(make_service: MakeService) -> None:
    async def run() -> None:
        async with make_service() as service:
            loose = ToolSpec(name="f", parameters={"type": "object", "properties": {"a": {"not": {}}}})
            written = await service.write(GrammarJob(tools=(loose,), calls="auto", marker=282))
            assert written.left_out == ("f: #/properties/a/not",) and service.num_left_out == 1

    asyncio.run(run())
