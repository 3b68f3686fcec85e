"""Reading members of nested JSON objects: null means absent, and an error names the path."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pydantic_core

from server.errors import ApiError, bad_request, echo

T = TypeVar("T")

_WORDS: dict[type, str] = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    dict: "an object",
    list: "a list",
}


def member(owner: Mapping[str, Any], name: str, kind: type[T], param: str, default: T) -> T:
    """`owner[name]` when it is there, else `default`. Raises ApiError 400 for another type; `param` is the owner's."""
    value = owner.get(name)
    return default if value is None else _checked(value, kind, f"{param}.{name}")


def required(owner: Mapping[str, Any], name: str, kind: type[T], param: str) -> T:
    """`owner[name]`. Raises ApiError 400 when it is missing or of another type; `param` is the owner's path."""
    value = owner.get(name)
    if value is None:
        raise bad_request(f"{param}.{name} is required.", param=f"{param}.{name}")
    return _checked(value, kind, f"{param}.{name}")


def as_object(value: Any, param: str) -> Mapping[str, Any]:
    """Raises ApiError 400 unless `value` is a JSON object."""
    return _checked(value, dict, param)


def one_of(value: Any, allowed: Sequence[str], param: str) -> str:
    """Raises ApiError 400 unless `value` is one of the words."""
    if not isinstance(value, str) or value not in allowed:
        raise bad_request(f"{param} must be one of {', '.join(allowed)}; found {echo(repr(value))}.", param=param)
    return value


def not_supported(what: object, param: str) -> ApiError:
    """A known kind of thing that this server does not have."""
    message = f"{param}: {echo(repr(what))} is not supported."
    return bad_request(message, param=param, code="unsupported_parameter")


def read_partial(text: str) -> Any:
    """The value of JSON that may be cut off anywhere: what is complete of it. {} when nothing is."""
    try:
        return pydantic_core.from_json(text, allow_partial=True)
    except ValueError:
        return {}


def _checked(value: Any, kind: type[T], param: str) -> T:
    # bool is an int in Python and not in JSON.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise bad_request(f"{param} must be {_WORDS[kind]}.", param=param)
    return value
