"""Every bad body gets a 400 that names the field, in one shape; nothing gets a 5xx."""

import asyncio
import json
import math
from typing import Any

import pytest

from tests.server.request_bodies import BASE, TABLES, check_error


@pytest.mark.parametrize("path", list(BASE))
@pytest.mark.parametrize("stream", [False, True])
def test_each_wrong_field_is_named(serving: Any, path: str, stream: bool) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            for field, values in TABLES[path].items():
                for value in values:
                    body = {**BASE[path], "stream": stream, field: value}
                    if field == "stream_options" and isinstance(value, dict):
                        body["stream"] = False
                    if field == "model" and value == "":
                        assert (await server.post(path, body)).status_code in (400, 404)
                        continue
                    answer = await server.post(path, body)
                    assert answer.status_code == 400, (field, value, answer.status_code, answer.text)
                    error = check_error(answer, 400)
                    assert error["param"], (field, value, error)
                    assert error["param"].split(".")[0].split("[")[0] == field, (field, value, error)

    asyncio.run(main())


@pytest.mark.parametrize("path", list(BASE))
def test_missing_fields(serving: Any, path: str) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            for field in ("model", "messages", "prompt"):
                if field in BASE[path]:
                    body = {k: v for k, v in BASE[path].items() if k != field}
                    for absent in (body, {**body, field: None}):
                        assert check_error(await server.post(path, absent), 400)["param"] == field

    asyncio.run(main())


BAD_JSON = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"x"',
    b"1",
    b"{'a':1}",
    b'{"a":1,}',
    b'\xef\xbb\xbf{"a":1}',
    '{"a":1}'.encode("utf-16"),
    b'{"temperature":NaN}',
    b'{"temperature":Infinity}',
    b'{"temperature":1e400}',
    b'{"seed":' + b"9" * 5000 + b"}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"messages":' + b"[" * 500 + b"]" * 500 + b"}",
    b'{"a":"\\ud800"}',
    b'{"a":"\xff\xfe"}',
    b'{"a":"\x00"}',
    b'{"a":1} trailing',
    b'{"a":[' + b"[]," * 300_000 + b"[]]}",
    b"{" + b",".join(b'"k%d":1' % i for i in range(100_000)) + b"}",
]


@pytest.mark.parametrize("path", [*BASE, "/tokenize", "/detokenize"])
def test_broken_json(serving: Any, path: str) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            for raw in BAD_JSON:
                check_error(await server.post_raw(path, raw), 400)

    asyncio.run(main())


