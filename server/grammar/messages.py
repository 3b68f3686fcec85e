"""What the server and the processes that write grammars tell each other, as lines of JSON."""

from typing import Any, Literal

import msgspec


class ToolSpec(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    parameters: Any
    strict: bool = False
    grammar: str | None = None
    """Of the text of its one string parameter, as the client wrote it."""


class GrammarJob(msgspec.Struct, frozen=True, kw_only=True):
    """Sent to the checking process as JSON; equal jobs have equal JSON, which is their key in the cache."""

    tools: tuple[ToolSpec, ...] = ()
    """Those that may be called."""
    calls: Literal["none", "auto", "required", "opened"] = "none"
    """opened: required, and the prompt ends with the opening tag of the calls."""
    parallel: bool = True
    format: str | None = None
    value: Any = None
    format_param: str = ""
    marker: int | None = None
    """The id of ｜DSML｜."""


class GrammarText(msgspec.Struct, frozen=True, kw_only=True):
    """A grammar for the engine."""

    text: str
    left_out: tuple[str, ...] = ()
    """Keywords of tools that are not strict which the grammar does not keep, with their places."""


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Why there is none, for the client."""

    message: str
    param: str


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """The first line to a process."""

    model_dir: str
    vocab_size: int
    eos_token_id: int
    memory_bytes: int
    """More than this beyond what the process has when it is ready, and it ends."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One of the two."""

    grammar: GrammarText | None = None
    refusal: Refusal | None = None
