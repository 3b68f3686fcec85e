"""The request fields that ask for a format, in the words of no API."""

from collections.abc import Mapping
from typing import Any

import msgspec

from server.chat_request import FormatKind, OutputFormat
from server.errors import bad_request, echo, unsupported
from server.protocol.common import FormatFields

_FIELDS: dict[str, FormatKind] = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "ebnf",
    "json_schema": "json_schema",
    "regex": "regex",
    "ebnf": "ebnf",
}
_STRUCTURED: dict[str, FormatKind] = {
    "json": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "ebnf",
}
# Options of another server's grammar engine, with the values that ask for nothing here.
_STRUCTURED_OPTIONS: dict[str, tuple[Any, ...]] = {
    "disable_any_whitespace": (False,),
    "disable_additional_properties": (False,),
    "disable_fallback": (False, True),
    "backend": ("auto", "guidance"),
}


def output_format_of(body: FormatFields) -> OutputFormat | None:
    """What the content of the answer must look like; None when no field asks for anything.

    Raises:
        ApiError: 400 with `param`: several fields at once, or one that cannot be read.
    """
    asked = [name for name in _FIELDS if getattr(body, name) is not None]
    if body.response_format is not None and body.response_format != {"type": "text"}:
        asked.insert(0, "response_format")
    if body.structured_outputs:
        asked.insert(0, "structured_outputs")
    if not asked:
        return None
    if len(asked) > 1:
        raise bad_request(f"{asked[1]} cannot be combined with {asked[0]}.", param=asked[1])
    (name,) = asked
    if name == "response_format":
        assert body.response_format is not None
        return _response_format(body.response_format)
    if name == "structured_outputs":
        assert body.structured_outputs is not None
        return _structured_outputs(body.structured_outputs)
    return _format(_FIELDS[name], getattr(body, name), name)


def _response_format(given: Mapping[str, Any]) -> OutputFormat | None:
    place = "response_format"
    match given.get("type"):
        case "text":
            return None
        case "json_object":
            return OutputFormat(kind="json_object", param=place, rendered={"type": "json_object"})
        case "json_schema":
            return _json_schema(given.get("json_schema"), f"{place}.json_schema")
        case "regex":
            pattern = given.get("regex", given.get("pattern"))
            return OutputFormat(kind="regex", value=_text(pattern, f"{place}.regex"), param=place)
        case "grammar":
            return OutputFormat(kind="ebnf", value=_text(given.get("grammar"), f"{place}.grammar"), param=place)
        case other:
            known = "text, json_object, json_schema, regex, grammar"
            message = f"{place}.type must be one of {known}; found {echo(other)}"
            raise bad_request(message, param=f"{place}.type")


def _json_schema(given: Any, place: str) -> OutputFormat:
    if not isinstance(given, dict):
        raise bad_request(f"{place} must be an object.", param=place)
    schema = given.get("schema", {})
    strict = given.get("strict")
    if not isinstance(schema, dict):
        raise bad_request(f"{place}.schema must be an object.", param=f"{place}.schema")
    if strict is not None and not isinstance(strict, bool):
        raise bad_request(f"{place}.strict must be true or false.", param=f"{place}.strict")
    name = given.get("name", "output")
    if not isinstance(name, str) or not name:
        raise bad_request(f"{place}.name must be a string that is not empty.", param=f"{place}.name")
    rendered = {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": bool(strict)}}
    return OutputFormat(
        kind="json_schema", value=schema, strict=bool(strict), param=f"{place}.schema", rendered=rendered
    )


def _structured_outputs(given: Mapping[str, Any]) -> OutputFormat | None:
    place = "structured_outputs"
    for name, value in given.items():
        if name == "structural_tag" or (name not in _STRUCTURED and name not in _STRUCTURED_OPTIONS):
            raise unsupported(f"{place}.{echo(name)}")
        if name in _STRUCTURED_OPTIONS and value is not None and value not in _STRUCTURED_OPTIONS[name]:
            raise unsupported(f"{place}.{name}")
    asked = [name for name in _STRUCTURED if given.get(name) not in (None, False)]
    if not asked:
        return None
    if len(asked) > 1:
        raise bad_request(f"{place} can hold one of {', '.join(asked)}.", param=f"{place}.{asked[1]}")
    return _format(_STRUCTURED[asked[0]], given[asked[0]], f"{place}.{asked[0]}")


def _format(kind: FormatKind, value: Any, place: str) -> OutputFormat:
    if kind == "json_object":
        return OutputFormat(kind=kind, param=place)
    if kind == "json_schema" and isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            raise bad_request(f"{place} must be a JSON Schema or the text of one.", param=place) from None
    if kind == "choice" and not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
        raise bad_request(f"{place} must be a list of strings.", param=place)
    if kind in ("regex", "ebnf"):
        value = _text(value, place)
    return OutputFormat(kind=kind, value=value, param=place)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value:
        raise bad_request(f"{place} must be a string that is not empty.", param=place)
    return value
