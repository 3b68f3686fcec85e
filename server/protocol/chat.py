"""POST /v1/chat/completions: the request body."""

from typing import Annotated, Any

from pydantic import Field

from server import limits
from server.chat_request import ChatRequest
from server.errors import bad_request, echo
from server.grammar.formats import output_format_of
from server.protocol.common import (
    LARGEST_INT32,
    FormatFields,
    ReasoningViewFields,
    SamplingFields,
    ThinkingFields,
)
from server.protocol.known_fields import ACCEPTED_WITHOUT_EFFECT, REFUSED_EVERYWHERE
from server.protocol.tools import MOST_TOOLS, read_tool_choice, read_tools
from server.text.effort import PromptError, Tier, resolve_thinking


class ChatBody(SamplingFields, ThinkingFields, ReasoningViewFields, FormatFields):
    REFUSED = REFUSED_EVERYWHERE | {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "audio": (),
        "modalities": (["text"],),
        "prediction": (),
        "web_search_options": (),
        "echo": (False,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "chat_template": (),
        "documents": ([],),
        "mm_processor_kwargs": ({},),
        "media_io_kwargs": ({},),
        "max_dynamic_patch": (),
        "min_dynamic_patch": (),
        "use_audio_in_video": (False,),
        "add_special_tokens": (False,),
        "task": (),
    }
    IGNORED = ACCEPTED_WITHOUT_EFFECT

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=limits.MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=LARGEST_INT32)] | None = None
    tools: list[Any] = Field(default_factory=list, max_length=MOST_TOOLS)
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=limits.MOST_LOGPROBS)] | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs should be set along with logprobs = true", param="top_logprobs")

    def chat_request(self) -> ChatRequest:
        """The same request in the words of no API. Raises ApiError 400 with `param`."""
        thinking, tier = thinking_of(self)
        choice, tools = read_tool_choice(self.tool_choice, self.parallel_tool_calls, read_tools(self.tools))
        newer = self.max_completion_tokens is not None
        return ChatRequest(
            messages=self.messages,
            tools=tools,
            tool_choice=choice,
            output_format=output_format_of(self),
            thinking=thinking,
            tier=tier,
            fields=self,
            max_tokens=self.max_completion_tokens if newer else self.max_tokens,
            max_tokens_param="max_completion_tokens" if newer else "max_tokens",
            num_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            num_choices=self.n,
        )


def thinking_of(body: ThinkingFields) -> tuple[bool, Tier | None]:
    """Whether and how hard the model thinks. Raises ApiError 400 with `param`."""
    try:
        return resolve_thinking(body.thinking, body.reasoning_effort, body.chat_template_kwargs)
    except PromptError as error:
        raise bad_request(echo(str(error)), param=error.param) from None
