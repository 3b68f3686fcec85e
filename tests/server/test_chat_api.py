"""Chat completions: whole and streamed answers in OpenAI's and DeepSeek's shape."""

import asyncio
import json
from typing import Any

import pytest

ANSWER = "\nLet me think: 中文 😀</think>\n\nHello, wörld! 👋"
REASONING = "Let me think: 中文 😀"
CONTENT = "Hello, wörld! 👋"


def events(text: str) -> list[Any]:
    """The parsed `data:` lines; framing is checked on the way."""
    assert "\r" not in text
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    found = []
    for block in blocks:
        if block.startswith(":"):
            continue
        assert block.startswith("data: ")
        assert len(block.splitlines()) == 1
        found.append(block[6:] if block == "data: [DONE]" else json.loads(block[6:]))
    return found


def test_whole_answer(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer=ANSWER) as server:
            answer = await server.chat(max_tokens=200)
            assert answer.status_code == 200
            body = answer.json()
            assert body["object"] == "chat.completion"
            assert body["id"].startswith("chatcmpl-")
            assert body["model"] == "sim"
            (choice,) = body["choices"]
            assert choice["message"] == {"role": "assistant", "content": CONTENT, "reasoning_content": REASONING}
            assert choice["finish_reason"] == "stop"
            usage = body["usage"]
            ids = server.tokenizer.encode(ANSWER, special=True)
            assert usage["completion_tokens"] == len(ids) + 1
            # The newline in front belongs to the reasoning's tokens, `</think>` does not.
            assert usage["completion_tokens_details"]["reasoning_tokens"] == len(("\n" + REASONING).encode())
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
            assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]
            assert answer.headers["x-request-id"].startswith("req-")
            await server.idle()

    asyncio.run(main())


@pytest.mark.parametrize("include_usage", [None, False, True])
def test_stream_equals_whole(serving: Any, include_usage: bool | None) -> None:
    async def main() -> None:
        async with serving(answer=ANSWER) as server:
            options = {} if include_usage is None else {"stream_options": {"include_usage": include_usage}}
            answer = await server.chat(max_tokens=200, stream=True, **options)
            assert answer.headers["content-type"].startswith("text/event-stream")
            found = events(answer.text)
            assert found.pop() == "[DONE]"
            if include_usage:
                last = found.pop()
                assert last["choices"] == []
                assert last["usage"]["completion_tokens"] == len(server.tokenizer.encode(ANSWER, special=True)) + 1
                assert all(chunk["usage"] is None for chunk in found)
            else:
                assert all("usage" not in chunk for chunk in found)
            assert len({(c["id"], c["created"], c["model"], c["object"]) for c in found}) == 1
            deltas = [chunk["choices"][0]["delta"] for chunk in found]
            assert deltas[0] == {"role": "assistant", "content": None, "reasoning_content": ""}
            assert "".join(d.get("reasoning_content") or "" for d in deltas) == REASONING
            assert "".join(d.get("content") or "" for d in deltas) == CONTENT
            order = [next(iter(d)) for d in deltas[1:-1]]
            assert order == sorted(order, reverse=True), "reasoning comes before content"
            reasons = [chunk["choices"][0]["finish_reason"] for chunk in found]
            assert reasons[:-1] == [None] * (len(reasons) - 1)
            assert reasons[-1] == "stop"
            assert deltas[-1] == {}
            await server.idle()

    asyncio.run(main())


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking": {"type": "disabled"}},
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"thinking": False}},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_thinking_is_switched_off(serving: Any, fields: dict[str, Any]) -> None:
    async def main() -> None:
        async with serving(answer=CONTENT) as server:
            message = (await server.chat(**fields)).json()["choices"][0]["message"]
            assert message == {"role": "assistant", "content": CONTENT}
            stream = events((await server.chat(stream=True, **fields)).text)
            assert stream[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}

    asyncio.run(main())


