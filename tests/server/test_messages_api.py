"""/v1/messages over HTTP: whole and streamed, counted, and every error in Anthropic's shape."""

import asyncio
import json
from typing import Any

import pytest

from server.config import ServerConfig

ANSWER = "thought</think>Hello"
OFF = {"thinking": {"type": "disabled"}}


def events(text: str) -> list[dict[str, Any]]:
    """The parsed events; framing is checked on the way."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    found = []
    for block in blocks:
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


async def ask(server: Any, *, path: str = "/v1/messages", headers: Any = None, **fields: Any) -> Any:
    body = {"model": "sim", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}], **fields}
    return await server.post(path, body, headers=headers or {})


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages?beta=true", "/anthropic/v1/messages"])
def test_whole_and_streamed(serving: Any, path: str) -> None:
    async def main() -> None:
        async with serving(answer=ANSWER) as server:
            answer = await ask(server, path=path)
            assert answer.status_code == 200
            assert answer.headers["request-id"] == answer.headers["x-request-id"]
            body = answer.json()
            assert [block["type"] for block in body["content"]] == ["thinking", "text"]
            assert body["content"][0]["thinking"] == "thought"
            assert body["content"][1]["text"] == "Hello"
            assert (body["stop_reason"], body["role"], body["model"]) == ("end_turn", "assistant", "sim")
            found = events((await ask(server, path=path, stream=True)).text)
            kinds = [event["type"] for event in found if event["type"] != "content_block_delta"]
            assert kinds == [
                *("message_start", "ping", "content_block_start", "content_block_stop"),
                *("content_block_start", "content_block_stop", "message_delta", "message_stop"),
            ]
            deltas = [event["delta"] for event in found if event["type"] == "content_block_delta"]
            assert "".join(d.get("thinking", "") for d in deltas) == "thought"
            assert "".join(d.get("text", "") for d in deltas) == "Hello"
            assert found[-2]["usage"]["output_tokens"] == body["usage"]["output_tokens"]
            await server.idle()

    asyncio.run(main())


def test_counting_agrees_with_usage(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer=ANSWER) as server:
            fields: dict[str, Any] = {
                "system": "sys",
                "tools": [{"name": "f", "input_schema": {"type": "object", "properties": {}}}],
            }
            usage = (await ask(server, **fields)).json()["usage"]
            for path in ("/v1/messages/count_tokens", "/anthropic/v1/messages/count_tokens"):
                body = {"model": "sim", "messages": [{"role": "user", "content": "hi"}], **fields}
                counted = (await server.post(path, body)).json()
                assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
            again = (await ask(server, **fields)).json()["usage"]
            assert again["cache_read_input_tokens"] > 0
            assert again["input_tokens"] + again["cache_read_input_tokens"] == counted["input_tokens"]

    asyncio.run(main())


def test_render_shows_the_prompts(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer=ANSWER) as server:
            message = {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "system": "sys"}
            rendered = (await server.post("/v1/messages/render", message)).json()
            assert rendered["prompt"].endswith("sys<｜User｜>hi<｜Assistant｜><think>")
            counted = (await server.post("/v1/messages/count_tokens", message)).json()
            assert rendered["count"] == counted["input_tokens"]
            response = {"model": "sim", "input": "hi", "instructions": "sys"}
            for path in ("/v1/responses/render", "/render"):
                assert (await server.post(path, response)).json()["prompt"] == rendered["prompt"]

    asyncio.run(main())


def test_stops_and_limits(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="Hello END more", max_model_len=1024) as server:
            body = (await ask(server, stop_sequences=["END"], **OFF)).json()
            assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "END")
            assert body["content"] == [{"type": "text", "text": "Hello "}]
            body = (await ask(server, max_tokens=3, **OFF)).json()
            assert (body["stop_reason"], body["content"][0]["text"]) == ("max_tokens", "Hel")
            # A bound above the room is lowered.
            assert (await ask(server, max_tokens=32000, **OFF)).json()["stop_reason"] == "end_turn"

    asyncio.run(main())


def test_a_prefill_is_continued(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="\n is 4") as server:
            messages = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "It"}]
            body = (await ask(server, messages=messages, **OFF)).json()
            assert body["content"] == [{"type": "text", "text": "\n is 4"}], "only what continues, newlines included"

    asyncio.run(main())


def test_omitted_thinking(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer=ANSWER) as server:
            thinking = {"type": "adaptive", "display": "omitted"}
            first = (await ask(server, thinking=thinking)).json()
            assert first["content"][0]["thinking"] == ""
            found = events((await ask(server, thinking=thinking, stream=True)).text)
            deltas = [event["delta"]["type"] for event in found if event["type"] == "content_block_delta"]
            assert deltas[0] == "signature_delta" and "thinking_delta" not in deltas

    asyncio.run(main())


def test_anthropic_s_names_mean_the_model_that_is_served(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer=ANSWER) as server:
            body = (await ask(server, model="claude-opus-5")).json()
            assert body["model"] == "sim"

    asyncio.run(main())


def kind_of(answer: Any) -> str:
    body = answer.json()
    assert set(body) == {"type", "error"}
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    return body["error"]["type"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", ["/v1/messages", "/anthropic/v1/messages"])
def test_every_error_has_anthropic_s_shape(serving: Any, path: str) -> None:
    async def main() -> None:
        config = ServerConfig(body_limit=3000, max_requests_per_key=1)
        key = {"x-api-key": "a-long-secret"}
        async with serving(answer=ANSWER, keys=["a-long-secret"], config=config, max_model_len=1024) as server:
            assert (await ask(server, path=path, headers=key)).status_code == 200
            bearer = {"authorization": "Bearer a-long-secret", "anthropic-version": "2026-10-21"}
            assert (await ask(server, path=path, headers=bearer)).status_code == 200
            for answer, status, kind in (
                (await ask(server, path=path), 401, "authentication_error"),
                (await ask(server, path=path, headers=key, model="x"), 404, "not_found_error"),
                (await ask(server, path=path, headers=key, max_tokens=None), 400, "invalid_request_error"),
                (await ask(server, path=path, headers=key, system="x" * 3000), 413, "request_too_large"),
                (await server.http.get(path, headers=key), 405, "invalid_request_error"),
                (await server.post(f"{path}/none", {}, headers=key), 404, "not_found_error"),
            ):
                assert (answer.status_code, kind_of(answer)) == (status, kind)
                assert answer.headers["request-id"]
            long = await ask(server, path=path, headers=key, system="x" * 2000)
            assert kind_of(long) == "invalid_request_error"
            assert long.json()["error"]["message"].startswith("prompt is too long: ")
            text = await server.http.post(path, content=b"{}", headers=key)
            assert (text.status_code, kind_of(text)) == (415, "invalid_request_error")
            with server.state.admission.enter(server.state.keys.identify([(b"x-api-key", b"a-long-secret")]), 1):
                limited = await ask(server, path=path, headers=key)
            assert (limited.status_code, kind_of(limited)) == (429, "rate_limit_error")
            assert int(limited.headers["retry-after"]) >= 1
            server.state.admission.draining = True
            refused = await ask(server, path=path, headers=key)
            assert (refused.status_code, kind_of(refused)) == (503, "overloaded_error")

    asyncio.run(main())


def test_failures_in_a_stream(serving: Any) -> None:
    async def main() -> None:
        async with serving(step_seconds=0.01) as server:
            fields: dict[str, Any] = {"max_tokens": 3000, "ignore_eos": True}
            streamed = asyncio.create_task(ask(server, stream=True, **fields))
            while not server.engine.stats.num_running:
                await asyncio.sleep(0.01)
            server.state.stop_now()
            last = events((await streamed).text)[-1]
            assert (last["type"], last["error"]["type"]) == ("error", "overloaded_error")
            await server.idle()

    asyncio.run(main())


def test_pings_while_nothing_comes(serving: Any) -> None:
    async def main() -> None:
        config = ServerConfig(keep_alive_interval=0.2)
        async with serving(answer="a", step_seconds=1.3, config=config) as server:
            found = [event["type"] for event in events((await ask(server, stream=True, max_tokens=1, **OFF)).text)]
            assert found.count("ping") > 1
            assert found[0] == "message_start"

    asyncio.run(main())
