"""How much of its reasoning an answer shows, whole and streamed."""

import asyncio
import json
from typing import Any

import pytest


def folded(text: str) -> tuple[str, str, list[str], str]:
    """Reasoning, content, the pieces of the reasoning, and the finish reason of a stream of one choice."""
    reasoning: list[str] = []
    content, finish = "", ""
    for block in text.split("\n\n"):
        if not block.startswith("data: {"):
            continue
        for choice in json.loads(block.removeprefix("data: "))["choices"]:
            piece = choice["delta"].get("reasoning_content")
            if piece:
                reasoning.append(piece)
                assert not content, "reasoning behind content"
            content += choice["delta"].get("content") or ""
            finish = choice["finish_reason"] or finish
    return "".join(reasoning), content, reasoning, finish


@pytest.mark.parametrize(
    ("fields", "reasoning", "content"),
    [
        ({}, "why not", "because"),
        ({"include_reasoning": False}, None, "because"),
        ({"reasoning": {"exclude": True}}, None, "because"),
        ({"separate_reasoning": False}, None, "why not</think>because"),
        ({"stream_reasoning": False}, "why not", "because"),
    ],
    ids=str,
)
@pytest.mark.parametrize("logprobs", [False, True])
def test_views(serving: Any, fields: dict[str, Any], reasoning: str | None, content: str, logprobs: bool) -> None:
    async def main() -> None:
        async with serving(answer="why not</think>because", step_seconds=0.005) as server:
            asked = {**fields, "logprobs": logprobs}
            body = (await server.chat(**asked)).json()
            message = body["choices"][0]["message"]
            assert (message.get("reasoning_content"), message["content"]) == (reasoning, content)
            assert body["usage"]["completion_tokens"] == len("why not") + 1 + len("because") + 1
            if logprobs:
                rows = body["choices"][0]["logprobs"]
                shown = rows["content"] + rows.get("reasoning_content", [])
                assert len(shown) == len("because") + (0 if reasoning is None and content == "because" else 7)
            stream = (await server.chat(stream=True, **asked)).text
            streamed, said, pieces, finish = folded(stream)
            assert (streamed, said, finish) == (reasoning or "", content, "stop")
            if fields.get("stream_reasoning") is False:
                assert pieces == ["why not"]
            elif reasoning is not None:
                assert len(pieces) > 1
            off = (await server.chat(thinking={"type": "disabled"}, **fields)).json()["choices"][0]["message"]
            assert off["content"] == "why notbecause" and "reasoning_content" not in off

    asyncio.run(main())


def test_reasoning_that_is_cut_off(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="why not</think>because") as server:
            for fields, expected in (
                ({"include_reasoning": False}, (None, "")),
                ({"separate_reasoning": False}, (None, "why")),
                ({"stream_reasoning": False}, ("why", "")),
            ):
                choice = (await server.chat(max_tokens=3, **fields)).json()["choices"][0]
                found = choice["message"].get("reasoning_content"), choice["message"]["content"]
                assert (found, choice["finish_reason"]) == (expected, "length")
                streamed = folded((await server.chat(max_tokens=3, stream=True, **fields)).text)
                assert streamed[:2] == (expected[0] or "", expected[1])

    asyncio.run(main())
