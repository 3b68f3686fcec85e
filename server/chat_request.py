"""One chat request in the words of no API: what the chat, responses and messages routes all translate into."""

from dataclasses import dataclass
from typing import Any, Literal

from server.protocol.common import SamplingFields
from server.text.effort import Tier

ToolMode = Literal["none", "auto", "required"]
FormatKind = Literal["json_object", "json_schema", "regex", "choice", "ebnf"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    name: str
    description: str
    parameters: dict[str, Any]
    """A JSON Schema object."""
    strict: bool = False
    grammar: str | None = None
    """Lark, or GBNF: what the text of the one string parameter must follow, beyond its schema."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """What the model must do with the tools."""

    mode: ToolMode = "auto"
    name: str | None = None
    """With mode "required": the only tool that may be called."""
    parallel: bool = True
    """More than one call in one answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFormat:
    """What the content must look like."""

    kind: FormatKind
    value: Any = None
    """The schema (json_schema), the pattern (regex), the texts (choice) or the grammar (ebnf)."""
    strict: bool = True
    param: str
    """The field of the request that asks for it, for error messages."""
    rendered: dict[str, Any] | None = None
    """`response_format` as the prompt states it; None when the prompt does not mention the format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """Checked as far as one can without a tokenizer."""

    messages: list[dict[str, Any]]
    """In the shape of chat completions, tool calls, tool results and `reasoning_content` included."""
    messages_param: str = "messages"
    """The field to blame for them."""
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    output_format: OutputFormat | None = None
    thinking: bool = True
    tier: Tier | None = None
    """How hard the model thinks; None when it does not."""
    fields: SamplingFields
    """Sampling, stops, salt, priority: everything that is no matter of the conversation."""
    max_tokens: int | None = None
    """None: the default of the mode, clipped to the room that the prompt leaves."""
    max_tokens_param: str = "max_tokens"
    lowers_max_tokens: bool = False
    """A bound above the room is lowered instead of refused (Anthropic's rule)."""
    num_logprobs: int | None = None
    num_choices: int = 1