def test_nesting_up_to_the_cap_is_read(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            body = json.dumps(BASE["/v1/completions"])[:-1]
            inside = body + ', "metadata": ' + "[" * 63 + "]" * 63 + "}"
            outside = body + ', "metadata": ' + "[" * 64 + "]" * 64 + "}"
            brackets = body + ', "user": "' + "[{" * 1000 + '\\"]"}'
            assert (await server.post_raw("/v1/completions", inside.encode())).status_code == 200
            assert (await server.post_raw("/v1/completions", brackets.encode())).status_code == 200
            check_error(await server.post_raw("/v1/completions", outside.encode()), 400)

    asyncio.run(main())


def test_content_types(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            raw = json.dumps(BASE["/v1/completions"]).encode()
            good = ("application/json", "application/json; charset=utf-8", "Application/JSON", "application/ld+json")
            bad = ("", "text/plain", "multipart/form-data; boundary=x", "application/json; charset=utf-16", "x" * 500)
            for kind in (*good, *bad, "application/x-www-form-urlencoded"):
                headers = {"content-type": kind} if kind else {}
                answer = await server.http.post("/v1/completions", content=raw, headers=headers)
                if kind in good:
                    assert answer.status_code == 200, kind
                else:
                    check_error(answer, 415)
            for encoding in ("gzip", "br", "deflate, gzip"):
                headers = {"content-type": "application/json", "content-encoding": encoding}
                check_error(await server.http.post("/v1/completions", content=raw, headers=headers), 415)

    asyncio.run(main())


def test_context_length(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="a" * 50, max_model_len=512) as server:
            for length, max_tokens, status in (
                (511, 1, 200),
                (512, 1, 400),
                (513, 1, 400),
                (500, 12, 200),
                (500, 13, 400),
            ):
                answer = await server.complete([5] * length, max_tokens=max_tokens)
                assert answer.status_code == status, (length, max_tokens)
                if status == 400:
                    error = check_error(answer, 400)
                    assert error["code"] == "context_length_exceeded"
                    assert "maximum context length is 512 tokens" in error["message"]
                    assert f"{length + max_tokens} tokens" in error["message"]
            # Without a number the answer gets the room that is left.
            assert (await server.complete([5] * 508)).json()["usage"]["completion_tokens"] == 4
            off = {"thinking": {"type": "disabled"}}
            whole = (await server.chat("x" * 480, **off)).json()
            assert whole["usage"]["total_tokens"] == 512
            assert whole["choices"][0]["finish_reason"] == "length"
            for fields, param in (({}, "messages"), ({"max_tokens": 9}, "messages")):
                error = check_error(await server.chat("x" * 600, **fields, **off), 400)
                assert (error["code"], error["param"]) == ("context_length_exceeded", param)
            # Far too long: refused without tokenising all of it.
            parts = [{"type": "text", "text": "é" * 100_000}, {"type": "text", "text": "b" * 900_000}]
            for sent in (
                server.chat(parts),
                server.complete("é" * 600_000),
                server.post("/tokenize", {"prompt": "z" * 10**6}),
            ):
                error = check_error(await sent, 400)
                assert error["code"] == "context_length_exceeded"
                assert "maximum context length is 512 tokens" in error["message"]
            # Long in characters, short in tokens.
            special = "<｜User｜>" * 300
            assert len(special) > 512
            assert (await server.complete(special)).status_code == 400
            assert (await server.complete(special, parse_special=True)).status_code == 200
            for field in ("max_tokens", "max_completion_tokens"):
                error = check_error(await server.chat("x" * 400, **{field: 500}, **off), 400)
                assert (error["code"], error["param"]) == ("context_length_exceeded", field)

    asyncio.run(main())


def test_unknown_model_and_routes(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            for path in BASE:
                error = check_error(await server.post(path, {**BASE[path], "model": "gpt-" + "x" * 5000}), 404)
                assert (error["code"], error["param"]) == ("model_not_found", "model")
            assert check_error(await server.http.get("/v1/models/nope"), 404)["code"] == "model_not_found"
            assert (await server.http.get("/v1/models/sim")).json()["id"] == "sim"
            listed = (await server.http.get("/v1/models")).json()
            assert [m["id"] for m in listed["data"]] == ["sim"]
            for method, path, status in (
                ("GET", "/docs", 404),
                ("GET", "/openapi.json", 404),
                ("GET", "/redoc", 404),
                ("POST", "/v1/embeddings", 404),
                ("GET", "/v1/chat/completions/", 404),
                ("GET", "/v1/chat/completions", 405),
                ("DELETE", "/v1/models", 405),
                ("POST", "/health", 405),
                ("GET", "/../etc/passwd", 404),
                ("GET", "/%00", 404),
                ("GET", "/v1//models", 404),
            ):
                check_error(
                    await server.http.request(method, path, headers={"content-type": "application/json"}), status
                )
            head = await server.http.head("/")
            assert (head.status_code, head.content) == (200, b"")
            head = await server.http.head("/v1/chat/completions")
            assert (head.status_code, head.content) == (405, b"")
            options = await server.http.options(
                "/v1/models", headers={"origin": "http://evil", "access-control-request-method": "POST"}
            )
            assert options.status_code == 405
            assert not [h for h in options.headers if h.startswith("access-control")]

    asyncio.run(main())


def test_errors_echo_little_of_what_was_sent(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            canary = "CANARY" * 1000
            bodies = [
                {**BASE["/v1/chat/completions"], "temperature": canary},
                {**BASE["/v1/chat/completions"], "stop": [canary]},
                {**BASE["/v1/chat/completions"], "reasoning_effort": canary},
                {**BASE["/v1/chat/completions"], "model": canary},
                {**BASE["/v1/chat/completions"], "messages": [{"role": canary, "content": "x"}]},
                {**BASE["/v1/chat/completions"], "messages": [{"role": "user", "content": [{"type": canary}]}]},
                {**BASE["/v1/chat/completions"], "messages": [canary] * 1000},
                {**BASE["/v1/chat/completions"], "logit_bias": {canary: 1}},
                {**BASE["/v1/chat/completions"], "logit_bias": {f"{i}{canary}": canary for i in range(500)}},
            ]
            for body in bodies:
                answer = await server.post("/v1/chat/completions", body)
                assert answer.status_code in (400, 404)
                assert len(answer.content) < 8 * 1024
                assert answer.text.count("CANARY") <= 240 // 6

    asyncio.run(main())


MESSAGES: list[Any] = [
    [{}],
    [{"role": "user"}],
    [{"content": "x"}],
    [{"role": None, "content": "x"}],
    [{"role": "banana", "content": "x"}],
    [{"role": ["user"], "content": "x"}],
    [{"role": "user", "content": 1}],
    [{"role": "user", "content": {}}],
    [{"role": "user", "content": [1]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}]}],
    [{"role": "user", "content": [{"type": "text", "text": 1}]}],
    [{"role": "assistant", "content": None}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "prefix": "yes"}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "reasoning_content": 5}],
    [{"role": "tool", "content": "x"}],
    [{"role": "tool", "content": "x", "tool_call_id": "a"}],
    [{"role": "assistant", "content": "y", "tool_calls": 5}],
    [{"role": "assistant", "content": "y", "tool_calls": [5]}],
    [{"role": "assistant", "content": "y", "tool_calls": [{"id": 1}]}],
]


def test_malformed_messages(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            for messages in MESSAGES:
                answer = await server.post("/v1/chat/completions", {"model": "sim", "messages": messages})
                assert answer.status_code == 400, (messages, answer.text)
                assert check_error(answer, 400)["param"].startswith("messages"), (messages, answer.text)

    asyncio.run(main())


def test_min_tokens_over_a_default_limit(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x", max_model_len=512) as server:
            error = check_error(await server.complete(min_tokens=17), 400)
            assert error["param"] == "min_tokens"
            error = check_error(await server.chat(min_tokens=512), 400)
            assert error["param"] == "min_tokens"
            assert math.isfinite(error["message"].count("min_tokens"))

    asyncio.run(main())
