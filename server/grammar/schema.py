"""JSON Schemas as the grammar library can keep them: what it cannot do is found here, by keyword and place.

A keyword is kept exactly, or it is refused; for a tool that is not strict it may be left out instead, and is named in
`Reading.left_out`. Keywords that the specification does not know are annotations and have no effect.
"""

import json
from collections.abc import Callable
from typing import Any

DEEPEST = 64
"""Levels of schemas within schemas."""
FORMATS = frozenset(
    ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
)
_ALWAYS: Callable[[Any], bool] = lambda _: False  # noqa: E731
# Assertions of any draft that are not kept, with the values that ask for nothing.
_UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("not", "if", "then", "else", "contains", "unevaluatedItems", "unevaluatedProperties"), _ALWAYS),
    **dict.fromkeys(("dependentSchemas", "dependentRequired", "dependencies"), lambda value: value == {}),
    **dict.fromkeys(("minContains", "maxContains", "disallow", "extends", "divisibleBy"), _ALWAYS),
    **dict.fromkeys(("$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor"), _ALWAYS),
    "uniqueItems": lambda value: value is False,
    "nullable": lambda value: value is False,
    # Every name is a string already.
    "propertyNames": lambda value: value is True or value in ({}, {"type": "string"}),
    "additionalItems": _ALWAYS,
    "x-guidance": _ALWAYS,
}
_ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "example", "$comment", "deprecated", "readOnly", "writeOnly")
)
_ONE = ("additionalProperties", "items")
_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "$def")
_COUNTS = frozenset(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"))
_TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")


class SchemaError(ValueError):
    """A schema that cannot be kept; the message names keyword and place and may be read by a client."""


class Reading:
    """How one schema is read."""

    def __init__(self, *, lenient: bool = False) -> None:
        """lenient: leave out what cannot be kept."""
        self.lenient = lenient
        self.left_out: list[str] = []
        """Keywords with their places."""

    def read(self, schema: Any, place: str = "#", depth: int = 0) -> Any:
        """A copy with only what the library keeps. Raises SchemaError."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise SchemaError(f"expected an object or a boolean at {place}, found {_kind(schema)}")
        if depth > DEEPEST:
            raise SchemaError(f"more than {DEEPEST} levels of schemas at {place[:80]}")
        kept: dict[str, Any] = {}
        for keyword, value in schema.items():
            if keyword in _ANNOTATIONS:
                continue
            neutral = _UNSUPPORTED.get(keyword)
            if neutral is not None:
                if not neutral(value):
                    self._refuse(keyword, place)
                continue
            if keyword == "items" and isinstance(value, list):
                self._refuse("items", place, "a list of schemas is written `prefixItems`")
                continue
            if keyword == "format" and isinstance(value, str) and value not in FORMATS:
                self._refuse("format", place, f"format {json.dumps(value[:40])} is not known")
                continue
            kept[keyword] = self._value(keyword, value, place, depth)
        _check_types(kept, place)
        if self.lenient and "oneOf" in kept and "anyOf" not in kept:
            kept["anyOf"] = kept.pop("oneOf")
        return kept

    def _value(self, keyword: str, value: Any, place: str, depth: int) -> Any:
        here = f"{place}/{keyword}"
        if keyword in _ONE:
            return self.read(value, here, depth + 1)
        if keyword in _LISTS:
            if not isinstance(value, list):
                raise SchemaError(f"{keyword} must be a list of schemas at {place}")
            return [self.read(each, f"{here}/{n}", depth + 1) for n, each in enumerate(value)]
        if keyword in _MAPS:
            if not isinstance(value, dict):
                raise SchemaError(f"{keyword} must be an object of schemas at {place}")
            return {name: self.read(each, f"{here}/{name}", depth + 1) for name, each in value.items()}
        if keyword in _COUNTS and isinstance(value, float) and value.is_integer():
            return int(value)
        return value

    def _refuse(self, keyword: str, place: str, why: str = "it cannot be enforced") -> None:
        if not self.lenient:
            raise SchemaError(f"the keyword `{keyword}` at {place} is not supported: {why}")
        self.left_out.append(f"{place}/{keyword}")


def completed(schema: Any) -> Any:
    """A strict tool's schema with what it leaves unsaid: objects are closed, and all their properties are required.

    Raises SchemaError where it says the opposite.
    """
    if not isinstance(schema, dict):
        return schema
    done = dict(schema)
    for keyword in _ONE:
        if keyword in done:
            done[keyword] = completed(done[keyword])
    for keyword in _LISTS:
        if keyword in done:
            done[keyword] = [completed(each) for each in done[keyword]]
    for keyword in _MAPS:
        if keyword in done:
            done[keyword] = {name: completed(each) for name, each in done[keyword].items()}
    if "properties" in done:
        done.setdefault("additionalProperties", False)
        done.setdefault("required", list(done["properties"]))
        if done["additionalProperties"] is True:
            raise SchemaError("the keyword `additionalProperties` must be false in a strict tool")
        if set(done["required"]) != set(done["properties"]):
            raise SchemaError("the keyword `required` must name every property in a strict tool")
    return done


def resolve(pointer: Any, root: Any) -> Any:
    """What a `$ref` within one document points to. Raises SchemaError."""
    if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
        raise SchemaError(f"the keyword `$ref` can only point into the same schema, found {json.dumps(pointer)[:80]}")
    target = root
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(target, list) and name.isdigit() and int(name) < len(target):
            target = target[int(name)]
        elif isinstance(target, dict) and name in target:
            target = target[name]
        else:
            raise SchemaError(f"the keyword `$ref` points to {json.dumps(pointer)[:80]}, which does not exist")
    return target


def standalone(schema: Any, root: Any) -> Any:
    """A part of a schema with the definitions that it needs, as a document of its own."""
    names: dict[str, str] = {}
    definitions: dict[str, Any] = {}

    def rewritten(node: Any) -> Any:
        if isinstance(node, list):
            return [rewritten(each) for each in node]
        if not isinstance(node, dict):
            return node
        # Definitions are reached by reference only; values of const, enum and their like are data.
        copy = {k: v if k in _DATA else rewritten(v) for k, v in node.items() if k not in _DEFINITIONS or k in names}
        if isinstance(node.get("$ref"), str):
            pointer = node["$ref"]
            if pointer not in names:
                names[pointer] = f"d{len(names)}"
                target = resolve(pointer, root)
                definitions[names[pointer]] = rewritten(target)
            copy["$ref"] = f"#/$defs/{names[pointer]}"
        return copy

    alone = rewritten(schema)
    return {**alone, "$defs": definitions} if definitions and isinstance(alone, dict) else alone


_DATA = frozenset(("const", "enum", "default", "examples", "required"))
_DEFINITIONS = frozenset(("$defs", "definitions", "$def", "$schema", "$id"))


def _check_types(schema: dict[str, Any], place: str) -> None:
    types = schema.get("type", [])
    for name in (types,) if isinstance(types, str) else types if isinstance(types, list) else ("",):
        if name not in _TYPES:
            raise SchemaError(f"the keyword `type` at {place} names no type: {json.dumps(types)[:80]}")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise SchemaError(f"the keyword `required` at {place} must be a list of names")
    if not isinstance(schema.get("enum", []), list):
        raise SchemaError(f"the keyword `enum` at {place} must be a list")


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", type(None): "null"}
    return names.get(type(value), "a number")
