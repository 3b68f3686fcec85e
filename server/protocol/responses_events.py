"""An answer as the events and items of /v1/responses.

    created, in_progress
    for each item: output_item.added ── part.added ── deltas ── done ── part.done ── output_item.done
    completed | incomplete | failed | cancelled

A whole answer is the fold of the same events, so both ways of asking get the same thing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from server.errors import ApiError
from server.generation import CallDelta, GenerationEvent, TokenLogprob
from server.protocol import sse
from server.protocol.chat_answer import chat_logprobs
from server.protocol.members import read_partial
from server.protocol.responses_custom import CustomInput
from server.protocol.responses_object import Status, error_object, usage_object
from server.protocol.responses_tools import Called, Toolbox
from server.protocol.sealed import seal

Event = dict[str, Any]
ItemStatus = Literal["completed", "incomplete"]

_PREFIX = {"function": "fc", "custom": "ctc", "local_shell": "lsh", "tool_search": "tsc"}


def encode(event: Event) -> bytes:
    """The event on the wire."""
    return sse.named_event(event["type"], sse.json_bytes(event))


@dataclass(slots=True, kw_only=True)
class _Open:
    """The item that grows."""

    kind: Literal["reasoning", "message", "call"]
    item: dict[str, Any]
    """As it was added; complete when it closes."""
    pieces: list[str] = field(default_factory=list)
    rows: list[TokenLogprob] = field(default_factory=list)
    index: int = 0
    """The call's number in the answer."""
    called: Called | None = None
    custom: CustomInput | None = None


