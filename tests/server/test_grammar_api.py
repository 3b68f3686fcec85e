"""Formats and tools over HTTP on the simulated executor: its tokens are random, so what is right is the grammar's."""

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "n"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"unit": {"enum": ["c", "f"]}, "days": {"type": "integer", "minimum": 1, "maximum": 3}},
                "required": ["unit", "days"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("get_weather", "get_tides")
]


def chat(thinking: bool = False, **fields: Any) -> dict[str, Any]:
    return {
        "model": "sim",
        "messages": [{"role": "user", "content": "Hi"}],
        "thinking": {"type": "enabled" if thinking else "disabled"},
        "max_tokens": 600,
        "seed": 3,
        **fields,
    }


FORMATS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    {"guided_json": SCHEMA},
    {"guided_json": json.dumps(SCHEMA)},
    {"json_schema": json.dumps(SCHEMA)},
    {"structured_outputs": {"json": SCHEMA}},
]
PATTERNS: list[dict[str, Any]] = [
    {"guided_regex": "[ab]{4}-[0-9]{2}"},
    {"regex": "[ab]{4}-[0-9]{2}"},
    {"structured_outputs": {"regex": "[ab]{4}-[0-9]{2}"}},
    {"guided_grammar": 'root ::= four "-" [0-9] [0-9]\nfour ::= ab ab ab ab\nab ::= "a" | "b"'},
    {"ebnf": 'start: AB AB AB AB "-" D D\nAB: /[ab]/\nD: /[0-9]/'},
    {"response_format": {"type": "regex", "regex": "[ab]{4}-[0-9]{2}"}},
    {"response_format": {"type": "grammar", "grammar": "start: /[ab]{4}-[0-9]{2}/"}},
]


def message(answer: Any) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]


def check_json(content: str) -> None:
    value = json.loads(content)
    assert set(value) == {"kind", "n"} and value["kind"] in ("a", "b") and 0 <= value["n"] <= 99


def test_every_spelling_of_a_schema_binds_the_content(serving: Callable[..., Any]) -> None:
    async def run() -> None:
        async with serving() as server:
            for fields in FORMATS:
                answer = await server.post(CHAT, chat(**fields))
                check_json(message(answer)["content"])
                assert answer.json()["choices"][0]["finish_reason"] == "stop"
            body = {"model": "sim", "prompt": "Hi", "max_tokens": 300, "seed": 1, **FORMATS[0]}
            check_json((await server.post(COMPLETIONS, body)).json()["choices"][0]["text"])

    asyncio.run(run())


def test_patterns_grammars_and_choices(serving: Callable[..., Any]) -> None:
    async def run() -> None:
        async with serving() as server:
            for fields in PATTERNS:
                assert re.fullmatch("[ab]{4}-[0-9]{2}", message(await server.post(CHAT, chat(**fields)))["content"])
            for fields in ({"guided_choice": ["red", "green"]}, {"structured_outputs": {"choice": ["red", "green"]}}):
                assert message(await server.post(CHAT, chat(**fields)))["content"] in ("red", "green")

    asyncio.run(run())


CONTENT = '{"kind": "a", "n": 7}'
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_tides">\n<｜DSML｜parameter name="days" string="false">2'
    '</｜DSML｜parameter>\n<｜DSML｜parameter name="unit" string="true">c</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    "</｜DSML｜tool_calls>"
)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["auto", "required", "named"])
def test_calls_follow_the_declared_tools_while_thinking_too(
    serving: Callable[..., Any], choice: str, stream: bool
) -> None:
    named = {"type": "function", "function": {"name": "get_tides"}}
    fields = {"tools": TOOLS, "tool_choice": named if choice == "named" else choice, "stream": stream}

    wrong = {
        "wrong tool": CALL.replace("get_tides", "get_news"),
        "wrong value": CALL.replace(">2<", ">9<"),
        "wrong name": CALL.replace('"days"', '"d"'),
    }
    answers = {word: "Hm.</think>" + text for word, text in {**wrong, "right": CALL}.items()}

    async def run() -> None:
        async with serving(by_word=answers) as server:
            for word in answers:
                messages = [{"role": "user", "content": word}]
                answer = await server.post(CHAT, {**chat(thinking=True, **fields), "messages": messages})
                if word == "right":
                    assert answer.status_code == 200, answer.text
                    assert "error" not in answer.text and "get_tides" in answer.text and "tool_calls" in answer.text
                else:
                    assert "grammar" in answer.text and (stream or answer.status_code == 500)

    asyncio.run(run())


