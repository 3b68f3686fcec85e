"""Rows against the server's own machinery: its prompt in front, its parser behind, its next turn over both."""

import dataclasses
import json
import random

import numpy as np
import pytest

from embedded.data.example import Answer, Call, Example
from embedded.data.render import PROMPT_WEIGHT, answer_ids, next_messages, prompt_of, training_row
from embedded.data.tasks import TASKS, make
from server.text.parser import OutputParser
from server.text.prompt import ASSISTANT, EOS, render_chat
from server.text.tokenizer import Tokenizer

SEED, COUNT = 11, 40


def parsed(tokenizer: Tokenizer, example: Example, ids: list[int]) -> Answer:
    """What the server makes of emitted ids, cut at random."""
    prompt = prompt_of(tokenizer, example)
    parser = OutputParser(
        tokenizer, starts_in=prompt.starts_in, continues=prompt.continues, tools=bool(example.tools), streams_json=True
    )
    rng = random.Random(len(ids))
    deltas = []
    while ids:
        cut = rng.randint(1, 9)
        deltas.append(parser.push(ids[:cut]))
        ids = ids[cut:]
    deltas.append(parser.finish())
    assert not parser.incomplete
    names = [call.name for delta in deltas for call in delta.calls if call.name is not None]
    arguments = [""] * len(names)
    for delta in deltas:
        for call in delta.calls:
            arguments[call.index] += call.arguments
    return Answer(
        content="".join(delta.content for delta in deltas),
        reasoning="".join(delta.reasoning for delta in deltas) if example.thinking else None,
        calls=tuple(Call(name=n, arguments=json.loads(a)) for n, a in zip(names, arguments, strict=True)),
    )


@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_server_reads_the_answer_that_was_meant(tokenizer: Tokenizer, task: str) -> None:
    for index in range(COUNT):
        example = make(task, SEED, index)
        row = training_row(tokenizer, example)
        emitted = row.ids[row.prompt_tokens :].tolist()
        assert emitted.count(tokenizer.required_id(EOS)) == 1
        assert emitted[-1] == tokenizer.required_id(EOS)
        found = parsed(tokenizer, example, emitted)
        assert found == example.answer
        assert [list(c.arguments) for c in found.calls] == [list(c.arguments) for c in example.answer.calls]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_prompts_are_those_of_the_encoder(tokenizer: Tokenizer, task: str) -> None:
    for index in range(COUNT):
        example = make(task, SEED, index)
        stated = example.response_format
        if stated is not None and stated["type"] == "json_schema":
            stated = {**stated, "json_schema": {**stated["json_schema"], "strict": False}}
        prompt = render_chat(
            tokenizer,
            example.messages,
            thinking=example.thinking,
            reasoning_effort=example.effort,
            tools=example.tools or None,
            response_format=stated,
        )
        row = training_row(tokenizer, example)
        assert row.ids[: row.prompt_tokens].tolist() == prompt.token_ids.tolist()
        assert row.ids.dtype == np.int32
        assert row.weights.dtype == np.float32


@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_next_turn_begins_with_the_row(tokenizer: Tokenizer, task: str) -> None:
    for index in range(COUNT):
        example = make(task, SEED, index)
        row = training_row(tokenizer, example)
        messages = next_messages(example, "And then?")
        if example.answer.calls:
            results = [
                {"role": "tool", "tool_call_id": call["id"], "content": "ok"} for call in messages[-2]["tool_calls"]
            ]
            messages = [*messages[:-1], *results]
        following = prompt_of(tokenizer, dataclasses.replace(example, messages=tuple(messages))).token_ids.tolist()
        # Without tools the encoding forgets that a turn was thought about.
        kept = len(row.ids) if example.tools or not example.thinking else prompt_of(tokenizer, example).turn_start
        assert following[:kept] == row.ids[:kept].tolist()
        assert len(following) > kept


@pytest.mark.parametrize("task", ["recall_list_turns", "chat", "tool_call", "tool_result"])
def test_earlier_turns_weigh_as_the_answer_does(tokenizer: Tokenizer, task: str) -> None:
    turns = 0
    for index in range(COUNT):
        example = make(task, SEED, index)
        row = training_row(tokenizer, example, prompt_weight=0.25)
        history = [message for message in example.messages if message["role"] == "assistant"]
        ids, weights = row.ids.tolist(), row.weights.tolist()
        expected = [0.25] * row.prompt_tokens + [1.0] * (len(ids) - row.prompt_tokens)
        opened = [n for n, token_id in enumerate(ids) if token_id == tokenizer.required_id(ASSISTANT)]
        assert len(opened) == len(history) + 1
        for start, message in zip(opened, history, strict=False):
            end = ids.index(tokenizer.required_id(EOS), start) + 1
            expected[start + 2 : end] = [1.0] * (end - start - 2)
            assert str(message["content"]) in tokenizer.decode(ids[start:end])
            turns += 1
        expected[0] = 0.0
        assert weights == expected
    assert turns


def test_the_prompt_weighs_little_by_itself(tokenizer: Tokenizer) -> None:
    row = training_row(tokenizer, make("world", SEED, 1))
    assert set(row.weights[1 : row.prompt_tokens].tolist()) <= {np.float32(PROMPT_WEIGHT), 1.0}


def test_text_that_spells_special_tokens_is_text(tokenizer: Tokenizer) -> None:
    text = f"{ASSISTANT}</think>｜DSML｜{EOS}"
    example = Example(
        task="repeat", messages=({"role": "user", "content": f"Repeat: {text}"},), answer=Answer(content=text)
    )
    row = training_row(tokenizer, example)
    plain = training_row(tokenizer, dataclasses.replace(example, messages=({"role": "user", "content": "x"},)))

    def special(ids: list[int]) -> list[int]:
        return [token_id for token_id in ids if token_id in tokenizer.added_ids]

    assert special(row.ids.tolist()) == special(plain.ids.tolist())
    assert parsed(tokenizer, example, answer_ids(tokenizer, example.answer)) == example.answer


def test_values_of_every_type_are_written_as_the_encoder_writes_them(tokenizer: Tokenizer) -> None:
    arguments = {"a": "x\n</y>", "b": 3, "c": 2.5, "d": True, "e": ["ä", 1], "f": {"g": None}, "h": ""}
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
    example = Example(
        task="tool_call",
        messages=({"role": "user", "content": "go"},),
        tools=(tool,),
        answer=Answer(content="Now.", reasoning="I call f.", calls=(Call(name="f", arguments=arguments),) * 2),
        thinking=True,
    )
    row = training_row(tokenizer, example)
    messages = next_messages(example, "?")[:-1]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "ok"} for call in messages[-1]["tool_calls"]]
    following = prompt_of(tokenizer, dataclasses.replace(example, messages=(*messages, *results)))
    assert following.token_ids[: len(row.ids)].tolist() == row.ids.tolist()
    assert parsed(tokenizer, example, row.ids[row.prompt_tokens :].tolist()) == example.answer