class ResponseBuilder:
    """Events of one response, numbered from 0."""

    def __init__(
        self,
        response: dict[str, Any],
        box: Toolbox,
        *,
        seals: bool,
        logprobs: bool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`response`: the settings. `seals`: reasoning items carry `encrypted_content`."""
        self._response = response
        self._box = box
        self._seals = seals
        self._logprobs = logprobs
        self._clock = clock
        self._sequence = 0
        self._output: list[dict[str, Any]] = []
        self._open: _Open | None = None
        self._suffix = str(response["id"]).removeprefix("resp_")
        self._num_items = 0

    @property
    def output(self) -> list[dict[str, Any]]:
        """The items that are complete."""
        return self._output

    @property
    def has_started(self) -> bool:
        return bool(self._response["status"] != "queued")

    @property
    def is_over(self) -> bool:
        return bool(self._response["status"] not in ("queued", "in_progress"))

    def response(self) -> dict[str, Any]:
        """The response as it is now."""
        return {**self._response, "output": list(self._output)}

    def enqueue(self) -> list[Event]:
        """The first events of a response that nobody waits for; `start` follows when there is news of it."""
        self._response["status"] = "queued"
        return [self._lifecycle("response.created"), self._lifecycle("response.queued")]

    def start(self) -> list[Event]:
        """The events before everything else."""
        created = [] if self._response["status"] == "queued" else [self._lifecycle("response.created")]
        self._response["status"] = "in_progress"
        return [*created, self._lifecycle("response.in_progress")]

    def add(self, news: GenerationEvent) -> list[Event]:
        """The events of one event of the answer."""
        events: list[Event] = []
        if news.reasoning:
            self._add_text("reasoning", news.reasoning, (), events)
        if news.content or any(not row.reasoning for row in news.logprobs):
            self._add_text("message", news.content, news.logprobs, events)
        for call in news.calls:
            self._add_call(call, events)
        if news.finish_reason is not None:
            self._finish(news, events)
        return events

    def fail(self, error: ApiError) -> list[Event]:
        """The last events of an answer that came to nothing; none when it has ended already."""
        if self.is_over:
            return []
        self._response["error"] = error_object(error)
        return self._stop("failed")

    def cancel(self) -> None:
        """The client does not want the rest of the answer, if there is one; nobody is told by an event."""
        if not self.is_over:
            self._stop("cancelled")

    def _stop(self, status: Status) -> list[Event]:
        events: list[Event] = []
        self._close(events, "incomplete")
        self._response["status"] = status
        events.append(self._lifecycle(f"response.{status}"))
        return events

    def _finish(self, news: GenerationEvent, events: list[Event]) -> None:
        cut = news.finish_reason == "length"
        if not self._output and self._open is None and not cut:
            # An answer of nothing is still an answer: its turn stays in the conversation.
            self._begin("message", events)
        if self._open is not None and self._open.kind == "reasoning" and not cut:
            self._begin("message", events)
        self._close(events, "incomplete" if cut else "completed")
        assert news.usage is not None
        self._response["usage"] = usage_object(news.usage)
        status: Status = "incomplete" if cut else "completed"
        self._response["status"] = status
        if cut:
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self._response["completed_at"] = int(self._clock())
        events.append(self._lifecycle(f"response.{status}"))

    def _lifecycle(self, kind: str) -> Event:
        return self._event(kind, response=self.response())

    def _event(self, kind: str, **members: Any) -> Event:
        event = {"type": kind, "sequence_number": self._sequence, **members}
        self._sequence += 1
        return event

    def _place(self, opened: _Open) -> dict[str, Any]:
        return {"item_id": opened.item["id"], "output_index": len(self._output)}

    # Reasoning and messages.

    def _begin(self, kind: Literal["reasoning", "message"], events: list[Event]) -> _Open:
        self._close(events, "completed")
        if kind == "reasoning":
            item: dict[str, Any] = {"type": "reasoning", "id": self._item_id("rs"), "summary": [], "content": []}
        else:
            # What the message is for shows when it ends: `commentary` if calls follow.
            item = {
                "type": "message",
                "id": self._item_id("msg"),
                "role": "assistant",
                "phase": "final_answer",
                "content": [],
            }
        opened = self._open = _Open(kind=kind, item={**item, "status": "in_progress"})
        events.append(self._event("response.output_item.added", output_index=len(self._output), item=opened.item))
        events.append(
            self._event(
                "response.content_part.added", **self._place(opened), content_index=0, part=self._part(opened, "", [])
            )
        )
        return opened

    def _add_text(
        self,
        kind: Literal["reasoning", "message"],
        text: str,
        rows: tuple[TokenLogprob, ...],
        events: list[Event],
    ) -> None:
        opened = self._open
        if opened is None or opened.kind != kind:
            opened = self._begin(kind, events)
        opened.pieces.append(text)
        if kind == "reasoning":
            events.append(
                self._event("response.reasoning_text.delta", **self._place(opened), content_index=0, delta=text)
            )
            return
        opened.rows += rows
        events.append(
            self._event(
                "response.output_text.delta",
                **self._place(opened),
                content_index=0,
                delta=text,
                logprobs=_rows(rows) if rows else [],
            )
        )

    def _part(self, opened: _Open, text: str, logprobs: list[Any]) -> dict[str, Any]:
        if opened.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "annotations": [], "logprobs": logprobs, "text": text}

    # Calls.

    def _add_call(self, delta: CallDelta, events: list[Event]) -> None:
        opened = self._open
        if opened is None or opened.kind != "call" or opened.index != delta.index:
            assert delta.name is not None and delta.call_id is not None, "a call begins with its id and name"
            self._close(events, "completed", followed_by_call=True)
            opened = self._begin_call(delta.index, delta.call_id, self._box.called(delta.name), events)
        if not delta.arguments:
            return
        opened.pieces.append(delta.arguments)
        assert opened.called is not None
        if opened.called.kind == "function":
            kind, piece = "response.function_call_arguments.delta", delta.arguments
        elif opened.custom is not None:
            kind, piece = "response.custom_tool_call_input.delta", opened.custom.push(delta.arguments)
        else:
            return
        if piece:
            events.append(self._event(kind, **self._place(opened), delta=piece))

    def _begin_call(self, index: int, call_id: str, called: Called, events: list[Event]) -> _Open:
        head = {"id": self._item_id(_PREFIX[called.kind]), "call_id": call_id, "status": "in_progress"}
        named: dict[str, Any] = {"name": called.name}
        if called.namespace is not None:
            named["namespace"] = called.namespace
        match called.kind:
            case "function":
                item = {"type": "function_call", **head, **named, "arguments": ""}
            case "custom":
                item = {"type": "custom_tool_call", **head, **named, "input": ""}
            case "local_shell":
                item = {"type": "local_shell_call", **head, "action": {"type": "exec", "command": [], "env": {}}}
            case "tool_search":
                item = {"type": "tool_search_call", **head, "execution": "client", "arguments": {}}
        custom = CustomInput() if called.kind == "custom" else None
        opened = self._open = _Open(kind="call", item=item, index=index, called=called, custom=custom)
        events.append(self._event("response.output_item.added", output_index=len(self._output), item=dict(item)))
        return opened

    # The end of an item.

    def _close(self, events: list[Event], status: ItemStatus, *, followed_by_call: bool = False) -> None:
        opened = self._open
        if opened is None:
            return
        if opened.kind == "call":
            done = self._end_call(opened, events)
        else:
            done = self._end_text(opened, events)
            if followed_by_call and opened.kind == "message":
                done["phase"] = "commentary"
        done["status"] = status
        events.append(self._event("response.output_item.done", output_index=len(self._output), item=done))
        self._output.append(done)
        self._open = None

    def _end_text(self, opened: _Open, events: list[Event]) -> dict[str, Any]:
        text = "".join(opened.pieces)
        rows = _rows(opened.rows) if self._logprobs else []
        part = self._part(opened, text, rows)
        place = {**self._place(opened), "content_index": 0}
        if opened.kind == "reasoning":
            events.append(self._event("response.reasoning_text.done", **place, text=text))
        else:
            events.append(self._event("response.output_text.done", **place, text=text, logprobs=rows))
        events.append(self._event("response.content_part.done", **place, part=part))
        done = {**opened.item, "content": [part]}
        if opened.kind == "reasoning" and self._seals:
            done["encrypted_content"] = seal(text)
        return done

    def _end_call(self, opened: _Open, events: list[Event]) -> dict[str, Any]:
        arguments = "".join(opened.pieces)
        assert opened.called is not None
        match opened.called.kind:
            case "function":
                events.append(
                    self._event(
                        "response.function_call_arguments.done",
                        **self._place(opened),
                        name=opened.called.name,
                        arguments=arguments,
                    )
                )
                return {**opened.item, "arguments": arguments}
            case "custom":
                assert opened.custom is not None
                rest, whole = opened.custom.finish()
                if rest:
                    events.append(
                        self._event("response.custom_tool_call_input.delta", **self._place(opened), delta=rest)
                    )
                events.append(self._event("response.custom_tool_call_input.done", **self._place(opened), input=whole))
                return {**opened.item, "input": whole}
            case "local_shell":
                return {**opened.item, "action": _shell_action(read_partial(arguments))}
            case "tool_search":
                return {**opened.item, "arguments": read_partial(arguments)}

    def _item_id(self, prefix: str) -> str:
        self._num_items += 1
        return f"{prefix}_{self._suffix}_{self._num_items - 1}"


def _rows(rows: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> list[Any]:
    found: list[Any] = chat_logprobs(rows, thinking=False)["content"]
    return found


def _shell_action(arguments: Any) -> dict[str, Any]:
    given = arguments if isinstance(arguments, dict) else {}
    command = given.get("command")
    words = command if isinstance(command, list) else [command]
    action = {"type": "exec", "command": [str(word) for word in words if word is not None], "env": {}}
    return {**action, **{k: given[k] for k in ("working_directory", "timeout_ms") if given.get(k) is not None}}