def test_a_forced_call_without_thinking(serving: Callable[..., Any]) -> None:
    async def run() -> None:
        async with serving() as server:
            for seed in range(4):
                fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
                answer = await server.post(CHAT, chat(**fields))
                (call,) = message(answer)["tool_calls"]
                assert call["function"]["name"] in ("get_weather", "get_tides")
                arguments = json.loads(call["function"]["arguments"])
                assert arguments["unit"] in ("c", "f") and 1 <= arguments["days"] <= 3 and len(arguments) == 2
                assert answer.json()["choices"][0]["finish_reason"] == "tool_calls"

    asyncio.run(run())


def test_content_or_call_where_both_are_asked_for(serving: Callable[..., Any]) -> None:
    texts = {"content": CONTENT, "call": CALL, "words": "words", "both": CONTENT + CALL}

    async def run() -> None:
        async with serving(by_word={f"say {word}": "Hm.</think>" + text for word, text in texts.items()}) as server:
            for word in texts:
                messages = [{"role": "user", "content": f"say {word}"}]
                fields = {**chat(thinking=True, tools=TOOLS, **FORMATS[0]), "messages": messages}
                answer = await server.post(CHAT, fields)
                assert (answer.status_code == 200) == (word in ("content", "call")), answer.text
                if answer.status_code == 200:
                    got = message(answer)
                    assert bool(got.get("tool_calls")) == (word == "call")
                    assert word == "call" or json.loads(got["content"]) == json.loads(CONTENT)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"guided_json": {"not": {}}}, "guided_json", "`not` at #"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"uniqueItems": True}}}},
            "response_format.json_schema.schema",
            "`uniqueItems`",
        ),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "cannot be combined"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported"),
        ({"guided_grammar": "start: <｜User｜>"}, "guided_grammar", "cannot name tokens"),
        ({"guided_grammar": "start: (("}, "guided_grammar", "guided_grammar"),
        ({"guided_regex": "(a)\\1"}, "guided_regex", "backreferences"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "strict": True,
                            "parameters": {
                                "type": "object",
                                "properties": {"a": {"type": "string", "pattern": "(?=x)y"}},
                            },
                        },
                    }
                ]
            },
            "tools",
            "look-around",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "json"},
                    {"role": "assistant", "content": "{", "prefix": True},
                ],
                "guided_json": {},
            },
            "guided_json",
            "continued",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(
    serving: Callable[..., Any], fields: dict[str, Any], param: str, words: str
) -> None:
    async def run() -> None:
        async with serving() as server:
            answer = await server.post(CHAT, chat(**fields))
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert error["param"].startswith(param) and words in error["message"]

    asyncio.run(run())


def test_keywords_that_a_tool_cannot_have_are_named_in_a_header(serving: Callable[..., Any]) -> None:
    parameters = {"type": "object", "properties": {"ids": {"type": "array", "uniqueItems": True}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]

    async def run() -> None:
        async with serving() as server:
            answer = await server.post(CHAT, chat(tools=tools, max_tokens=5))
            assert answer.headers["x-fathom-ignored-fields"] == "tools.f.properties.ids.uniqueItems"

    asyncio.run(run())


def test_tools_that_must_not_be_called_leave_text_free_of_markers(serving: Callable[..., Any]) -> None:
    async def run() -> None:
        async with serving() as server:
            for thinking in (False, True):
                fields = {"tools": TOOLS, "tool_choice": "none", "max_tokens": 200, "logprobs": True}
                answer = await server.post(CHAT, chat(thinking, return_token_ids=True, **fields))
                assert answer.status_code == 200
                assert max(answer.json()["choices"][0]["token_ids"]) < 259 + 30 * thinking

    asyncio.run(run())
