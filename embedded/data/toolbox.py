"""Tools that nobody has seen before: names, descriptions and schemas, and values for their parameters.

Most are put together from a verb, a thing and parameters, so that only reading the definitions tells what they take.
Some are those that people try first.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from embedded.data.facts import draw_code
from embedded.data.seeds import with_articles
from embedded.data.words import ADJECTIVES, CITIES, FIRST_NAMES, NOUNS, THINGS, VERBS

Draw = Callable[[random.Random], Any]


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    words: str
    """The name as one says it."""
    schema: dict[str, Any]
    draw: Draw
    """A value that fits the schema."""
    required: bool = True


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    description: str
    parameters: tuple[Parameter, ...]
    verb: str
    thing: str
    requests: tuple[str, ...] = ()
    """What a user says, with `{name}` for each parameter that it mentions; empty for tools that are put together."""

    def definition(self) -> dict[str, Any]:
        """As a request has it."""
        schema: dict[str, Any] = {"type": "object", "properties": {p.name: p.schema for p in self.parameters}}
        required = [p.name for p in self.parameters if p.required]
        if required:
            schema["required"] = required
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": schema},
        }


_OPAQUE_SHARE, _CAMEL_SHARE, _PREFIX_SHARE, _DESCRIBED_SHARE = 0.12, 0.12, 0.3, 0.7
_PREFIXES = ("first", "new", "old", "target", "source", "main", "total", "start", "end", "other", "next", "last")
_DESCRIPTIONS = (
    "{Verb} a {thing}.",
    "{Verb} the {thing}.",
    "Use this to {verb} a {thing}.",
    "This tool can {verb} a {thing}.",
    "Call it to {verb} the {thing}.",
    "{Verb} one {thing} of the user.",
)
_PARAMETER_DESCRIPTIONS = (
    "The {words}.",
    "{Words}",
    "The {words} of the {thing}.",
    "Which {words}.",
    "{Words} to use.",
)


def draw_tool(rng: random.Random, verb: str | None = None, thing: str | None = None) -> Tool:
    """A tool put together, for these words where they are given."""
    verb, thing = verb or rng.choice(VERBS), thing or rng.choice(THINGS)
    camel = rng.random() < _CAMEL_SHARE
    if rng.random() < _OPAQUE_SHARE:
        name = f"{rng.choice(('tool', 'action', 'service', 'function'))}_{rng.randrange(100)}"
    else:
        name = spelled(f"{verb} {thing}", camel)
    form = rng.choice(_DESCRIPTIONS)
    description = with_articles(form.format(verb=verb, Verb=verb.capitalize(), thing=thing))
    parameters = draw_parameters(rng, thing, rng.choice((0, 1, 1, 2, 2, 2, 3, 3, 4)), camel=camel)
    return Tool(name, description, parameters, verb, thing)


def draw_tools(rng: random.Random, count: int) -> list[Tool]:
    """Different tools; some share a verb or a thing."""
    tools: dict[str, Tool] = {}
    pairs: set[tuple[str, str]] = set()
    while len(tools) < count:
        draw = rng.random()
        if draw < 0.2:
            tool = rng.choice(KNOWN)
        elif draw < 0.6 and tools:
            other = rng.choice(list(tools.values()))
            tool = draw_tool(rng, other.verb, None) if rng.random() < 0.5 else draw_tool(rng, None, other.thing)
        else:
            tool = draw_tool(rng)
        if (tool.verb, tool.thing) not in pairs:
            pairs.add((tool.verb, tool.thing))
            tools.setdefault(tool.name, tool)
    return list(tools.values())


def spelled(words: str, camel: bool) -> str:
    """Words as a name: snake_case, or camelCase."""
    first, *others = words.split()
    return first + "".join(word.capitalize() for word in others) if camel else "_".join((first, *others))


def draw_parameters(rng: random.Random, thing: str, most: int, *, camel: bool) -> tuple[Parameter, ...]:
    """Up to so many parameters with different names; the first one is required."""
    chosen: dict[str, Parameter] = {}
    for _ in range(most):
        kind = rng.choice(_KINDS)
        words, schema, draw = kind(rng)
        if rng.random() < _PREFIX_SHARE:
            words = f"{rng.choice(_PREFIXES)} {words}"
        name = spelled(words, camel)
        if rng.random() < _DESCRIBED_SHARE:
            form = rng.choice(_PARAMETER_DESCRIPTIONS)
            schema = {**schema, "description": form.format(words=words, Words=words.capitalize(), thing=thing)}
        chosen[name] = Parameter(name, words, schema, draw, required=not chosen or rng.random() < 0.7)
    return tuple(chosen.values())


def _text(rng: random.Random) -> tuple[str, dict[str, Any], Draw]:
    words, draw = rng.choice(_TEXTS)
    return words, {"type": "string"}, draw


def _integer(rng: random.Random) -> tuple[str, dict[str, Any], Draw]:
    most = rng.choice((10, 100, 1000, 10000))
    return rng.choice(_INTEGERS), {"type": "integer"}, lambda rng: rng.randrange(1, most)


def _number(rng: random.Random) -> tuple[str, dict[str, Any], Draw]:
    return rng.choice(_NUMBERS), {"type": "number"}, decimal


def _boolean(rng: random.Random) -> tuple[str, dict[str, Any], Draw]:
    return rng.choice(_BOOLEANS), {"type": "boolean"}, lambda rng: rng.random() < 0.5


def _enum(rng: random.Random) -> tuple[str, dict[str, Any], Draw]:
    words, known = rng.choice(_ENUMS)
    values = rng.sample(known, rng.randint(2, len(known)))
    return words, {"type": "string", "enum": values}, lambda rng: rng.choice(values)


def _array(rng: random.Random) -> tuple[str, dict[str, Any], Draw]:
    words, source = rng.choice(_ARRAYS)
    schema = {"type": "array", "items": {"type": "string"}}
    return words, schema, lambda rng: rng.sample(source, rng.randint(1, 3))


def _object(rng: random.Random) -> tuple[str, dict[str, Any], Draw]:
    words, (first, of_first), (second, of_second) = rng.choice(_OBJECTS)
    properties = {first: {"type": "string"}, second: {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "required": [first, second]}
    return words, schema, lambda rng: {first: of_first(rng), second: of_second(rng)}


_KINDS = (_text, _text, _text, _text, _integer, _integer, _integer, _number, _boolean, _enum, _enum, _array, _object)


def city(rng: random.Random) -> str:
    return rng.choice(CITIES)


def person(rng: random.Random) -> str:
    return rng.choice(FIRST_NAMES)


def noun(rng: random.Random) -> str:
    return rng.choice(NOUNS)


def pair(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def decimal(rng: random.Random) -> float:
    """One digit behind the point, never a zero: there is one way to write it."""
    return rng.randrange(0, 200) + rng.randint(1, 9) / 10


_TEXTS: tuple[tuple[str, Draw], ...] = (
    *((words, city) for words in ("city", "place", "destination", "location", "origin")),
    *((words, person) for words in ("name", "owner", "recipient", "author", "user", "guest")),
    *((words, noun) for words in ("topic", "category", "item", "keyword", "kind")),
    *((words, pair) for words in ("title", "subject", "text", "query", "label")),
    *((words, draw_code) for words in ("id", "code", "reference")),
)
_INTEGERS = ("count", "number", "limit", "size", "age", "floor", "page", "amount", "quantity", "days", "seats", "year")
_NUMBERS = ("price", "weight", "height", "length", "rate", "distance", "width", "speed")
_BOOLEANS = ("urgent", "express", "public", "gift", "confirmed", "archived", "visible", "paid")
_ENUMS: tuple[tuple[str, Sequence[str]], ...] = (
    ("unit", ("celsius", "fahrenheit", "kelvin")),
    ("priority", ("low", "medium", "high")),
    ("format", ("pdf", "csv", "text", "json")),
    ("size", ("small", "medium", "large")),
    ("color", ("red", "blue", "green", "black", "white")),
    ("direction", ("ascending", "descending")),
    ("mode", ("fast", "normal", "slow")),
    ("status", ("open", "closed", "waiting")),
    ("language", ("english", "german", "french", "spanish")),
)
_ARRAYS: tuple[tuple[str, Sequence[str]], ...] = (
    ("tags", NOUNS),
    ("items", NOUNS),
    ("names", FIRST_NAMES),
    ("guests", FIRST_NAMES),
    ("cities", CITIES),
)
_OBJECTS: tuple[tuple[str, tuple[str, Draw], tuple[str, Draw]], ...] = (
    ("address", ("city", city), ("number", lambda rng: rng.randrange(1, 200))),
    ("customer", ("name", person), ("age", lambda rng: rng.randrange(18, 90))),
    ("filter", ("field", noun), ("limit", lambda rng: rng.randrange(1, 100))),
)


def _of(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, **more}


def _file(rng: random.Random) -> str:
    return f"{rng.choice(NOUNS)}.{rng.choice(('txt', 'md', 'py', 'json', 'csv'))}"


def _symbol(rng: random.Random) -> str:
    return "".join(rng.choice("ABCDEFGHIKLMNOPRST") for _ in range(4))


def _currency(rng: random.Random) -> str:
    return rng.choice(("EUR", "USD", "GBP", "JPY", "CHF"))


def _expression(rng: random.Random) -> str:
    return f"{rng.randrange(1, 1000)} {rng.choice('+-*/')} {rng.randrange(1, 1000)}"


def _minutes(rng: random.Random) -> int:
    return rng.randrange(1, 91)


_CITY = Parameter("city", "city", _of("string", description="The name of the city."), city)
_TEMPERATURE = _of("string", enum=["celsius", "fahrenheit"])
_UNIT = Parameter("unit", "unit", _TEMPERATURE, lambda rng: rng.choice(("celsius", "fahrenheit")), False)
_TEXT_OF = _of("string")

KNOWN: tuple[Tool, ...] = (
    Tool(
        "get_weather",
        "Get the current weather for a city.",
        (_CITY, _UNIT),
        "get",
        "weather",
        (
            "What is the weather in {city}?",
            "How is the weather in {city}?",
            "What's the weather like in {city} today?",
            "Tell me the weather in {city} in {unit}.",
            "How warm is it in {city} in {unit}?",
        ),
    ),
    Tool(
        "get_time",
        "Get the current time in a city.",
        (_CITY,),
        "get",
        "time",
        ("What time is it in {city}?", "How late is it in {city}?", "Tell me the time in {city}."),
    ),
    Tool(
        "send_email",
        "Send an email.",
        (
            Parameter("to", "to", _of("string", description="The recipient."), person),
            Parameter("subject", "subject", _TEXT_OF, pair),
            Parameter("body", "body", _TEXT_OF, pair),
        ),
        "send",
        "email",
        (
            'Send an email to {to} with the subject "{subject}" and the text "{body}".',
            'Write {to} an email about "{subject}" that says "{body}".',
        ),
    ),
    Tool(
        "search_web",
        "Search the web.",
        (Parameter("query", "query", _of("string", description="What to search for."), pair),),
        "search",
        "web",
        ("Search the web for {query}.", "Look for {query} on the web.", "Google {query} for me."),
    ),
    Tool(
        "calculate",
        "Evaluate an arithmetic expression.",
        (Parameter("expression", "expression", _TEXT_OF, _expression),),
        "calculate",
        "expression",
        ("Use the calculator for {expression}.", "Evaluate {expression} with the tool.", "Calculate {expression}."),
    ),
    Tool(
        "read_file",
        "Read a file and return its content.",
        (Parameter("path", "path", _of("string", description="Path of the file."), _file),),
        "read",
        "file",
        ("Show me the file {path}.", "What is in {path}?", "Read {path}.", "Open the file {path}."),
    ),
    Tool(
        "get_stock_price",
        "Get the price of a stock.",
        (Parameter("symbol", "symbol", _TEXT_OF, _symbol),),
        "get",
        "stock",
        ("What is the price of the stock {symbol}?", "How much is {symbol} worth?"),
    ),
    Tool(
        "convert_currency",
        "Convert an amount of money.",
        (
            Parameter("amount", "amount", _of("number"), lambda rng: rng.randrange(1, 1000)),
            Parameter("from", "from", _TEXT_OF, _currency),
            Parameter("to", "to", _TEXT_OF, _currency),
        ),
        "convert",
        "currency",
        ("Convert {amount} {from} to {to}.", "How much is {amount} {from} in {to}?"),
    ),
    Tool(
        "book_flight",
        "Book a flight between two cities.",
        (Parameter("origin", "origin", _TEXT_OF, city), Parameter("destination", "destination", _TEXT_OF, city)),
        "book",
        "flight",
        ("Book a flight from {origin} to {destination}.", "I want to fly from {origin} to {destination}."),
    ),
    Tool(
        "set_timer",
        "Start a timer.",
        (Parameter("minutes", "minutes", _of("integer"), _minutes),),
        "set",
        "timer",
        ("Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes."),
    ),
    Tool("list_files", "List the files of the folder.", (), "list", "files", ("Which files are there?", "List files.")),
)
