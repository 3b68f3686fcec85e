"""Every bad body gets a 400 that names the field, in one shape; nothing gets a 5xx."""

import asyncio
import copy
import json
import math
import random
from typing import Any

import pytest

HUGE = 10**30
NOT_A_NUMBER = ["1", [], {}, True]
NOT_AN_INTEGER = ["1", [], {}, True, 1.5, 1.0]
NOT_A_BOOLEAN = ["true", 1, 0, [], {}]

BAD_FUNCTIONS = [
    *({"name": name} for name in (1, "", "a b", "é", "x" * 129, None)),
    *({"name": "f", "description": 1}, {"name": "f", "parameters": []}, {"name": "f", "strict": "yes"}),
]

COMMON: dict[str, list[Any]] = {
    "model": [1, "", [], {}, True],
    "stream": NOT_A_BOOLEAN,
    "stream_options": [1, "x", [], True, {"include_usage": True}],
    "max_tokens": [*NOT_AN_INTEGER, 0, -1, HUGE, 2**31],
    "min_tokens": [*NOT_AN_INTEGER, -1, HUGE, 100],
    "temperature": [*NOT_A_NUMBER, -0.1, 2.1, HUGE],
    "top_p": [*NOT_A_NUMBER, 0, -1, 1.01, HUGE],
    "top_k": [*NOT_AN_INTEGER, -2, HUGE],
    "min_p": [*NOT_A_NUMBER, -0.1, 1.1],
    "presence_penalty": [*NOT_A_NUMBER, -2.1, 2.1],
    "frequency_penalty": [*NOT_A_NUMBER, -2.1, 2.1],
    "repetition_penalty": [*NOT_A_NUMBER, 0, -1, 11],
    "logit_bias": [1, "x", [], True, {"a": 1}, {"1": "x"}, {"1": 101}, {"-1": 1}, {"99999": 1}, {"²": 1}, {"1": True}],
    "seed": [*NOT_AN_INTEGER, HUGE, 2**63],
    "stop": [1, {}, True, "", ["a", ""], ["a", 1], ["x"] * 17, "y" * 1025, [["a"]]],
    "stop_token_ids": [1, "x", {}, True, [-1], [2048], [HUGE], ["a"], [1.5], [True], [1] * 129],
    "include_stop_str_in_output": NOT_A_BOOLEAN,
    "ignore_eos": NOT_A_BOOLEAN,
    "return_token_ids": NOT_A_BOOLEAN,
    "priority": [*NOT_AN_INTEGER, HUGE, -1001],
    "cache_salt": [1, [], {}, True, "s" * 257],
    "extra_key": [1, [], {}, True, "s" * 257],
    "user_id": [1, [], {}, True, "", "a b", "é", "u" * 513],
    "n": [0, 9, -1, "1", 1.0, True, HUGE],
    "use_beam_search": [True],
    "bad_words": [1, "x", {}, [1], [""], ["x" * 1025], ["x"] * 129],
    "allowed_token_ids": [1, "x", {}, [], ["a"], [-1], [2048], [HUGE], [1.0], [True]],
    "prompt_logprobs": [*NOT_AN_INTEGER, -1, 21],
    "thinking_token_budget": [*NOT_AN_INTEGER, -2, HUGE],
    "thinking_budget": [*NOT_AN_INTEGER, -2, HUGE],
    "max_thinking_tokens": [*NOT_AN_INTEGER, -2, HUGE],
    "skip_special_tokens": NOT_A_BOOLEAN,
    "return_tokens_as_token_ids": NOT_A_BOOLEAN,
    "no_stop_trim": NOT_A_BOOLEAN,
    "truncation_side": [1, "up", [], True],
    "detokenize": [False, 1],
    "stop_regex": ["a+"],
    "logprob_token_ids": [[1]],
    "return_hidden_states": [True],
    "prompt_embeds": ["AAAA"],
    "structured_outputs": [{"regex": "(a"}, {"structural_tag": "{}"}, {"json": {}, "regex": "a"}, {"banana": 1}],
    "guided_json": [1, "x", {"not": {}}, {"type": "banana"}, False],
    "guided_regex": [1, "", "(a", "(a)\\1"],
    "response_format": [{"type": "json_schema"}, "text", {"type": "banana"}, {}],
    "guided_choice": [[], "a", [1], [""]],
    "guided_grammar": [1, "", "root := x", "start: <[1]>", "start: %json {}"],
    "truncate_prompt_tokens": [*NOT_AN_INTEGER, -2, 0, HUGE],
    "kv_transfer_params": [{"host": "10.0.0.1"}],
    "custom_logit_processor": ["x"],
}
CHAT = COMMON | {
    "messages": [1, "x", {}, True, [], [1], ["x"], [[]]],
    "max_completion_tokens": [*NOT_AN_INTEGER, 0, -1, HUGE],
    "thinking": [1, "enabled", [], True, {}, {"type": "banana"}, {"type": 1}],
    "reasoning_effort": [1, [], {}, True, "banana", ""],
    "chat_template_kwargs": [
        1,
        "x",
        [],
        True,
        {"thinking": 1},
        {"enable_thinking": "no"},
        {"reasoning_effort": 3},
        {"x": 1},
    ],
    "reasoning": [1, "high", [], {"enabled": 1}, {"exclude": "yes"}, {"summary": "auto"}],
    "include_reasoning": NOT_A_BOOLEAN,
    "separate_reasoning": NOT_A_BOOLEAN,
    "stream_reasoning": NOT_A_BOOLEAN,
    "logprobs": [*NOT_A_BOOLEAN, 5],
    "top_logprobs": [*NOT_AN_INTEGER, -1, 21, 5],
    "tools": [
        *({}, "x", [1], [{}], [{"type": "web_search"}], [{"type": "function"}], [{"type": "function", "function": {}}]),
        *([{"type": "function", "function": function}] for function in BAD_FUNCTIONS),
        [{"type": "function", "function": {"name": "f"}}] * 2,
        [{"type": "function", "function": {"name": f"f{n}"}} for n in range(129)],
    ],
    "tool_choice": [
        *("required", "x", 1, [], {}, {"type": "function"}, {"type": "function", "function": {"name": "f"}}),
        *({"type": "custom", "custom": {"name": "f"}}, {"type": "allowed_tools"}),
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": [{"type": "function"}]}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function"}]}},
    ],
    "parallel_tool_calls": NOT_A_BOOLEAN,
    "functions": [[{"name": "f"}]],
    "audio": [{"voice": "a"}],
    "modalities": [["text", "audio"]],
    "prediction": [{"type": "content", "content": "x"}],
    "web_search_options": [{}],
    "chat_template": ["{{ 1 }}"],
    "continue_final_message": [True],
    "add_generation_prompt": [False],
}
COMPLETIONS = COMMON | {
    "prompt": [
        1,
        {},
        True,
        "",
        [],
        [""],
        [[]],
        [1, "a"],
        [[1, "a"]],
        [-1],
        [2048],
        [HUGE],
        [[2048]],
        [1.5],
        [True],
        ["a"] * 129,
    ],
    "logprobs": [*NOT_AN_INTEGER, -1, 21],
    "echo": NOT_A_BOOLEAN,
    "best_of": [*NOT_AN_INTEGER, 0, 2, HUGE],
    "suffix": [1, [], {}, True],
    "parse_special": NOT_A_BOOLEAN,
    "max_tokens": [*NOT_AN_INTEGER, 0, -1, HUGE, 2**31],
}
BASE = {
    "/v1/chat/completions": {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    "/v1/completions": {"model": "sim", "prompt": "hi", "max_tokens": 4},
}
TABLES = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETIONS}


