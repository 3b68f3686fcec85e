"""An answer as the events and blocks of /v1/messages.

    message_start
    for each block: content_block_start ── content_block_delta ... ── content_block_stop
    message_delta (stop reason, usage), message_stop

A whole answer is the fold of the same blocks, so both ways of asking get the same thing.
"""

from typing import Any, Literal

from server.errors import ApiError
from server.generation import CallDelta, GenerationEvent, Usage
from server.protocol import sse
from server.protocol.members import read_partial
from server.protocol.sealed import seal

Event = dict[str, Any]
PING = sse.named_event("ping", b'{"type":"ping"}')

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def encode(event: Event) -> bytes:
    """The event on the wire."""
    return sse.named_event(event["type"], sse.json_bytes(event))


def failure(error: ApiError) -> bytes:
    """The last event of a stream that failed."""
    return sse.named_event("error", error.anthropic_body())


class MessageBuilder:
    """Events of one message."""

    def __init__(self, message_id: str, model: str, num_prompt_tokens: int, *, omits_thinking: bool) -> None:
        """`omits_thinking`: thinking blocks have no text, and their signature holds it."""
        self._id = message_id
        self._model = model
        self._omits_thinking = omits_thinking
        self._usage = _usage(num_prompt_tokens, None)
        self._stop: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
        self._content: list[dict[str, Any]] = []
        self._kind: Literal["thinking", "text", "tool_use"] | None = None
        """Of the block that grows."""
        self._call = 0
        self._pieces: list[str] = []

    def message(self) -> dict[str, Any]:
        """The message with the blocks that are complete."""
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": list(self._content),
            **self._stop,
            "usage": self._usage,
        }

    def start(self) -> list[Event]:
        """The first event. It counts the whole prompt as input; what the cache had of it shows at the end."""
        return [{"type": "message_start", "message": self.message()}]

    def add(self, news: GenerationEvent) -> list[Event]:
        """The events of one event of the answer."""
        events: list[Event] = []
        if news.reasoning:
            self._text("thinking", news.reasoning, events)
        if news.content:
            self._text("text", news.content, events)
        for call in news.calls:
            self._add_call(call, events)
        if news.finish_reason is not None:
            self._finish(news, events)
        return events

    def _finish(self, news: GenerationEvent, events: list[Event]) -> None:
        if not self._content and self._kind is None:
            # A message of no blocks could not be sent back.
            self._begin("text", {"type": "text", "text": ""}, events)
        self._end(events)
        assert news.usage is not None and news.finish_reason is not None
        self._usage = _usage(news.usage.prompt_tokens, news.usage)
        self._stop["stop_reason"] = _STOP_REASONS[news.finish_reason]
        if news.finish_reason == "stop" and isinstance(news.stop_reason, str):
            self._stop = {"stop_reason": "stop_sequence", "stop_sequence": news.stop_reason}
        events.append({"type": "message_delta", "delta": dict(self._stop), "usage": self._usage})
        events.append({"type": "message_stop"})

    def _text(self, kind: Literal["thinking", "text"], text: str, events: list[Event]) -> None:
        if self._kind != kind:
            head = {"type": kind, kind: ""}
            self._begin(kind, {**head, "signature": ""} if kind == "thinking" else head, events)
        self._pieces.append(text)
        if kind == "text" or not self._omits_thinking:
            self._delta({"type": f"{kind}_delta", kind: text}, events)

    def _add_call(self, delta: CallDelta, events: list[Event]) -> None:
        if self._kind != "tool_use" or self._call != delta.index:
            assert delta.name is not None and delta.call_id is not None, "a call begins with its id and name"
            self._begin("tool_use", {"type": "tool_use", "id": delta.call_id, "name": delta.name, "input": {}}, events)
            self._call = delta.index
        if delta.arguments:
            self._pieces.append(delta.arguments)
            self._delta({"type": "input_json_delta", "partial_json": delta.arguments}, events)

    def _begin(self, kind: Literal["thinking", "text", "tool_use"], block: dict[str, Any], events: list[Event]) -> None:
        self._end(events)
        self._kind = kind
        events.append({"type": "content_block_start", "index": len(self._content), "content_block": dict(block)})
        self._content.append(block)

    def _end(self, events: list[Event]) -> None:
        if self._kind is None:
            return
        block, text = self._content[-1], "".join(self._pieces)
        if self._kind == "tool_use":
            block["input"] = read_partial(text)
        elif self._kind == "text":
            block["text"] = text
        else:
            block["thinking"] = "" if self._omits_thinking else text
            # Whoever reads the text needs no copy of it: the signature is there for clients that insist on one.
            block["signature"] = seal(text) if self._omits_thinking else self._id
            self._delta({"type": "signature_delta", "signature": block["signature"]}, events)
        events.append({"type": "content_block_stop", "index": len(self._content) - 1})
        self._kind = None
        self._pieces.clear()

    def _delta(self, delta: dict[str, Any], events: list[Event]) -> None:
        events.append({"type": "content_block_delta", "index": len(self._content) - 1, "delta": delta})


def _usage(num_prompt_tokens: int, usage: Usage | None) -> dict[str, Any]:
    """Anthropic counts as input only what the cache did not have."""
    cached = usage.cached_tokens if usage is not None else 0
    counts: dict[str, Any] = {
        "input_tokens": num_prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.completion_tokens if usage is not None else 0,
        "service_tier": "standard",
    }
    if usage is not None and usage.miss_reason is not None:
        counts["cache_miss_reason"] = usage.miss_reason
    return counts
