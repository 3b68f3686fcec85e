"""Calling the right tool, two of them, or none."""

import random

from embedded.data.arithmetic import arithmetic_direct
from embedded.data.chat import small_talk
from embedded.data.conversation import Turn, conversation, draw_thinking, one_of, said, thought
from embedded.data.example import Answer, Call, Example
from embedded.data.seeds import with_articles
from embedded.data.tool_requests import request
from embedded.data.toolbox import Tool, draw_tools
from embedded.data.words import THINGS, VERBS

NO_TOOL = "I do not have a tool for that."
_JOINTS = (
    "{first} {second}",
    "{first} Also: {second}",
    "{first} And then: {second}",
    "First: {first} Second: {second}",
)


def tool_call(rng: random.Random, num_tokens: int | None) -> Example:
    """One call."""
    del num_tokens
    tools = draw_tools(rng, rng.randint(1, 6))
    asked, call = request(rng, rng.choice(tools))
    return _called(rng, "tool_call", tools, asked, (call,))


def tool_calls(rng: random.Random, num_tokens: int | None) -> Example:
    """Two calls in one answer, of two tools or of one."""
    del num_tokens
    tools = draw_tools(rng, rng.randint(2, 6))
    first = rng.choice(tools)
    # A tool without parameters is not called twice.
    again = bool(first.parameters) and rng.random() < 0.4
    second = first if again else rng.choice([tool for tool in tools if tool is not first])
    one, other = request(rng, first), request(rng, second)
    while one[1] == other[1]:
        other = request(rng, second)
    asked = one_of(rng, _JOINTS, first=closed(one[0]), second=other[0])
    return _called(rng, "tool_calls", tools, asked, (one[1], other[1]))


def tool_none(rng: random.Random, num_tokens: int | None) -> Example:
    """Tools are there, and none is needed or none fits."""
    del num_tokens
    tools = draw_tools(rng, rng.randint(1, 5))
    thinking = draw_thinking(rng)
    draw = rng.random()
    if draw < 0.4:
        turn = _missing(rng, tools, thinking)
    elif draw < 0.5 and all(tool.verb != "calculate" for tool in tools):
        turn = _sum(rng, thinking)
    else:
        turn = _talk(rng, thinking)
    return conversation(rng, "tool_none", [turn], thinking=thinking, tools=[tool.definition() for tool in tools])


def calling(thinking: bool, calls: tuple[Call, ...]) -> Answer:
    """The answer that makes these calls."""
    names = " and ".join(call.name for call in calls)
    return Answer(reasoning=thought(thinking, f"I call {names}."), calls=calls)


def _called(rng: random.Random, task: str, tools: list[Tool], asked: str, calls: tuple[Call, ...]) -> Example:
    thinking = draw_thinking(rng)
    turns: list[Turn] = []
    if rng.random() < 0.15:
        turns.append(_talk(rng, thinking))
    turns.append((asked, calling(thinking, calls)))
    details = {"tools": len(tools), "calls": len(calls)}
    definitions = [tool.definition() for tool in tools]
    return conversation(rng, task, turns, thinking=thinking, tools=definitions, details=details)


def _talk(rng: random.Random, thinking: bool) -> Turn:
    asked, content = small_talk(rng)
    return asked, said(thinking, "No tool is needed.", content)


def _sum(rng: random.Random, thinking: bool) -> Turn:
    example = arithmetic_direct(rng, None)
    return example.messages[-1]["content"], said(thinking, "No tool is needed.", example.answer.content)


def _missing(rng: random.Random, tools: list[Tool], thinking: bool) -> Turn:
    taken = {(tool.verb, tool.thing) for tool in tools}
    known = {tool.thing for tool in tools if tool.requests}
    verb, thing = rng.choice(VERBS), rng.choice(THINGS)
    while (verb, thing) in taken or thing in known:
        verb, thing = rng.choice(VERBS), rng.choice(THINGS)
    forms = (
        "Please {verb} the {thing}.",
        "Can you {verb} a {thing}?",
        "{verb} a {thing}",
        "I want to {verb} a {thing}.",
    )
    return with_articles(one_of(rng, forms, verb=verb, thing=thing)), said(thinking, "No tool fits.", NO_TOOL)


def closed(sentence: str) -> str:
    """With a full stop or a question mark."""
    return sentence if sentence.endswith((".", "?")) else f"{sentence}."