def check_error(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.content) < 16 * 1024
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


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


VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**40, 0.5, -0.0, 1e308, 5e-324),
    *("", "x", "hi" * 50, "\x00", "\u2028", "<｜User｜>", "</think>", "😀", "nan", "none", "max"),
    *([], [None], [1, "a"], [[[]]], {}, {"type": "text"}, {"a": {"b": [1]}}, [{"role": "user", "content": "x"}]),
]


def mutated(body: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """One to three random changes somewhere in a body."""
    body = copy.deepcopy(body)
    for _ in range(chance.randint(1, 3)):
        place: Any = body
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = chance.choice(keys) if keys else None
            if key is not None and isinstance(place[key], (dict, list)) and place[key] and chance.random() < 0.6:
                place = place[key]
                continue
            break
        kind = chance.randrange(4)
        if key is None or kind == 0:
            if isinstance(place, dict):
                place[chance.choice(["x", *CHAT, *COMPLETIONS])] = chance.choice(VALUES)
            else:
                place.append(chance.choice(VALUES))
        elif kind == 1:
            del place[key]
        elif kind == 2:
            place[key] = [place[key]]
        else:
            place[key] = chance.choice(VALUES)
    return body


def test_random_mutations_never_break_the_server(serving: Any) -> None:
    chance = random.Random(20261124)
    full = {
        "/v1/chat/completions": {
            **BASE["/v1/chat/completions"],
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "c", "reasoning_content": "d"},
                {"role": "user", "content": "e", "name": "n"},
            ],
            **{"temperature": 0.5, "top_p": 0.9, "stop": ["q"], "logit_bias": {"5": 1.0}, "seed": 1, "logprobs": True},
            **{"top_logprobs": 2, "thinking": {"type": "enabled"}, "reasoning_effort": "high"},
            **{"stop_token_ids": [7], "chat_template_kwargs": {"thinking": True}, "metadata": {"a": "b"}},
        },
        "/v1/completions": {
            **BASE["/v1/completions"],
            **{"prompt": [[5, 6], "x"], "logprobs": 1, "stop": "q", "logit_bias": {"5": 1.0}, "seed": 1, "top_k": 5},
        },
        "/tokenize": {"model": "sim", "messages": [{"role": "user", "content": "x"}]},
        "/detokenize": {"model": "sim", "tokens": [5, 6, 7]},
    }

    async def main() -> None:
        async with serving(answer="ab</think>cd") as server:
            seen = set()
            for n in range(1200):
                path = chance.choice(list(full))
                body = mutated(full[path], chance)
                if n % 10 == 0:
                    raw = bytearray(json.dumps(body).encode())
                    for _ in range(3):
                        raw[chance.randrange(len(raw))] = chance.randrange(256)
                    answer = await server.post_raw(path, bytes(raw))
                else:
                    answer = await server.post(path, body)
                seen.add(answer.status_code)
                assert answer.status_code in (200, 400, 404), (path, body, answer.text)
                if answer.status_code != 200:
                    check_error(answer, answer.status_code)
                elif answer.headers["content-type"].startswith("text/event-stream"):
                    assert '"error"' not in answer.text, (path, body)
            assert seen == {200, 400, 404}
            assert (await server.chat()).status_code == 200
            await server.idle()

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
