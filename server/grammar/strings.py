"""Schemas of strings as terminals for raw text: a string parameter of a tool call stands in the answer as it is,
without quotes and escapes, so the library's JSON strings do not fit it."""

import json
from collections.abc import Iterator
from typing import Any

from llguidance import regex_to_lark

from server.grammar.schema import SchemaError, resolve

ANY_TEXT = "/(?s:.*)/"
_MOST_REFS = 32

_LEAP = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = (
    r"(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    rf"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = (
    r"(?:(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
    r"|23:59:60(?:\.[0-9]+)?[Zz])"
)
_DAY_TIME = r"T(?:[0-9]+S|[0-9]+M(?:[0-9]+S)?|[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?)"
_DAYS = r"(?:[0-9]+D|[0-9]+M(?:[0-9]+D)?|[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?)"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL})*"
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"{_OCTET}(?:\.{_OCTET}){{3}}"
_HEX = r"[0-9A-Fa-f]{1,4}"
_LAST32 = rf"(?:{_HEX}:{_HEX}|{_IPV4})"
_IPV6 = "|".join(
    (
        rf"(?:{_HEX}:){{6}}{_LAST32}",
        rf"::(?:{_HEX}:){{5}}{_LAST32}",
        rf"(?:{_HEX})?::(?:{_HEX}:){{4}}{_LAST32}",
        *(rf"(?:(?:{_HEX}:){{0,{n}}}{_HEX})?::(?:{_HEX}:){{{4 - n}}}{_LAST32}" for n in (1, 2, 3, 4)),
        rf"(?:(?:{_HEX}:){{0,5}}{_HEX})?::{_HEX}",
        rf"(?:(?:{_HEX}:){{0,6}}{_HEX})?::",
    )
)
_PCHAR = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}[Tt]{_TIME}",
    "duration": rf"P(?:[0-9]+W|{_DAYS}(?:{_DAY_TIME})?|{_DAY_TIME})",
    "email": rf"{_ATOM}(?:\.{_ATOM})*@{_HOST}",
    "hostname": _HOST,
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "uuid": r"[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}",
    "uri": rf"[A-Za-z][A-Za-z0-9+.-]*:(?:{_PCHAR}|/)*(?:\?(?:{_PCHAR}|[/?])*)?(?:#(?:{_PCHAR}|[/?])*)?",
    "unknown": r"(?s:.*)",
}
"""Of the schema's `format`, for the whole text. A leap second is one in UTC, an `email` has no quoted part, and a `uri`
no host in brackets."""
_MOST_HOST = 253


def literal(text: str) -> str:
    """A text as a literal of the grammar."""
    return json.dumps(text, ensure_ascii=False)


def text_terminal(schema: Any, root: Any, *, refs: int = 0) -> str | None:
    """What a terminal may hold so that the text, as a JSON string, satisfies the schema; None when no string does.

    Raises SchemaError for what only a JSON parser could decide.
    """
    if isinstance(schema, bool):
        return ANY_TEXT if schema else None
    types = schema.get("type", "string")
    if "string" not in ((types,) if isinstance(types, str) else types):
        return None
    parts: list[str | None] = []
    if "const" in schema:
        parts.append(_one_of([schema["const"]]))
    if "enum" in schema:
        parts.append(_one_of(schema["enum"]))
    if "pattern" in schema:
        parts.append(containing(schema["pattern"]))
    if "format" in schema and schema["format"] in FORMATS:
        parts.append(f"/{regex_to_lark(FORMATS[schema['format']], '')}/")
        if schema["format"] == "hostname":
            parts.append(f"/(?s:.{{1,{_MOST_HOST}}})/")
    if "minLength" in schema or "maxLength" in schema:
        parts.append(_length(schema.get("minLength", 0), schema.get("maxLength")))
    if "$ref" in schema:
        if refs >= _MOST_REFS:
            raise SchemaError("the keyword `$ref` refers to itself")
        parts.append(text_terminal(resolve(schema["$ref"], root), root, refs=refs + 1))
    for branch in schema.get("allOf", ()):
        parts.append(text_terminal(branch, root, refs=refs + 1))
    if "anyOf" in schema:
        parts.append(_either([text_terminal(branch, root, refs=refs + 1) for branch in schema["anyOf"]]))
    if "oneOf" in schema:
        parts.append(_exactly_one([text_terminal(branch, root, refs=refs + 1) for branch in schema["oneOf"]]))
    kept = [part for part in parts if part is not None]
    if len(kept) < len(parts):
        return None
    kept = [part for part in kept if part != ANY_TEXT]
    return " & ".join(kept) if kept else ANY_TEXT


def containing(pattern: Any) -> str:
    """Texts that a JSON Schema pattern matches somewhere: it is not anchored. Raises SchemaError."""
    if not isinstance(pattern, str):
        raise SchemaError("the keyword `pattern` must be a string")
    branches = []
    for branch in _alternatives(pattern):
        begins, ends = branch.startswith("^"), _ends_anchored(branch)
        body = branch[1 if begins else 0 : len(branch) - 1 if ends else len(branch)]
        if _has_anchor(body):
            raise SchemaError("the keyword `pattern` may have ^ and $ at its ends only")
        before, after = "" if begins else "(?s:.*)", "" if ends else "(?s:.*)"
        branches.append(f"{before}(?:{body}){after}")
    return f"/{regex_to_lark('|'.join(branches), 'dw')}/"


def _one_of(values: list[Any]) -> str | None:
    return _either([literal(value) for value in values if isinstance(value, str)])


def _either(parts: list[str | None]) -> str | None:
    kept = [part for part in parts if part is not None]
    if not kept:
        return None
    return ANY_TEXT if ANY_TEXT in kept else f"({' | '.join(f'({part})' for part in dict.fromkeys(kept))})"


def _exactly_one(parts: list[str | None]) -> str | None:
    kept = [part for part in parts if part is not None]
    if len(kept) < 2:
        return kept[0] if kept else None
    lines = []
    for n, part in enumerate(kept):
        others = " | ".join(f"({other})" for m, other in enumerate(kept) if m != n)
        lines.append(f"(({part}) & ~({others}))")
    return f"({' | '.join(lines)})"


def _length(least: Any, most: Any) -> str:
    for keyword, value in (("minLength", least), ("maxLength", most)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise SchemaError(f"the keyword `{keyword}` must be a non-negative integer")
    if most is not None and most < least:
        raise SchemaError("the keyword `maxLength` is less than `minLength`")
    return f"/(?s:.{{{least},{'' if most is None else most}}})/"


def _operators(pattern: str) -> Iterator[tuple[int, str]]:
    """Characters of a pattern, with their places, that are neither escaped nor in a class."""
    in_class, n = False, 0
    while n < len(pattern):
        character = pattern[n]
        if character == "\\":
            n += 1
        elif in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
        else:
            yield n, character
        n += 1


def _alternatives(pattern: str) -> list[str]:
    """A pattern's branches at its outermost level."""
    branches, start, depth = [], 0, 0
    for n, character in _operators(pattern):
        if character in "()":
            depth += 1 if character == "(" else -1
        elif character == "|" and depth == 0:
            branches.append(pattern[start:n])
            start = n + 1
    return [*branches, pattern[start:]]


def _ends_anchored(branch: str) -> bool:
    if not branch.endswith("$"):
        return False
    escapes = len(branch) - 1 - len(branch[:-1].rstrip("\\"))
    return escapes % 2 == 0


def _has_anchor(body: str) -> bool:
    return any(character in "^$" for _, character in _operators(body))
