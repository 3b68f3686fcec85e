"""JSON from facts in a message, with a schema, with a bare wish for JSON, or in the user's words only."""

import json
import random
from typing import Any

from embedded.data.conversation import conversation, draw_thinking, listed, one_of, said
from embedded.data.example import Example
from embedded.data.filler import NUM_SENTENCES, sentence
from embedded.data.tool_requests import shown, statement
from embedded.data.toolbox import Parameter, draw_parameters
from embedded.data.words import THINGS

_SCHEMA_SHARE, _OBJECT_SHARE = 0.6, 0.25
_WISHES = (
    "Give it as JSON.",
    "Write this as JSON.",
    "Return it as JSON.",
    "Extract the data as JSON.",
    "As JSON, please.",
    "Turn this into JSON.",
)
_KEY_WISHES = (
    "Answer as a JSON object with the keys {keys}.",
    "Return JSON with the keys {keys}.",
    "Give me {keys} as JSON.",
    "Write a JSON object with {keys}.",
    "Extract {keys} as a JSON object.",
)


def structured(rng: random.Random, num_tokens: int | None) -> Example:
    """One object in one line, keys in the order of the schema or of the request."""
    del num_tokens
    thing = rng.choice(THINGS)
    fields = draw_parameters(rng, thing, rng.randint(1, 5), camel=rng.random() < 0.1)
    values = {field.name: field.draw(rng) for field in fields}
    text = _facts(rng, fields, values)
    keys = listed([field.name for field in fields])
    draw = rng.random()
    response_format: dict[str, Any] | None = None
    if draw < _SCHEMA_SHARE:
        wish = rng.choice(_WISHES) if rng.random() < 0.7 else one_of(rng, _KEY_WISHES, keys=keys)
        response_format = _format_of(rng, thing, fields)
    else:
        wish = one_of(rng, _KEY_WISHES, keys=keys)
        if draw < _SCHEMA_SHARE + _OBJECT_SHARE:
            response_format = {"type": "json_object"}
    asked = rng.choice((f"{text}\n\n{wish}", f"{text} {wish}", f"{wish}\n\n{text}"))
    thinking = draw_thinking(rng)
    answer = said(thinking, f"The keys are {keys}.", json.dumps(values, ensure_ascii=False))
    kind = "none" if response_format is None else response_format["type"]
    return conversation(
        rng, "json", [(asked, answer)], thinking=thinking, response_format=response_format, details={"format": kind}
    )


def _facts(rng: random.Random, fields: tuple[Parameter, ...], values: dict[str, Any]) -> str:
    told = list(fields)
    if rng.random() < 0.5:
        rng.shuffle(told)
    if rng.random() < 0.3:
        return "\n".join(f"{field.words}: {shown(rng, values[field.name])}" for field in told)
    sentences = [statement(rng, field, values[field.name]) for field in told]
    if rng.random() < 0.3:
        sentences.insert(rng.randrange(len(sentences) + 1), sentence(rng.randrange(NUM_SENTENCES)))
    return " ".join(sentences)


def _format_of(rng: random.Random, thing: str, fields: tuple[Parameter, ...]) -> dict[str, Any]:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {field.name: field.schema for field in fields},
        "required": [field.name for field in fields],
    }
    if rng.random() < 0.7:
        schema["additionalProperties"] = False
    named: dict[str, Any] = {"name": thing, "schema": schema}
    if rng.random() < 0.5:
        named["strict"] = True
    return {"type": "json_schema", "json_schema": named}
