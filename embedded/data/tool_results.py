"""Answers from what a tool returned."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from embedded.data.conversation import assistant_message, draw_thinking, finished, one_of, said, tool_message
from embedded.data.example import Answer, Example
from embedded.data.facts import draw_code
from embedded.data.tool_calls import calling, closed
from embedded.data.tool_requests import request
from embedded.data.toolbox import KNOWN, Draw, Tool, city, decimal, draw_tools, noun, pair, person

_FIELDS: tuple[tuple[str, Draw], ...] = (
    ("status", lambda rng: rng.choice(("open", "closed", "done", "shipped", "waiting", "new", "paid"))),
    ("price", decimal),
    ("total", decimal),
    ("weight", decimal),
    ("count", lambda rng: rng.randrange(1000)),
    ("number", lambda rng: rng.randrange(10000)),
    ("temperature", lambda rng: rng.randrange(-20, 41)),
    ("distance", lambda rng: rng.randrange(1, 2000)),
    ("city", city),
    ("owner", person),
    ("name", person),
    ("contact", person),
    ("title", pair),
    ("category", noun),
    ("code", draw_code),
    ("reference", draw_code),
    ("color", lambda rng: rng.choice(("red", "blue", "green", "black", "white", "yellow"))),
    ("date", lambda rng: f"{rng.randrange(2020, 2031)}-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}"),
    ("time", lambda rng: f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"),
)
_ASKS = (
    "Tell me the {field}.",
    "What is the {field}?",
    "I want to know the {field}.",
    "I need the {field}.",
    "Which {field} does it have?",
)
_FOLLOW_UPS = ("And the {field}?", "What is the {field}?", "Tell me the {field} too.", "And what about the {field}?")
_ERRORS = (
    "not found",
    "access denied",
    "timeout",
    "invalid argument",
    "service unavailable",
    "no such file",
    "rate limit reached",
    "connection lost",
)
_CONDITIONS = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "clear")
_FOLLOW_UP_SHARE, _ERROR_SHARE, _KNOWN_SHARE = 0.25, 0.12, 0.15


@dataclass(frozen=True, slots=True)
class _Result:
    text: str
    """What the tool returned."""
    fields: Mapping[str, str]
    """As one says them."""
    error: str | None = None

    def answer(self, field: str) -> str:
        if self.error is not None:
            return f"The tool failed: {self.error}."
        return f"The {field} is {self.fields[field]}."

    def thought(self, field: str) -> str:
        if self.error is not None:
            return f"The result is an error: {self.error}."
        return f"The result has the {field}: {self.fields[field]}."


def tool_result(rng: random.Random, num_tokens: int | None) -> Example:
    """A call was made and its result is there; sometimes it is asked for twice."""
    del num_tokens
    if rng.random() < _KNOWN_SHARE:
        return _known(rng)
    tools = draw_tools(rng, rng.randint(1, 5))
    asked, call = request(rng, rng.choice(tools))
    result, (field, *others) = _draw_result(rng)
    thinking = draw_thinking(rng)
    messages: list[Mapping[str, Any]] = [
        {"role": "user", "content": f"{closed(asked)} {one_of(rng, _ASKS, field=field)}"},
        assistant_message(calling(thinking, (call,))),
        tool_message(0, result.text),
    ]
    answer = said(thinking, result.thought(field), result.answer(field))
    if others and result.error is None and rng.random() < _FOLLOW_UP_SHARE:
        other = rng.choice(others)
        messages += [assistant_message(answer), {"role": "user", "content": one_of(rng, _FOLLOW_UPS, field=other)}]
        answer = said(thinking, result.thought(other), result.answer(other))
    return _finished(rng, "tool_result", tools, messages, answer, thinking)


def tool_results(rng: random.Random, num_tokens: int | None) -> Example:
    """Two calls were made in parallel."""
    del num_tokens
    tools = draw_tools(rng, rng.randint(2, 5))
    first, second = rng.sample(tools, 2)
    (asked, call), (also_asked, other_call) = request(rng, first), request(rng, second)
    results = [_draw_result(rng), _draw_result(rng)]
    (one, (field, *_)), (other, (other_field, *_)) = results
    thinking = draw_thinking(rng)
    question = (
        f"{closed(asked)} {one_of(rng, _ASKS, field=field)} {closed(also_asked)} "
        f"{one_of(rng, _ASKS, field=other_field)}"
    )
    messages: list[Mapping[str, Any]] = [
        {"role": "user", "content": question},
        assistant_message(calling(thinking, (call, other_call))),
        tool_message(0, one.text),
        tool_message(1, other.text),
    ]
    answer = said(
        thinking,
        f"{one.thought(field)} {other.thought(other_field)}",
        f"{one.answer(field)} {other.answer(other_field)}",
    )
    return _finished(rng, "tool_results", tools, messages, answer, thinking)


def _known(rng: random.Random) -> Example:
    """Weather and time, as people try first."""
    place = city(rng)
    weather = rng.random() < 0.6
    tool = KNOWN[0] if weather else KNOWN[1]
    asked, call = request(rng, tool)
    while "city" not in call.arguments:
        asked, call = request(rng, tool)
    place = call.arguments["city"]
    if weather:
        degrees, sky = rng.randrange(-15, 40), rng.choice(_CONDITIONS)
        result = {"city": place, "temperature": degrees, "condition": sky}
        if rng.random() < 0.3:
            result.pop("city")
        content, found = f"It is {degrees} degrees and {sky} in {place}.", f"{degrees} degrees, {sky}"
    else:
        clock = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
        result = {"time": clock}
        content, found = f"It is {clock} in {place}.", clock
    tools = [tool, *(other for other in draw_tools(rng, rng.randint(0, 3)) if other.name != tool.name)]
    rng.shuffle(tools)
    thinking = draw_thinking(rng)
    messages: list[Mapping[str, Any]] = [
        {"role": "user", "content": asked},
        assistant_message(calling(thinking, (call,))),
        tool_message(0, json.dumps(result)),
    ]
    answer = said(thinking, f"The result says {found}.", content)
    return _finished(rng, "tool_result", tools, messages, answer, thinking)


def _draw_result(rng: random.Random) -> tuple[_Result, list[str]]:
    """A result and its fields, the one to ask for first."""
    chosen = rng.sample(_FIELDS, rng.randint(1, 4))
    fields = {name: draw(rng) for name, draw in chosen}
    names = list(fields)
    rng.shuffle(names)
    if rng.random() < _ERROR_SHARE:
        error = rng.choice(_ERRORS)
        text = json.dumps({"error": error}) if rng.random() < 0.7 else f"Error: {error}"
        return _Result(text, {}, error), names
    said_fields = {name: str(value) for name, value in fields.items()}
    match rng.choice(("json", "json", "json", "compact", "lines", "words")):
        case "json":
            text = json.dumps(fields)
        case "compact":
            text = json.dumps(fields, separators=(",", ":"))
        case "lines":
            text = "\n".join(f"{name}: {value}" for name, value in said_fields.items())
        case _:
            text = " ".join(f"The {name} is {value}." for name, value in said_fields.items())
    return _Result(text, said_fields), names


def _finished(
    rng: random.Random,
    task: str,
    tools: Sequence[Tool],
    messages: Sequence[Mapping[str, Any]],
    answer: Answer,
    thinking: bool,
) -> Example:
    definitions = [tool.definition() for tool in tools]
    return finished(rng, task, messages, answer, thinking=thinking, tools=definitions)
