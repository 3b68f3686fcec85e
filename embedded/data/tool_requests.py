"""What a user says to have a tool called, and the call that is right."""

import json
import random
import string
from collections.abc import Sequence
from typing import Any

from embedded.data.conversation import listed
from embedded.data.example import Call
from embedded.data.seeds import with_articles
from embedded.data.toolbox import Parameter, Tool

_OPTIONAL_SHARE, _SHUFFLED_SHARE = 0.5, 0.3

_ORDERS = (
    "{Verb} the {thing}",
    "Please {verb} a {thing}",
    "Please {verb} the {thing}",
    "Can you {verb} a {thing}",
    "I want to {verb} a {thing}",
    "I need you to {verb} the {thing}",
    "{Verb} a {thing}",
    "Could you {verb} the {thing}",
)


def request(rng: random.Random, tool: Tool) -> tuple[str, Call]:
    """A request in a sentence or a few, and its call: arguments in the schema's order."""
    if tool.requests:
        return _known_request(rng, tool)
    chosen = [p for p in tool.parameters if p.required or rng.random() < _OPTIONAL_SHARE]
    values = {p.name: p.draw(rng) for p in chosen}
    told = list(chosen)
    if rng.random() < _SHUFFLED_SHARE:
        rng.shuffle(told)
    form = rng.choice(_ORDERS)
    order = with_articles(form.format(verb=tool.verb, Verb=tool.verb.capitalize(), thing=tool.thing))
    return _told(rng, order, told, values), Call(name=tool.name, arguments=values)


def _known_request(rng: random.Random, tool: Tool) -> tuple[str, Call]:
    form = rng.choice(tool.requests)
    mentioned = {field for _, field, _, _ in string.Formatter().parse(form) if field}
    values = {p.name: p.draw(rng) for p in tool.parameters if p.name in mentioned}
    return form.format(**values), Call(name=tool.name, arguments=values)


def _told(rng: random.Random, order: str, told: Sequence[Parameter], values: dict[str, Any]) -> str:
    mark = "?" if order.startswith(("Can", "Could")) else "."
    if not told:
        return order + mark
    long = any(isinstance(values[p.name], (list, dict)) for p in told)
    style = rng.choice(("is", "equals") if long else ("with", "with", "for", "is", "equals"))
    match style:
        case "with":
            said = listed([f"{p.words} {shown(rng, values[p.name])}" for p in told])
            return f"{order} with {said}{mark}"
        case "for":
            said = listed([f"the {p.words} {shown(rng, values[p.name])}" for p in told])
            return f"{order} for {said}{mark}"
        case "is":
            sentences = [statement(rng, p, values[p.name]) for p in told]
            return f"{order}{mark} {' '.join(sentences)}"
        case _:
            pairs = "; ".join(f"{p.words} = {shown(rng, values[p.name])}" for p in told)
            return f"{order}: {pairs}"


def statement(rng: random.Random, parameter: Parameter, value: Any) -> str:
    """A sentence that says what the value is."""
    if isinstance(value, list) and len(value) > 1:
        return f"The {parameter.words} are {listed(value)}."
    return f"The {parameter.words} is {shown(rng, value)}."


def shown(rng: random.Random, value: Any) -> str:
    """A value as one says it."""
    if isinstance(value, bool):
        return rng.choice(("true", "yes") if value else ("false", "no"))
    if isinstance(value, list):
        return ", ".join(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, str) and " " in value and rng.random() < 0.5:
        return json.dumps(value, ensure_ascii=False)
    return str(value)
