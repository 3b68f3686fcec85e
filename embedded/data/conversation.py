"""Turns to an example: what all families share. System prompts, earlier turns, the mode."""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from embedded.data.example import Answer, Call, Example

Turn = tuple[str, Answer]
"""What the user says, and what is answered."""

_SYSTEM_SHARE = 0.3
_LOW_EFFORT, _MAX_EFFORT = 0.12, 0.03

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a careful assistant. Answer briefly.",
    "Answer the question of the user.",
    "You are an assistant that helps with texts, numbers and tools.",
    "Be brief and exact.",
    "You are the assistant of a small company.",
    "Help the user. Do not invent anything.",
    "You answer questions. Use only what the user gives you.",
    "You work in an office and help with lists, notes and messages.",
    "You are a helpful, honest assistant.",
    "Today is a normal day. Help the user with the task.",
)


def draw_thinking(rng: random.Random, share: float = 0.5) -> bool:
    """Whether an example thinks."""
    return rng.random() < share


def thought(thinking: bool, reasoning: str) -> str | None:
    """The reasoning of an answer, None in examples that do not think."""
    assert reasoning
    return reasoning if thinking else None


def said(thinking: bool, reasoning: str, content: str) -> Answer:
    """An answer in words."""
    return Answer(content=content, reasoning=thought(thinking, reasoning))


def conversation(
    rng: random.Random,
    task: str,
    turns: Sequence[Turn],
    *,
    thinking: bool,
    system: str | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    response_format: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
) -> Example:
    """The last of `turns` is the one to answer; `system` None draws one, or none; "" is none."""
    messages: list[Mapping[str, Any]] = []
    for question, answer in turns[:-1]:
        messages += [{"role": "user", "content": question}, assistant_message(answer)]
    question, answer = turns[-1]
    messages.append({"role": "user", "content": question})
    return finished(
        rng,
        task,
        messages,
        answer,
        thinking=thinking,
        system=system,
        tools=tools,
        response_format=response_format,
        details=details,
    )


def finished(
    rng: random.Random,
    task: str,
    messages: Sequence[Mapping[str, Any]],
    answer: Answer,
    *,
    thinking: bool,
    system: str | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    response_format: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
) -> Example:
    """As `conversation`, from messages without a system prompt."""
    assert (answer.reasoning is not None) == thinking
    if system is None:
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < _SYSTEM_SHARE else ""
    effort = None
    if thinking:
        draw = rng.random()
        effort = "low" if draw < _LOW_EFFORT else "max" if draw < _LOW_EFFORT + _MAX_EFFORT else None
    opening = ({"role": "system", "content": system},) if system else ()
    return Example(
        task=task,
        messages=(*opening, *messages),
        answer=answer,
        tools=tuple(tools),
        response_format=response_format,
        thinking=thinking,
        effort=effort,
        details=details or {},
    )


def assistant_message(answer: Answer, first_id: int = 0) -> dict[str, Any]:
    """The message that a client sends back for `answer`; calls are numbered from `first_id`."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.content}
    if answer.reasoning is not None:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [
            {
                "id": call_id(first_id + n),
                "type": "function",
                "function": {"name": call.name, "arguments": arguments_text(call)},
            }
            for n, call in enumerate(answer.calls)
        ]
    return message


def tool_message(number: int, content: str) -> dict[str, Any]:
    """The result of call `number`."""
    return {"role": "tool", "tool_call_id": call_id(number), "content": content}


def call_id(number: int) -> str:
    return f"call_{number:02d}"


def arguments_text(call: Call) -> str:
    """The arguments as a client sends them: JSON in one line."""
    return json.dumps(dict(call.arguments), ensure_ascii=False)


def one_of(rng: random.Random, forms: Sequence[str], **slots: object) -> str:
    """One of the forms with its slots filled; `{name}` is a slot."""
    return rng.choice(forms).format(**slots)


def listed(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
