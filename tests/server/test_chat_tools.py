"""Chats with tools and formats: every mode fills its fields, whole and streamed, and ends for the right reason."""

import asyncio
import itertools
import json
from typing import Any

import pytest

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Does {name}.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "string"}, "n": {"type": "integer"}},
                "required": ["a"],
            },
        },
    }
    for name in ("f", "g")
]
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
REASONING = "First a < b,\n\nthen </ tags."
INVOKE = (
    '<｜DSML｜invoke name="g">\n<｜DSML｜parameter name="a" string="true">l1\nl2 "q" 中 </x></｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="n" string="false">12</｜DSML｜parameter>\n</｜DSML｜invoke>'
)
OPEN, CLOSE = "<｜DSML｜tool_calls>\n", "\n</｜DSML｜tool_calls>"
ARGUMENTS = {"a": 'l1\nl2 "q" 中 </x>', "n": 12}
CHOICES = {
    "none": "none",
    "auto": "auto",
    "required": "required",
    "named": {"type": "function", "function": {"name": "g"}},
}


def chunks_of(answer: Any) -> list[dict[str, Any]]:
    lines = [line[6:] for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]", answer.text[-500:]
    return [json.loads(line) for line in lines]


def folded(chunks: list[dict[str, Any]], index: int = 0) -> tuple[dict[str, Any], str]:
    """(message, finish reason) of one choice of a stream, and its order checked: reasoning, content, calls."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    finish, stage = [], 0
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            assert not finish, "nothing comes behind the finish reason"
            delta = choice["delta"]
            kinds = [bool(delta.get("reasoning_content")), bool(delta.get("content")), bool(delta.get("tool_calls"))]
            for kind in [n for n, there in enumerate(kinds) if there]:
                assert kind >= stage
                stage = kind
            if delta.get("reasoning_content") is not None:
                message["reasoning_content"] = message.get("reasoning_content", "") + delta["reasoning_content"]
            message["content"] += delta.get("content") or ""
            for piece in delta.get("tool_calls", []):
                calls = message.setdefault("tool_calls", [])
                if "id" in piece:
                    assert (piece["index"], piece["type"], piece["function"]["arguments"]) == (
                        len(calls),
                        "function",
                        "",
                    )
                    calls.append(piece)
                else:
                    assert set(piece) == {"index", "function"} and set(piece["function"]) == {"arguments"}
                    calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
            if choice["finish_reason"] is not None:
                finish.append(choice["finish_reason"])
    (reason,) = finish
    return message, reason


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    calls = [{k: v for k, v in call.items() if k != "id"} for call in message.get("tool_calls", [])]
    return {**message, "tool_calls": calls} if calls else message


@pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "chat"])
@pytest.mark.parametrize("choice", CHOICES)
def test_every_mode_fills_its_fields(serving: Any, thinking: bool, choice: str) -> None:
    forced = choice in ("required", "named")
    calls_possible = choice != "none"

    async def check(server: Any, has_format: bool, calls: bool) -> None:
        content = '{"x": 1}' if has_format else "Let me see."
        if calls and forced and not thinking:
            answer, content = INVOKE + CLOSE, ""
        elif calls:
            content = "" if has_format or forced else content
            answer = content + "\n\n" + OPEN + INVOKE + CLOSE
        else:
            answer = content
        # A grammar has no room for newlines that would be dropped.
        free = not has_format and not forced
        lead = f"\n{REASONING}\n</think>" + ("\n\n" if free else "") if thinking else ""
        server.say(lead + answer)
        fields = {
            "tools": TOOLS,
            "tool_choice": CHOICES[choice],
            "thinking": {"type": "enabled" if thinking else "disabled"},
            "max_tokens": 2000,
            **({"response_format": FORMAT} if has_format else {}),
        }
        whole = await server.chat(**fields)
        assert whole.status_code == 200, whole.text
        (found,) = whole.json()["choices"]
        message = found["message"]
        assert message["content"] == content
        assert message.get("reasoning_content") == (REASONING if thinking else None)
        if calls:
            (call,) = message["tool_calls"]
            assert call["function"]["name"] == "g"
            assert json.loads(call["function"]["arguments"]) == ARGUMENTS
        assert ("tool_calls" in message) == calls
        assert found["finish_reason"] == ("tool_calls" if calls else "stop")
        chunks = chunks_of(await server.chat(stream=True, **fields))
        streamed, reason = folded(chunks)
        assert without_ids(streamed) == without_ids(message)
        assert reason == found["finish_reason"]
        if calls:
            pieces = [c for c in chunks if c["choices"][0]["delta"].get("tool_calls")]
            assert len(pieces) > 3, "arguments stream"
        await server.idle()

    async def main() -> None:
        async with serving(answer="x", step_seconds=0.001) as server:
            for has_format, calls in itertools.product((False, True), (False, True)):
                if (calls and calls_possible) or (not calls and not forced):
                    await check(server, has_format, calls)

    asyncio.run(main())


OFF = {"thinking": {"type": "disabled"}}
BLOCK = OPEN + INVOKE + CLOSE


def test_a_call_that_the_limit_cuts(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="\n\n" + BLOCK) as server:
            choice = (await server.chat(tools=TOOLS, max_tokens=90, **OFF)).json()["choices"][0]
            assert choice["finish_reason"] == "length"
            (call,) = choice["message"]["tool_calls"]
            assert call["function"]["arguments"].startswith('{"a": "l1\\nl')
            few = (await server.chat(tools=TOOLS, max_tokens=10, **OFF)).json()["choices"][0]
            assert few["finish_reason"] == "length" and "tool_calls" not in few["message"]

    asyncio.run(main())


def test_parallel_calls(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="\n\n" + OPEN + INVOKE + "\n" + INVOKE + CLOSE) as server:
            fields = {"tools": TOOLS, **OFF, "max_tokens": 2000}
            message, reason = folded(chunks_of(await server.chat(stream=True, tool_choice="auto", **fields)))
            assert reason == "tool_calls"
            assert [c["index"] for c in message["tool_calls"]] == [0, 1]
            assert len({c["id"] for c in message["tool_calls"]}) == 2

    asyncio.run(main())


def test_choices_share_the_prompt(serving: Any) -> None:
    async def main() -> None:
        async with serving() as server:
            fields = {"n": 4, "max_tokens": 12, "seed": 7, "ignore_eos": True, **OFF}
            text = "a long prompt " * 80
            whole = (await server.chat(text, **fields)).json()
            assert [c["index"] for c in whole["choices"]] == [0, 1, 2, 3]
            contents = [c["message"]["content"] for c in whole["choices"]]
            assert len(set(contents)) == 4
            usage = whole["usage"]
            assert usage["completion_tokens"] == 48
            assert usage["total_tokens"] == usage["prompt_tokens"] + 48
            await server.idle()
            # All full pages of the prompt are computed once.
            shared = usage["prompt_tokens"] // 256 * 256
            assert shared and server.engine.stats.hit_tokens >= 3 * shared
            # The first choice is the answer of a request for one; the same seed gives the same choices again.
            one = (await server.chat(text, **{**fields, "n": 1})).json()["choices"][0]["message"]["content"]
            assert one == contents[0]
            chunks = chunks_of(await server.chat(text, stream=True, stream_options={"include_usage": True}, **fields))
            assert [folded(chunks, n)[0]["content"] for n in range(4)] == contents
            assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 48
            await server.idle()

    asyncio.run(main())


def test_where_usage_stands(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x</think>abc") as server:
            body = {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "stream": True}
            plain = chunks_of(await server.post("/v1/chat/completions", body))
            assert all("usage" not in chunk for chunk in plain)
            deepseek = chunks_of(await server.post("/chat/completions", body))
            assert [chunk["usage"] is not None for chunk in deepseek] == [False] * (len(deepseek) - 1) + [True]
            assert deepseek[-1]["choices"][0]["finish_reason"] == "stop"
            usage = deepseek[-1]["usage"]
            assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]
            assert usage["completion_tokens_details"] == {"reasoning_tokens": 1}
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
            running = chunks_of(await server.post("/v1/chat/completions", body))
            counts = [chunk["usage"]["completion_tokens"] for chunk in running[1:]]
            assert counts == sorted(counts) and counts[-1] == 6
            silent = (await server.chat(**OFF)).json()["usage"]
            assert "completion_tokens_details" not in silent

    asyncio.run(main())


def test_log_probabilities_beside_calls(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="why</think>Hm.\n\n" + BLOCK) as server:
            fields = {"tools": TOOLS, "logprobs": True, "max_tokens": 2000}
            choice = (await server.chat(**fields)).json()["choices"][0]
            assert "".join(row["token"] for row in choice["logprobs"]["content"]) == "Hm."
            assert "".join(row["token"] for row in choice["logprobs"]["reasoning_content"]) == "why"
            chunks = chunks_of(await server.chat(stream=True, **fields))
            rows = [row for c in chunks for row in (c["choices"][0]["logprobs"] or {}).get("content", [])]
            assert rows == choice["logprobs"]["content"]

    asyncio.run(main())


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD_HISTORIES = {
    "not answered": ([{"role": "assistant", "content": None, "tool_calls": [CALL]}], "insufficient tool messages"),
    "wrong id": (
        [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c2", "content": "r"}],
        "tool_call_id",
    ),
    "no call": ([{"role": "tool", "tool_call_id": "c1", "content": "r"}], "must be a response to a preceding message"),
    "nothing": ([{"role": "assistant", "content": None}], "content or tool_calls must be set"),
    "prefix": ([{"role": "assistant", "content": "x", "prefix": True}], "should not be used with prefix"),
    "shape": ([{"role": "assistant", "tool_calls": [{"id": "c1"}]}], ""),
    "type": ([{"role": "assistant", "tool_calls": "x"}], "must be a list"),
}


@pytest.mark.parametrize("name", BAD_HISTORIES)
def test_histories_that_no_model_had(serving: Any, name: str) -> None:
    messages, words = BAD_HISTORIES[name]

    async def main() -> None:
        async with serving(answer="x") as server:
            answer = await server.chat_messages([{"role": "user", "content": "hi"}, *messages], tools=TOOLS)
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert words in error["message"]
            assert error["param"].startswith("messages"), error

    asyncio.run(main())


@pytest.mark.parametrize("thinking", [True, False])
def test_reasoning_in_the_history_may_be_missing(serving: Any, thinking: bool) -> None:
    async def main() -> None:
        async with serving(answer="x</think>y") as server:
            counts = []
            for said in ({}, {"reasoning_content": "why"}, {"reasoning": "why"}, {"thinking": "why"}):
                messages = [
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": "", "tool_calls": [CALL], **said},
                    {"role": "tool", "tool_call_id": "c1", "content": "r"},
                ]
                fields = {"tools": TOOLS, "thinking": {"type": "enabled" if thinking else "disabled"}}
                rendered = await server.post("/render", {"model": "sim", "messages": messages, **fields})
                assert rendered.status_code == 200, rendered.text
                counts.append(rendered.json()["count"])
            expected = [counts[0]] + [counts[0] + (3 if thinking else 0)] * 3
            assert counts == expected

    asyncio.run(main())


def test_strict_tools_beside_others(serving: Any) -> None:
    """Both kinds in one request, definitions under OpenAI's name and formats that DeepSeek's library does not know."""
    strict = {
        "name": "s",
        "strict": True,
        "parameters": {
            "type": "object",
            "title": "S",
            "properties": {"p": {"$ref": "#/$defs/P"}, "when": {"type": "string", "format": "date-time"}},
            "required": ["p", "when"],
            "additionalProperties": False,
            "$defs": {"P": {"type": "string", "enum": ["a", "b"]}},
        },
    }

    async def main() -> None:
        async with serving(answer="x") as server:
            body = {"model": "sim", "messages": [{"role": "user", "content": "hi"}]}
            tools = [{"type": "function", "function": strict}, TOOLS[0]]
            rendered = await server.post("/render", {**body, "tools": tools})
            assert rendered.status_code == 200, rendered.text
            assert '"strict"' not in rendered.json()["prompt"]
            assert "date-time" in rendered.json()["prompt"]
            del strict["parameters"]["properties"]["when"]
            strict["parameters"]["required"] = ["p"]
            text = (await server.post("/render", {**body, "tools": tools})).json()["prompt"]
            assert '"$ref": "#/$def/P"' in text and '"title"' not in text

    asyncio.run(main())
