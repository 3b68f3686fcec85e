"""POST /v1/responses: the request body, and the chat request it means."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from server import limits
from server.chat_request import ChatRequest, OutputFormat
from server.errors import bad_request
from server.grammar.formats import output_format_of
from server.protocol.common import LARGEST_INT32, FormatFields, ReasoningViewFields, SamplingFields, ThinkingFields
from server.protocol.known_fields import ACCEPTED_WITHOUT_EFFECT, NO_CHOICES, REFUSED_EVERYWHERE
from server.protocol.members import member, not_supported, one_of, required
from server.protocol.responses_items import later_tools, to_messages
from server.protocol.responses_tools import Toolbox, read_choice, read_toolbox
from server.text.effort import PromptError, resolve_thinking

_INCLUDES = (
    *("reasoning.encrypted_content", "message.output_text.logprobs"),
    # Of things that no answer of this server has.
    *("file_search_call.results", "web_search_call.results", "web_search_call.action.sources"),
    *("message.input_image.image_url", "computer_call_output.output.image_url", "code_interpreter_call.outputs"),
)
_FOREIGN_REASONING = ("max_tokens", "enabled", "enable", "exclude")
_SUMMARIES = ("auto", "concise", "detailed")
PARAMS = {"response_format": "text.format", "messages": "input", "reasoning_effort": "reasoning.effort"}
"""Fields of a chat request to the fields of this API."""

ShortKey = Annotated[str, Field(max_length=64)]
ShortText = Annotated[str, Field(max_length=512)]


def _input(value: object) -> object:
    """One error for both types: a union would report two."""
    if not isinstance(value, (str, list)):
        raise ValueError("must be a string or a list of items")
    if isinstance(value, list) and len(value) > limits.MOST_MESSAGES:
        raise ValueError(f"must have at most {limits.MOST_MESSAGES} items")
    return value


class ResponsesBody(SamplingFields, ThinkingFields, FormatFields, ReasoningViewFields):
    REFUSED = (
        REFUSED_EVERYWHERE
        | NO_CHOICES
        | {
            "prompt": (),
            "conversation": (),
            "truncation": ("disabled",),
            "context_management": ([],),
            "background_options": ({}, {"completion_window": "soonest"}),
            "image": ({}, {"context_compression": "auto"}, {"context_compression": "disabled"}),
            "messages": (),
            "functions": ([],),
            "previous_input_messages": (),
            "chat_template": (),
        }
    )
    IGNORED = ACCEPTED_WITHOUT_EFFECT | {"access_programs"}

    input: Annotated[str | list[Any], BeforeValidator(_input)] = Field(default_factory=list)
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=LARGEST_INT32)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1, le=LARGEST_INT32)] | None = None
    """Bounds the tools that a server runs. This one runs none, so it always holds."""
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    text: dict[str, Any] = Field(default_factory=dict)
    reasoning: dict[str, Any] = Field(default_factory=dict)
    include: Annotated[list[str], Field(max_length=32)] = Field(default_factory=list)
    top_logprobs: Annotated[int, Field(ge=0, le=limits.MOST_LOGPROBS)] = 0
    previous_response_id: ShortText | None = None
    store: bool = True
    background: bool = False
    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], ShortText], Field(max_length=16)] = Field(
        default_factory=dict
    )
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @classmethod
    def normalise(cls, raw: dict[str, Any]) -> None:
        """`reasoning` is a field of this API; what other dialects keep in it becomes the fields they mean."""
        own = raw.pop("reasoning", None)
        if isinstance(own, dict):
            raw["reasoning"] = {k: v for k, v in own.items() if k in _FOREIGN_REASONING}
        super().normalise(raw)
        if own is not None:
            raw["reasoning"] = own

    def check(self) -> None:
        super().check()
        for n, name in enumerate(self.include):
            one_of(name, _INCLUDES, f"include[{n}]")
        if not self.input and not self.instructions and self.previous_response_id is None:
            raise bad_request("input: Input items array must not be empty.", param="input")
        if self.background and not self.store:
            raise bad_request("background needs store: true.", param="background")
        self._check_reasoning()
        one_of(self.text.get("verbosity") or "medium", ("low", "medium", "high"), "text.verbosity")

    def _check_reasoning(self) -> None:
        for name in ("summary", "generate_summary"):
            if self.reasoning.get(name) is not None:
                one_of(self.reasoning[name], _SUMMARIES, f"reasoning.{name}")
        for name, neutral in (("context", ("auto", "all_turns")), ("mode", ("standard",))):
            if self.reasoning.get(name) not in (None, *neutral):
                raise not_supported(self.reasoning[name], f"reasoning.{name}")

    @property
    def own_items(self) -> list[Any]:
        """`input` as items."""
        return [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input

    @property
    def wants_sealed_reasoning(self) -> bool:
        return "reasoning.encrypted_content" in self.include

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.top_logprobs or "message.output_text.logprobs" in self.include else None


@dataclass(frozen=True, slots=True)
class ResponsesChat:
    """What a body asks for."""

    chat: ChatRequest
    box: Toolbox
    effort: str
    """As the answer repeats it: `none` without thinking."""


def to_chat(body: ResponsesBody, earlier: Sequence[Any] = ()) -> ResponsesChat:
    """The chat request of `body`, whose conversation began with the items `earlier`.

    Raises:
        ApiError: 400 with `param`.
    """
    items = [*earlier, *body.own_items]
    messages = to_messages(items, num_earlier=len(earlier))
    if body.instructions is not None:
        messages.insert(0, {"role": "system", "content": body.instructions})
    box = read_toolbox(body.tools, later_tools(items))
    choice, tools = read_choice(body.tool_choice, body.parallel_tool_calls, box)
    effort = member(body.reasoning, "effort", str, "reasoning", body.reasoning_effort or "")
    try:
        thinking, tier = resolve_thinking(body.thinking, effort or None, body.chat_template_kwargs)
    except PromptError as error:
        raise bad_request(str(error), param=PARAMS.get(error.param, error.param)) from None
    chat = ChatRequest(
        messages=messages,
        messages_param="input",
        tools=tools,
        tool_choice=choice,
        output_format=_format(body),
        thinking=thinking,
        tier=tier,
        fields=body,
        max_tokens=body.max_output_tokens or body.max_tokens,
        max_tokens_param="max_output_tokens" if body.max_output_tokens else "max_tokens",
        num_logprobs=body.num_logprobs,
    )
    return ResponsesChat(chat, box, (effort or "high") if thinking else "none")


def _format(body: ResponsesBody) -> OutputFormat | None:
    """`text.format`, or what another dialect's field asks for."""
    place = "text.format"
    given = member(body.text, "format", dict, "text", {"type": "text"})
    kind = one_of(given.get("type"), ("text", "json_object", "json_schema"), f"{place}.type")
    other = output_format_of(body)
    if kind == "text":
        return other
    if other is not None:
        raise bad_request(f"{other.param} cannot be combined with {place}.", param=other.param)
    if kind == "json_object":
        return OutputFormat(kind="json_object", param=place, rendered={"type": "json_object"})
    schema = required(given, "schema", dict, place)
    strict = member(given, "strict", bool, place, False)
    named = {"name": required(given, "name", str, place), "schema": schema, "strict": strict}
    rendered = {"type": "json_schema", "json_schema": named}
    return OutputFormat(kind="json_schema", value=schema, strict=strict, param=f"{place}.schema", rendered=rendered)
