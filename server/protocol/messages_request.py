"""POST /v1/messages and /v1/messages/count_tokens: the request bodies, and the chat request they mean."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from server import limits
from server.chat_request import ChatRequest, OutputFormat, Tool, ToolChoice
from server.errors import bad_request, echo
from server.grammar.formats import output_format_of
from server.protocol.common import (
    LARGEST_INT32,
    FormatFields,
    Real,
    ReasoningViewFields,
    SamplingFields,
    ThinkingFields,
)
from server.protocol.known_fields import ACCEPTED_WITHOUT_EFFECT, NO_CHOICES, REFUSED_EVERYWHERE
from server.protocol.members import as_object, member, not_supported, one_of, required
from server.protocol.messages_blocks import system_text, to_messages
from server.protocol.tools import MOST_TOOLS, checked_name
from server.text.effort import PromptError, resolve_thinking

PARAMS = {
    "response_format": "output_config",
    "reasoning_effort": "output_config.effort",
    "stop": "stop_sequences",
}
"""Fields of a chat request to the fields of this API."""

Stop = Annotated[str, Field(min_length=1, max_length=limits.MOST_STOP_CHARS)]


def _system(value: object) -> object:
    """One error for both types: a union would report two."""
    if not isinstance(value, (str, list)):
        raise ValueError("must be a string or a list of text blocks")
    return value


class CountBody(SamplingFields, ThinkingFields, FormatFields):
    """What counts for the prompt."""

    REFUSED = (
        REFUSED_EVERYWHERE
        | NO_CHOICES
        | {
            "mcp_servers": ([],),
            "container": (),
            "compaction": (),
            "thread": (),
            "fallbacks": ([],),
            "speed": ("standard",),
        }
    )
    IGNORED = ACCEPTED_WITHOUT_EFFECT | {
        # How much of the reasoning shows is no matter of the prompt.
        *ReasoningViewFields.model_fields,
        *("cache_control", "context_management", "betas", "anthropic_version", "anthropic_beta", "diagnostics"),
        *("inference_geo", "billing_policy", "user_profile_id", "workspace_id", "fallback_credit_token"),
    }

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=limits.MOST_MESSAGES)]
    system: Annotated[str | list[Any] | None, BeforeValidator(_system)] = None
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: dict[str, Any] | None = None
    output_config: dict[str, Any] = Field(default_factory=dict)
    output_format: dict[str, Any] | None = None
    temperature: Annotated[Real, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=LARGEST_INT32)] = 0
    stop_sequences: Annotated[list[Stop], Field(max_length=limits.MOST_STOPS)] = Field(default_factory=list)

    @classmethod
    def normalise(cls, raw: dict[str, Any]) -> None:
        if isinstance(raw.get("thinking"), dict):
            _check_thinking(raw["thinking"])
        super().normalise(raw)

    @property
    def omits_thinking(self) -> bool:
        """Thinking blocks are sent without their text."""
        return self.thinking is not None and self.thinking.get("display") == "omitted"


class MessagesBody(CountBody, ReasoningViewFields):
    max_tokens: Annotated[int, Field(ge=1, le=LARGEST_INT32)]


def to_chat(body: CountBody, model: str) -> ChatRequest:
    """The chat request of `body`, for the `model` that is served.

    Raises:
        ApiError: 400 with `param`.
    """
    messages = to_messages(body.messages)
    system = system_text(body.system)
    if system:
        messages.insert(0, {"role": "system", "content": system})
    tools = _tools(body.tools)
    if tools and messages[-1].get("prefix"):
        message = "messages: a final assistant message cannot be continued when there are tools."
        raise bad_request(message, param=f"messages[{len(body.messages) - 1}]")
    effort = member(body.output_config, "effort", str, "output_config", body.reasoning_effort or "")
    try:
        thinking, tier = resolve_thinking(body.thinking, effort or None, body.chat_template_kwargs)
    except PromptError as error:
        raise bad_request(str(error), param=PARAMS.get(error.param, error.param)) from None
    fields = body.model_copy(update={"model": model, "stop": (*body.stop, *body.stop_sequences)})
    return ChatRequest(
        messages=messages,
        tools=tools,
        tool_choice=_choice(body.tool_choice, tools),
        output_format=_format(body),
        thinking=thinking,
        tier=tier,
        fields=fields,
        max_tokens=body.max_tokens,
        lowers_max_tokens=True,
    )


def _check_thinking(thinking: dict[str, Any]) -> None:
    """Raises ApiError 400. `budget_tokens` becomes `thinking_token_budget`."""
    one_of(thinking.get("type"), ("enabled", "adaptive", "disabled"), "thinking.type")
    if thinking.get("display") is not None:
        one_of(thinking["display"], ("summarized", "omitted"), "thinking.display")
    if not 1 <= member(thinking, "budget_tokens", int, "thinking", 1) <= LARGEST_INT32:
        raise bad_request("thinking.budget_tokens must be at least 1.", param="thinking.budget_tokens")


def _tools(tools: Sequence[Any]) -> tuple[Tool, ...]:
    if len(tools) > MOST_TOOLS:
        raise bad_request(f"tools: at most {MOST_TOOLS} tools, found {len(tools)}.", param="tools")
    found: dict[str, Tool] = {}
    for n, value in enumerate(tools):
        param = f"tools[{n}]"
        tool = as_object(value, param)
        kind = member(tool, "type", str, param, "custom")
        if kind != "custom":
            raise not_supported(kind, f"{param}.type")
        made = Tool(
            name=checked_name(tool.get("name"), f"{param}.name"),
            description=member(tool, "description", str, param, ""),
            parameters=required(tool, "input_schema", dict, param),
            strict=member(tool, "strict", bool, param, False),
        )
        if made.name in found:
            raise bad_request("tools: Tool names must be unique.", param=f"{param}.name")
        found[made.name] = made
    return tuple(found.values())


def _choice(choice: Mapping[str, Any] | None, tools: tuple[Tool, ...]) -> ToolChoice:
    if choice is None:
        return ToolChoice()
    kind = one_of(choice.get("type"), ("auto", "any", "tool", "none"), "tool_choice.type")
    parallel = not member(choice, "disable_parallel_tool_use", bool, "tool_choice", False)
    if kind == "none":
        return ToolChoice(mode="none")
    if kind == "auto":
        return ToolChoice(parallel=parallel)
    if not tools:
        raise bad_request(f"tool_choice.type is {kind} but there are no tools.", param="tool_choice")
    if kind == "any":
        return ToolChoice(mode="required", parallel=parallel)
    name = required(choice, "name", str, "tool_choice")
    if all(tool.name != name for tool in tools):
        message = f"tool_choice.name: there is no tool named `{echo(name)}` in tools."
        raise bad_request(message, param="tool_choice.name")
    return ToolChoice(mode="required", name=name, parallel=parallel)


def _format(body: CountBody) -> OutputFormat | None:
    place, given = "output_config.format", body.output_config.get("format")
    if given is None:
        place, given = "output_format", body.output_format
    other = output_format_of(body)
    if given is None:
        return other
    if other is not None:
        raise bad_request(f"{other.param} cannot be combined with {place}.", param=other.param)
    wanted = as_object(given, place)
    one_of(wanted.get("type"), ("json_schema",), f"{place}.type")
    schema = required(wanted, "schema", dict, place)
    rendered = {"type": "json_schema", "json_schema": {"name": "output", "schema": schema, "strict": True}}
    return OutputFormat(kind="json_schema", value=schema, param=f"{place}.schema", rendered=rendered)
