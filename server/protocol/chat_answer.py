"""POST /v1/chat/completions: whole answers and stream chunks, in OpenAI's and DeepSeek's shape."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from server.generation import CallDelta, GenerationEvent, TokenLogprob, Usage
from server.protocol import sse
from server.protocol.common import SYSTEM_FINGERPRINT

UsageIn = Literal["none", "last_chunk", "finish"]
"""Where a stream says what it used: nowhere, in a chunk of its own behind all choices (OpenAI), or in the chunk that
ends the last choice (DeepSeek)."""


def chat_logprobs(rows: Sequence[TokenLogprob], *, thinking: bool, as_ids: bool = False) -> dict[str, Any]:
    """OpenAI's shape; the tokens of the reasoning stand in a list of their own, as in DeepSeek's API.

    The tokens of tool calls have none. `as_ids` names tokens by id.
    """
    logprobs: dict[str, Any] = {"content": [_logprob(row, as_ids) for row in rows if not row.reasoning]}
    if thinking:
        logprobs["reasoning_content"] = [_logprob(row, as_ids) for row in rows if row.reasoning]
    return logprobs


def _logprob(row: TokenLogprob, as_ids: bool) -> dict[str, Any]:
    return {
        "token": _token(row, as_ids),
        "logprob": row.logprob,
        "bytes": list(row.bytes),
        "top_logprobs": [{"token": _token(t, as_ids), "logprob": t.logprob, "bytes": list(t.bytes)} for t in row.top],
    }


def _token(row: Any, as_ids: bool) -> str:
    text: str = f"token_id:{row.token_id}" if as_ids else row.token
    return text


class ChatChunks:
    """Writes the chunks of one stream around prefixes that never change: no JSON encoder runs for the fixed parts."""

    def __init__(self, answer_id: str, created: int, model: str, *, num_choices: int = 1, usage_in: UsageIn) -> None:
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
        self._choices = [self._head + b'{"index":%d,"delta":' % index for index in range(num_choices)]
        self._end = b"]}\n\n" if usage_in == "none" else b'],"usage":null}\n\n'
        self._plain_tail = b',"logprobs":null,"finish_reason":null}' + self._end
        self._content = [choice + b'{"content":' for choice in self._choices]
        self._reasoning = [choice + b'{"reasoning_content":' for choice in self._choices]
        self._text_tail = b"}" + self._plain_tail

    def content(self, index: int, text: str) -> bytes:
        """New text of the content, and nothing else."""
        return self._content[index] + sse.json_string(text) + self._text_tail

    def reasoning(self, index: int, text: str) -> bytes:
        return self._reasoning[index] + sse.json_string(text) + self._text_tail

    def role(self, index: int, *, thinking: bool, prompt_token_ids: list[int] | None) -> bytes:
        """The first chunk of a choice."""
        delta = (
            b'{"role":"assistant","content":null,"reasoning_content":""}'
            if thinking
            else b'{"role":"assistant","content":""}'
        )
        if prompt_token_ids is None:
            return self._choices[index] + delta + self._plain_tail
        end = b'],"prompt_token_ids":' + sse.json_bytes(prompt_token_ids) + self._end[1:]
        return self._choices[index] + delta + b',"logprobs":null,"finish_reason":null}' + end

    def delta(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: Any = None,
        finish_reason: str | None = None,
        token_ids: list[int] | None = None,
        usage: dict[str, Any] | None = None,
    ) -> bytes:
        """Any other chunk of a choice."""
        parts = [self._choices[index], sse.json_bytes(delta), b',"logprobs":', sse.json_bytes(logprobs)]
        parts += [b',"finish_reason":', sse.json_bytes(finish_reason)]
        if token_ids is not None:
            parts += [b',"token_ids":', sse.json_bytes(token_ids)]
        parts += [b"}", self._end if usage is None else b'],"usage":' + sse.json_bytes(usage) + b"}\n\n"]
        return b"".join(parts)

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk without choices that include_usage asks for."""
        return self._head + b'],"usage":' + sse.json_bytes(usage) + b"}\n\n"


def call_deltas(calls: Sequence[CallDelta]) -> dict[str, Any]:
    """The delta of news of tool calls."""
    return {"tool_calls": [_call_delta(call) for call in calls]}


def _call_delta(call: CallDelta) -> dict[str, Any]:
    if call.call_id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.call_id, "type": "function", "function": function}


@dataclass(slots=True)
class WholeChoice:
    """One choice, put together from its events."""

    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    rows: list[TokenLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    usage: Usage | None = None

    def add(self, event: GenerationEvent) -> None:
        self.reasoning.append(event.reasoning)
        self.content.append(event.content)
        self.rows += event.logprobs
        self.token_ids += event.token_ids
        for call in event.calls:
            if call.call_id is not None:
                self.calls.append(_call_delta(call))
            else:
                self.calls[call.index]["function"]["arguments"] += call.arguments
        if event.finish_reason is not None:
            self.finish_reason, self.usage = event.finish_reason, event.usage

    def message(self, *, thinking: bool) -> dict[str, Any]:
        """`content` is never null; `reasoning_content` is there when the model thinks, `tool_calls` when it calls."""
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self.content)}
        if thinking:
            message["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            message["tool_calls"] = self.calls
        return message


def chat_answer(
    choices: Sequence[WholeChoice],
    *,
    answer_id: str,
    created: int,
    model: str,
    thinking: bool,
    usage: dict[str, Any],
    logprobs: Sequence[Any],
    prompt_token_ids: list[int] | None = None,
) -> bytes:
    """A whole answer; with `prompt_token_ids` it has the ids of the choices too."""
    answer: dict[str, Any] = {
        "id": answer_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "system_fingerprint": SYSTEM_FINGERPRINT,
        "choices": [
            {
                "index": index,
                "message": choice.message(thinking=thinking),
                "logprobs": logprobs[index],
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": usage,
    }
    if prompt_token_ids is not None:
        answer["prompt_token_ids"] = prompt_token_ids
        for index, choice in enumerate(choices):
            answer["choices"][index]["token_ids"] = choice.token_ids
    return sse.json_bytes(answer)