def test_effort_changes_the_prompt_and_the_default_limit(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x", max_model_len=200_000) as server:
            lengths = {}
            for effort in ("low", "high", "max"):
                answer = await server.chat(reasoning_effort=effort)
                lengths[effort] = answer.json()["usage"]["prompt_tokens"]
            assert lengths["low"] < lengths["high"] < lengths["max"]
            assert (await server.chat()).json()["usage"]["prompt_tokens"] == lengths["high"]
            text = (await server.http.get("/metrics")).text
            expected = 65536 * 3 + 131072
            assert f'vllm:request_params_max_tokens_sum{{engine="0",model_name="sim"}} {float(expected)}' in text

    asyncio.run(main())


def test_logprobs_and_token_ids(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="ab</think>cd") as server:
            fields = {"logprobs": True, "top_logprobs": 2, "return_token_ids": True}
            body = (await server.chat(**fields)).json()
            choice = body["choices"][0]
            ids = server.tokenizer.encode("ab</think>cd", special=True)
            assert choice["token_ids"] == [*ids, 1]
            assert body["prompt_token_ids"][0] == 0
            content = choice["logprobs"]["content"]
            assert [row["token"] for row in content] == ["c", "d"]
            assert [row["token"] for row in choice["logprobs"]["reasoning_content"]] == ["a", "b"]
            assert content[0]["bytes"] == [ord("c")]
            assert len(content[0]["top_logprobs"]) == 2

            found = events((await server.chat(stream=True, **fields)).text)[:-1]
            choices = [chunk["choices"][0] for chunk in found]
            assert found[0]["prompt_token_ids"] == body["prompt_token_ids"]
            assert [t for c in choices for t in c.get("token_ids", [])] == choice["token_ids"]
            rows = [row for c in choices if c["logprobs"] for row in c["logprobs"]["content"]]
            assert rows == content

    asyncio.run(main())


def test_stop_strings(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="one two three") as server:
            off = {"thinking": {"type": "disabled"}}
            choice = (await server.chat(stop=["wo th", "zzz"], **off)).json()["choices"][0]
            assert choice["message"]["content"] == "one t"
            assert choice["finish_reason"] == "stop"
            text = (await server.chat(stop="wo th", stream=True, **off)).text
            deltas = [c["choices"][0]["delta"] for c in events(text)[:-1]]
            assert "".join(d.get("content", "") for d in deltas) == "one t"
            kept = await server.chat(stop="two", include_stop_str_in_output=True, **off)
            assert kept.json()["choices"][0]["message"]["content"] == "one two"
            await server.idle()

    asyncio.run(main())


def test_limits_of_the_answer(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="abcdefgh") as server:
            off = {"thinking": {"type": "disabled"}}
            for field in ("max_tokens", "max_completion_tokens"):
                choice = (await server.chat(**{field: 3}, **off)).json()["choices"][0]
                assert (choice["message"]["content"], choice["finish_reason"]) == ("abc", "length")
            both = (await server.chat(max_tokens=5, max_completion_tokens=2, **off)).json()
            assert both["usage"]["completion_tokens"] == 2

    asyncio.run(main())


def test_harmless_fields_null_and_unknown(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            fields = {
                **{"n": 1, "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
                **{"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "verbosity": "low"},
                **{"temperature": None, "stop": None, "max_tokens": None, "seed": None, "logit_bias": None},
                **{"tools_": 1, "x" * 500: {"deep": [1, 2]}, "stream": None, "stream_options": None},
                **{"stop": [], "top_k": -1, "min_p": 0, "parallel_tool_calls": False, "prompt_cache_key": "k"},
            }
            assert (await server.chat(**fields)).status_code == 200
            text = (await server.http.get("/metrics")).text
            assert "fathom_unknown_fields_total 2.0" in text

    asyncio.run(main())


def test_line_separators_never_split_an_event(serving: Any) -> None:
    odd = 'a\u2028b\u2029c\u0085d\ne\r\nf\x1cg"\\'

    async def main() -> None:
        async with serving(answer=odd) as server:
            off = {"thinking": {"type": "disabled"}}
            text = (await server.chat(stream=True, **off)).text
            for line in text.splitlines():
                assert line == "" or line.startswith("data: ")
            deltas = [c["choices"][0]["delta"] for c in events(text)[:-1]]
            assert "".join(d.get("content", "") for d in deltas) == odd
            assert (await server.chat(**off)).json()["choices"][0]["message"]["content"] == odd

    asyncio.run(main())


def test_cache_salts_of_two_keys_differ(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x", keys=["key-number-one", "key-number-two"]) as server:
            ring = server.state.keys
            ids = [
                ring.identify([(b"authorization", f"Bearer {k}".encode())])
                for k in ("key-number-one", "key-number-two")
            ]
            assert None not in ids
            assert len({ring.cache_salt(i, salt) for i in ids for salt in ("", "same")}) == 4
            assert ring.cache_salt(ids[0], "s") == ring.cache_salt(ids[0], "s")

    asyncio.run(main())
