"""Command-line flags made from configuration dataclasses: a field is a flag, its docstring is the help."""

import argparse
import ast
import dataclasses
import inspect
import re
import types
import typing
from typing import Any, TypeVar

_SIZE_SUFFIXES = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_SIZES = {"body_limit", "file_quota", "kv_cache_bytes", "host_cache_bytes", "response_store_bytes"}

C = TypeVar("C")


def add_flags(parser: argparse.ArgumentParser, config: type[Any], *, skip: frozenset[str] = frozenset()) -> None:
    """One `--flag` for each field of the dataclass `config` that is not in `skip`."""
    group = parser.add_argument_group(config.__name__.removesuffix("Config").lower())
    hints = typing.get_type_hints(config)
    docs = field_docs(config)
    for field in dataclasses.fields(config):
        if field.name in skip:
            continue
        flag = "--" + field.name.replace("_", "-")
        # argparse expands % in help texts.
        text = " ".join(docs.get(field.name, "").split()).replace("%", "%%")
        default = field.default
        if default is not None and not isinstance(default, bool):
            text += f" (default: {default})"
        group.add_argument(
            flag, dest=field.name, default=default, help=text, **_argument(field.name, hints[field.name], default)
        )


def from_args(config: type[C], arguments: argparse.Namespace, **given: Any) -> C:
    """The dataclass filled from parsed flags; `given` wins."""
    assert dataclasses.is_dataclass(config)
    names = [field.name for field in dataclasses.fields(config)]
    return config(**{name: given[name] if name in given else getattr(arguments, name) for name in names})


def field_docs(config: type[Any]) -> dict[str, str]:
    """Field name to the string that follows it in the source."""
    (definition,) = ast.parse(inspect.cleandoc(inspect.getsource(config))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match following:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    docs[statement.target.id] = text
    return docs


def size(text: str) -> int:
    """Bytes of `8GiB`, `512MiB`, `1.5GB` or a plain number; for argparse."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].upper() not in _SIZE_SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8GiB or 500000000")
    return int(float(match[1]) * _SIZE_SUFFIXES[match[2].upper()])


def _argument(name: str, hint: Any, default: Any) -> dict[str, Any]:
    if isinstance(hint, types.UnionType):
        (hint,) = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": typing.get_args(hint)}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction if default else "store_true"}
    if name in _SIZES:
        return {"type": size, "metavar": "BYTES"}
    return {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, "TEXT")}
