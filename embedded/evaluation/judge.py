"""Whether an answer is right. Exact: text after strip, calls by name and arguments as JSON; no partial credit."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from embedded.data.example import Example
from embedded.evaluation.client import Reply

Judge = Callable[[Example, Reply], str | None]
"""None where the answer is right, else what was expected and found."""

_SHOWN = 160


def judge_answer(example: Example, reply: Reply) -> str | None:
    """The calls are those of the example, in order, and the content is its content. Reasoning is not looked at."""
    expected = [(call.name, dict(call.arguments)) for call in example.answer.calls]
    try:
        found = [(name, json.loads(arguments)) for name, arguments in reply.calls]
    except ValueError:
        return difference(expected, reply.calls)
    if not same_json(expected, found):
        return difference(expected, found)
    return judge_content(example, reply)


def judge_content(example: Example, reply: Reply) -> str | None:
    expected, found = example.answer.content.strip(), reply.content.strip()
    return None if expected == found else difference(expected, found)


def judge_json(example: Example, reply: Reply) -> str | None:
    """The content is one JSON object with exactly the keys of the expected one, each value of the type that the
    request's schema, or the expected value, has. Values may differ."""
    expected = json.loads(example.answer.content)
    try:
        found = json.loads(reply.content)
    except ValueError:
        return difference("JSON", reply.content)
    if not isinstance(found, dict) or found.keys() != expected.keys():
        return difference(sorted(expected), found)
    properties = _properties(example)
    for name, value in found.items():
        if not has_type(value, properties.get(name) or _schema_like(expected[name])):
            return difference(f"{name}: {properties.get(name) or expected[name]}", value)
    return None


def same_json(one: Any, other: Any) -> bool:
    """Equal JSON values: members of objects in any order, 1 equal to 1.0 and not to true."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_json, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def has_type(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether `value` is of the type, of the enumeration and made of the parts that `schema` names."""
    if "enum" in schema and not any(same_json(value, choice) for choice in schema["enum"]):
        return False
    match schema.get("type"):
        case "string":
            return isinstance(value, str)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "boolean":
            return isinstance(value, bool)
        case "array":
            return isinstance(value, list) and all(has_type(item, schema.get("items") or {}) for item in value)
        case "object":
            return isinstance(value, dict) and _has_members(value, schema)
        case "null":
            return value is None
        case _:
            return True


def difference(expected: object, found: object) -> str:
    return f"expected {_shown(expected)}, found {_shown(found)}"


def _has_members(value: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    properties = schema.get("properties") or {}
    return all(name in value for name in schema.get("required") or ()) and all(
        has_type(member, properties.get(name) or {}) for name, member in value.items()
    )


def _properties(example: Example) -> Mapping[str, Mapping[str, Any]]:
    wanted = example.response_format or {}
    schema = (wanted.get("json_schema") or {}).get("schema") or {}
    properties: Mapping[str, Mapping[str, Any]] = schema.get("properties") or {}
    return properties


def _schema_like(value: Any) -> dict[str, Any]:
    """The type of a value that came without a schema."""
    if isinstance(value, bool):
        return {"type": "boolean"}
    if isinstance(value, int | float):
        return {"type": "number"}
    if isinstance(value, str):
        return {"type": "string"}
    if isinstance(value, list):
        return {"type": "array"}
    return {"type": "object"} if isinstance(value, dict) else {}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
