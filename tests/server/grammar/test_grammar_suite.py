"""The official JSON Schema Test Suite (draft 2020-12): every schema constrains exactly, or is refused by keyword.

Narrower than the specification, in three ways that the documentation names: an object has its properties in the
schema's order, a number has its own spelling (`1.0` is no integer, and not the constant `1`), and a known `format` is
an assertion. `NARROWER` lists the valid instances that fall to them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher

from engine.grammar.tokens import GrammarTokens
from server.grammar.messages import GrammarJob
from server.grammar.schema import FORMATS
from server.grammar.strings import text_terminal
from server.grammar.worker import Checker

SUITE = Path(__file__).parents[2] / "golden" / "json-schema-suite"
GROUPS = sorted(path.stem for path in SUITE.glob("*.json"))
KEYWORDS = (
    *("unevaluatedProperties", "unevaluatedItems", "contains", "minContains", "maxContains", "if", "then", "else"),
    *("$dynamicAnchor", "$dynamicRef", "not", "oneOf", "propertyNames", "dependentSchemas", "dependentRequired"),
    *("uniqueItems", "$ref", "patternProperties", "multipleOf", "format"),
)
NARROWER = {
    # Order of properties.
    ("allOf", "allOf", "allOf"),
    ("allOf", "allOf with base schema", "valid"),
    ("const", "const with object", "same object with different property order is valid"),
    # Spelling of numbers.
    ("const", "const with 0 does not match other zero-like types", "float zero is valid"),
    ("const", "const with 1 does not match true", "float one is valid"),
    ("const", "const with -2.0 matches integer and float types", "float -2.0 is valid"),
    ("const", "float and integers are equal up to 64-bit representation limits", "float is valid"),
    ("enum", "enum with 0 does not match false", "float zero is valid"),
    ("enum", "enum with [0] does not match [false]", "[0.0] is valid"),
    ("enum", "enum with 1 does not match true", "float one is valid"),
    ("enum", "enum with [1] does not match [true]", "[1.0] is valid"),
    ("type", "integer type matches integers", "a float with zero fractional part is an integer"),
}
NARROWER_FORMATS = {
    "date-time": {"a valid date-time with a leap second, with minus offset"},
    "email": {
        "a quoted string with a space in the local part is valid",
        "a quoted string with a double dot in the local part is valid",
        "a quoted string with a @ in the local part is valid",
        "an IPv4-address-literal after the @ is valid",
        "an IPv6-address-literal after the @ is valid",
    },
    "time": {
        "valid leap second, zero time-offset",
        "valid leap second, positive time-offset",
        "valid leap second, large positive time-offset",
        "valid leap second, negative time-offset",
        "valid leap second, large negative time-offset",
    },
    "uri": {"a valid URL "},
}
"""Valid texts that the patterns of raw strings leave out."""
# How many schemas of a group have a grammar; a change of either number is worth a look.
ENFORCED = {
    **{"additionalProperties": 7, "allOf": 10, "anyOf": 7, "const": 15, "enum": 14, "items": 10, "pattern": 2},
    **{"maximum": 2, "minimum": 2, "multipleOf": 4, "prefixItems": 4, "properties": 6, "required": 5, "type": 11},
}


def cases(group: str) -> list[dict[str, Any]]:
    return json.loads((SUITE / f"{group}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("group", GROUPS)
def test_a_schema_constrains_exactly_or_is_refused(
    group: str, checker: Checker, tokens: GrammarTokens, accepts: Callable[[LLMatcher, str], bool]
) -> None:
    enforced = 0
    for case in cases(group):
        answer = checker.answer(GrammarJob(format="json_schema", value=case["schema"], format_param="schema"))
        if answer.refusal is not None:
            message = answer.refusal.message
            named = any(f"`{keyword}`" in message for keyword in KEYWORDS)
            assert named or "nsatisfiable" in message or "allows nothing" in message, message
            continue
        enforced += 1
        assert answer.grammar is not None
        matcher = tokens.matcher(answer.grammar.text)
        for test in case["tests"]:
            got = accepts(matcher, json.dumps(test["data"], ensure_ascii=False))
            name = (group, case["description"], test["description"])
            if "is only an annotation by default" in test["description"]:
                assert not got, name
            elif name in NARROWER:
                assert test["valid"] and not got, name
            else:
                assert got == test["valid"], name
    assert enforced == ENFORCED.get(group, enforced)


@pytest.mark.parametrize("group", sorted(path.stem for path in (SUITE / "format").glob("*.json")))
def test_formats_of_raw_text(group: str, tokens: GrammarTokens, accepts: Callable[[LLMatcher, str], bool]) -> None:
    """The same formats in string parameters of tool calls, which are no JSON."""
    assert group in FORMATS
    (case,) = json.loads((SUITE / "format" / f"{group}.json").read_text(encoding="utf-8"))
    terminal = text_terminal({"type": "string", "format": group}, {})
    matcher = tokens.matcher(f'start: T\nT: ({terminal}) "</"')
    assert not matcher.is_error(), matcher.get_error()
    narrower = set()
    for test in case["tests"]:
        if isinstance(test["data"], str) and accepts(matcher, test["data"] + "</") != test["valid"]:
            assert test["valid"], test["description"]
            narrower.add(test["description"])
    assert narrower == NARROWER_FORMATS.get(group, set())
