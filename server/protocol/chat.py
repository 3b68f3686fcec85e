"""POST /v1/chat/completions: the request body, whole answers and stream chunks."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from server import limits
from server.chat_request import ChatRequest
from server.errors import bad_request, echo, unsupported
from server.generation import TokenLogprob
from server.grammar.formats import output_format_of
from server.protocol import sse
from server.protocol.common import (
    LARGEST_INT32,
    SYSTEM_FINGERPRINT,
    FormatFields,
    SamplingFields,
    ThinkingFields,
)
from server.protocol.known_fields import ACCEPTED_WITHOUT_EFFECT, REFUSED_EVERYWHERE
from server.protocol.tools import MOST_TOOLS, read_tool_choice, read_tools
from server.text.effort import PromptError, Tier, resolve_thinking


class ChatBody(SamplingFields, ThinkingFields, FormatFields):
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
        "include_reasoning": (True,),
        "separate_reasoning": (True,),
        "stream_reasoning": (True,),
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
        if self.n > 1:
            raise unsupported("n", "Invalid n value (currently only n = 1 is supported)")
        if self.prompt_logprobs is not None:
            raise unsupported("prompt_logprobs")

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
        )


def thinking_of(body: ThinkingFields) -> tuple[bool, Tier | None]:
    """Whether and how hard the model thinks. Raises ApiError 400 with `param`."""
    try:
        return resolve_thinking(body.thinking, body.reasoning_effort, body.chat_template_kwargs)
    except PromptError as error:
        raise bad_request(echo(str(error)), param=error.param) from None


def chat_logprobs(rows: Sequence[TokenLogprob], *, thinking: bool) -> dict[str, Any]:
    """OpenAI's shape; the tokens of the reasoning stand in a list of their own, as in DeepSeek's API."""
    logprobs: dict[str, Any] = {"content": [_logprob(row) for row in rows if not row.reasoning]}
    if thinking:
        logprobs["reasoning_content"] = [_logprob(row) for row in rows if row.reasoning]
    return logprobs


def _logprob(row: TokenLogprob) -> dict[str, Any]:
    top = [{"token": t.token, "logprob": t.logprob, "bytes": list(t.bytes)} for t in row.top]
    return {"token": row.token, "logprob": row.logprob, "bytes": list(row.bytes), "top_logprobs": top}


class ChatChunks:
    """Writes the chunks of one stream around a prefix that never changes: no JSON encoder runs for the fixed part."""

    def __init__(self, answer_id: str, created: int, model: str, *, include_usage: bool) -> None:
        self._head = b"".join(
            (
                b'data: {"id":',
                sse.json_string(answer_id),
                b',"object":"chat.completion.chunk","created":%d,"model":' % created,
                sse.json_string(model),
                b',"system_fingerprint":',
                sse.json_string(SYSTEM_FINGERPRINT),
                b',"choices":[',
            )
        )
        self._choice = self._head + b'{"index":0,"delta":'
        usage = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._end = b"]" + usage
        self._plain_tail = b',"logprobs":null,"finish_reason":null}' + self._end

    def role(self, *, thinking: bool, prompt_token_ids: list[int] | None) -> bytes:
        """The first chunk."""
        delta = (
            b'{"role":"assistant","content":null,"reasoning_content":""}'
            if thinking
            else b'{"role":"assistant","content":""}'
        )
        if prompt_token_ids is None:
            return self._choice + delta + self._plain_tail
        end = b'],"prompt_token_ids":' + sse.json_bytes(prompt_token_ids) + self._end[1:]
        return self._choice + delta + b',"logprobs":null,"finish_reason":null}' + end

    def text(self, field: bytes, text: str, logprobs: Any = None, token_ids: list[int] | None = None) -> bytes:
        """New text of `content` or `reasoning_content`."""
        delta = b'{"' + field + b'":' + sse.json_string(text) + b"}"
        if logprobs is None and token_ids is None:
            return self._choice + delta + self._plain_tail
        return self._rich(delta, logprobs, b"null", token_ids)

    def finish(self, reason: str, logprobs: Any = None, token_ids: list[int] | None = None) -> bytes:
        """The last chunk of the choice."""
        return self._rich(b"{}", logprobs, sse.json_string(reason), token_ids)

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk without choices that include_usage asks for."""
        return self._head + b'],"usage":' + sse.json_bytes(usage) + b"}\n\n"

    def _rich(self, delta: bytes, logprobs: Any, reason: bytes, token_ids: list[int] | None) -> bytes:
        tail = b',"logprobs":' + sse.json_bytes(logprobs) + b',"finish_reason":' + reason
        if token_ids is not None:
            tail += b',"token_ids":' + sse.json_bytes(token_ids)
        return self._choice + delta + tail + b"}" + self._end


def chat_answer(
    *,
    answer_id: str,
    created: int,
    model: str,
    content: str,
    reasoning: str | None,
    finish_reason: str,
    usage: dict[str, Any],
    logprobs: Any = None,
    prompt_token_ids: list[int] | None = None,
    token_ids: list[int] | None = None,
) -> bytes:
    """A whole answer; `reasoning` is None when the model did not think."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    choice: dict[str, Any] = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}
    answer: dict[str, Any] = {
        "id": answer_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "system_fingerprint": SYSTEM_FINGERPRINT,
        "choices": [choice],
        "usage": usage,
    }
    if token_ids is not None:
        choice["token_ids"] = token_ids
        answer["prompt_token_ids"] = prompt_token_ids
    return sse.json_bytes(answer)
