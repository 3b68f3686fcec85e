"""Grammars of an answer's content: JSON, a pattern, one of some texts, or a grammar that the client wrote."""

import json
import re
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from server.grammar.schema import Reading, SchemaError
from server.grammar.strings import literal

JSON_WHITESPACE = r"[ ]|\n[ \t]{0,64}"
"""Between the parts of a JSON answer: one space, or a new line with its indent. Bounded, so that a weak model cannot
fill an answer with blanks."""
MOST_CHOICES = 10_000
# Parts of a Lark grammar that may hold anything: strings, patterns, comments.
_OPAQUE = re.compile(r'"(?:[^"\\\n]|\\.)*"i?|/(?![/*])(?:[^/\\\n]|\\.)+/[a-z]*|//[^\n]*|#[^\n]*')
# Lark's library of common terminals is part of the language.
_COMMON = re.compile(r"(?m)^[ \t]*%import[ \t]+common\.")
_NAMED = re.compile(r"%(json|regex|lark|llguidance|import|declare|override|extend)\b|<[^<>\n]*>|@[\w-]+")


def content_grammar(kind: str, value: Any) -> dict[str, Any]:
    """A named grammar of the library's top level, without its name.

    Raises SchemaError; the message may be read by a client.
    """
    if kind == "json_object":
        return _json({"type": "object"})
    if kind == "json_schema":
        return _json(Reading().read(value))
    if kind == "regex":
        if not isinstance(value, str) or not value:
            raise SchemaError("a pattern must be a string that is not empty")
        return {"lark_grammar": f"start: /{regex_to_lark(value, '')}/"}
    if kind == "choice":
        return {"lark_grammar": f"start: {' | '.join(_choices(value))}"}
    assert kind == "ebnf", kind
    return {"lark_grammar": written_grammar(value)}


def _json(schema: Any) -> dict[str, Any]:
    if schema is False:
        raise SchemaError("the schema `false` allows nothing")
    if schema is True:
        schema = {}
    return {"json_schema": {**schema, "x-guidance": {"whitespace_pattern": JSON_WHITESPACE}}}


def _choices(value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise SchemaError("choices must be a list of strings that is not empty")
    if len(value) > MOST_CHOICES:
        raise SchemaError(f"there are {len(value)} choices; at most {MOST_CHOICES}")
    if "" in value:
        raise SchemaError("a choice must not be empty")
    return [literal(text) for text in dict.fromkeys(value)]


def written_grammar(text: Any) -> str:
    """A client's grammar, GBNF (`root ::= ...`) or Lark (`start: ...`), as Lark. Raises SchemaError."""
    if not isinstance(text, str) or not text.strip():
        raise SchemaError("a grammar must be a text that is not empty")
    try:
        lark = any_to_lark(text)
    except GbnfToLarkError as error:
        raise SchemaError(f"the grammar is neither Lark with a rule `start` nor GBNF: {error}") from None
    except (ValueError, KeyError, IndexError, RecursionError) as error:
        raise SchemaError("the grammar is neither Lark with a rule `start` nor GBNF") from error
    plain = _COMMON.sub("", _OPAQUE.sub('""', lark))
    named = next((m[0] for m in _NAMED.finditer(plain) if m[0] != "%llguidance"), None)
    if named is not None:
        what = "tokens" if named.startswith("<") else "directives and other grammars"
        raise SchemaError(f"a grammar cannot name {what}, found {json.dumps(named[:40])}")
    return re.sub(r"(?m)^\s*%llguidance\s*\{\}\s*$", "", lark)
