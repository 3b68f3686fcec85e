"""Text never becomes a special id, whatever it spells and in whatever field it stands."""

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.tools.byte_tokenizer import byte_tokenizer
from server.chat_request import ChatRequest, OutputFormat, Tool
from server.chat_run import render_request
from server.completion_prompt import encode_prompts
from server.protocol.common import SamplingFields
from server.protocol.completions import CompletionBody
from server.validation import sampling_params

SPELLINGS = [
    *(
        "<｜User｜>",
        "<｜Assistant｜>",
        "</think>",
        "<think>",
        "｜DSML｜",
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
    ),
    *(
        "<｜fim▁begin｜>",
        "<｜fim▁hole｜>",
        "<｜fim▁end｜>",
        "<｜▁pad▁｜>",
        "<｜latest_reminder｜>",
        "<｜DSML｜tool_calls>",
    ),
]
texts = st.lists(st.sampled_from([*SPELLINGS, "a", " ", "\n", "é", "<", "｜", ">"]), min_size=1, max_size=5).map(
    "".join
)
RELAXED = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def special_counts(ids: Any, special: set[int]) -> dict[int, int]:
    found: dict[int, int] = {}
    for token_id in list(ids):
        if token_id in special:
            found[int(token_id)] = found.get(int(token_id), 0) + 1
    return found


def conversation(text: Any) -> ChatRequest:
    """One of every place in which a client can write; `text` gives the text of a place."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": None}}
    call["function"] = {"name": "f", "arguments": '{"k": ' + _json(text("argument")) + "}"}
    return ChatRequest(
        messages=[
            {"role": "system", "content": text("system")},
            {"role": "latest_reminder", "content": text("reminder")},
            {"role": "user", "content": [{"type": "text", "text": text("part")}, {"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": text("content"),
                "reasoning_content": text("reasoning"),
                "tool_calls": [call],
            },
            {"role": "tool", "tool_call_id": "c1", "content": text("result")},
            {"role": "user", "content": text("user"), "name": text("name")},
        ],
        tools=(
            Tool(
                name="f",
                description=text("description"),
                parameters={
                    "type": "object",
                    "title": text("title"),
                    "properties": {text("property"): {"enum": [text("enum")], "description": text("deep")}},
                },
            ),
        ),
        output_format=OutputFormat(
            kind="json_schema",
            param="response_format",
            rendered={"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": text("schema")}}},
        ),
        tier="max",
        fields=SamplingFields(model="m"),
    )


def _json(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


@pytest.mark.parametrize("hostile", SPELLINGS)
def test_each_spelling_in_each_place(serving: Any, hostile: str) -> None:
    places = [
        *("system", "reminder", "part", "content", "reasoning", "argument", "result", "user", "name", "description"),
        *("title", "property", "enum", "deep", "schema"),
    ]

    async def main() -> None:
        async with serving() as server:
            known = server.state.serving()
            special = set(known.tokenizer._special_ids.values())
            harmless = special_counts(render_request(known, conversation(lambda place: "x")).token_ids, special)
            for place in places:
                prompt = render_request(known, conversation(lambda p, place=place: hostile if p == place else "x"))
                assert special_counts(prompt.token_ids, special) == harmless, place

    asyncio.run(main())


def test_any_text_in_all_places_at_once(serving: Any) -> None:
    async def main() -> None:
        async with serving() as server:
            known = server.state.serving()
            special = set(known.tokenizer._special_ids.values())
            harmless = special_counts(render_request(known, conversation(lambda place: "x")).token_ids, special)

            @settings(max_examples=60, **RELAXED)
            @given(st.data())
            def check(data: Any) -> None:
                prompt = render_request(known, conversation(lambda place: data.draw(texts)))
                assert special_counts(prompt.token_ids, special) == harmless

            check()

    asyncio.run(main())


def test_completions_and_words(serving: Any) -> None:
    async def main() -> None:
        async with serving() as server:
            known = server.state.serving()
            special = set(known.tokenizer._special_ids.values())

            @settings(max_examples=80, **RELAXED)
            @given(texts, texts, texts)
            def check(prompt: str, suffix: str, word: str) -> None:
                body = CompletionBody(model="m", prompt=prompt)
                (ids,) = encode_prompts(known, body)
                assert special_counts(ids, special) == {} and known.tokenizer.decode(ids.tolist()) == prompt
                (ids,) = encode_prompts(known, CompletionBody(model="m", prompt=prompt, suffix=suffix))
                assert sorted(special_counts(ids, special).values()) == [1, 1, 1]
                params = sampling_params(SamplingFields(model="m", bad_words=[word], stop=[word]), known, None)
                assert special_counts((i for w in params.bad_words for i in w), special) == {}

            check()
            # Whoever writes a template of their own says so.
            body = CompletionBody(model="m", prompt="<｜User｜>a<｜Assistant｜></think>", parse_special=True)
            (ids,) = encode_prompts(known, body)
            assert len(ids) == 4

    asyncio.run(main())


def test_the_spellings_are_those_of_the_tokenizer() -> None:
    names = set(byte_tokenizer().get_vocab())
    assert {text for text in SPELLINGS if text != "<｜DSML｜tool_calls>"} <= names
