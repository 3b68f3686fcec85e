"""Events of /v1/responses and /v1/messages: they fold to the whole answer, and the SDKs' own types accept each one."""

import json
from typing import Any

import hypothesis
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from server.errors import ApiError
from server.generation import CallDelta, GenerationEvent, TokenLogprob, TopLogprob, Usage
from server.protocol.messages_events import MessageBuilder, failure
from server.protocol.responses_custom import CustomInput
from server.protocol.responses_events import ResponseBuilder
from server.protocol.responses_items import to_messages
from server.protocol.responses_object import settings
from server.protocol.responses_request import ResponsesBody, to_chat
from server.protocol.sealed import unseal

OPENAI_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
OPENAI_RESPONSE: TypeAdapter[Any] = TypeAdapter(Response)
ANTHROPIC_EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
ANTHROPIC_MESSAGE: TypeAdapter[Any] = TypeAdapter(Message)
USAGE = Usage(prompt_tokens=10, completion_tokens=6, reasoning_tokens=2, cached_tokens=4)
PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}}
TOOLS = [
    {"type": "function", "name": "f", "parameters": PARAMETERS},
    {"type": "namespace", "name": "ns", "description": "", "tools": [{"type": "function", "name": "g"}]},
    {"type": "custom", "name": "patch"},
    {"type": "local_shell"},
    {"type": "tool_search", "execution": "client"},
]
ARGUMENTS = {
    "f": {"a": 'x"\\\n', "n": [1.5, None]},
    "ns__g": {},
    "patch": {"input": '*** Begin\n"é😀"\\'},
    "local_shell": {"command": ["ls", "-l"], "timeout_ms": 5},
    "tool_search": {"query": "mail"},
    "unknown": {"a": "b"},
}


def make_builder(**fields: Any) -> ResponseBuilder:
    body, _ = ResponsesBody.read(json.dumps({"model": "m", "input": "hi", "tools": TOOLS, **fields}).encode())
    body.check()
    asked = to_chat(body)
    response = settings("resp_1", 5, "m", body, asked)
    return ResponseBuilder(
        response, asked.box, seals=body.wants_sealed_reasoning, logprobs=body.num_logprobs is not None
    )


@st.composite
def cut(draw: st.DrawFn, text: str) -> list[str]:
    """`text` in pieces."""
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=4)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True) if a < b]


@st.composite
def answers(draw: st.DrawFn) -> list[GenerationEvent]:
    """Events of an answer as the generator makes them: reasoning, content, calls, then the end."""
    text = st.text(st.sampled_from('ab\n"é😀'), min_size=1, max_size=8)
    news: list[GenerationEvent] = []
    if draw(st.booleans()):
        news += [GenerationEvent(reasoning=piece) for piece in draw(cut(draw(text)))]
    if draw(st.booleans()):
        news += [GenerationEvent(content=piece) for piece in draw(cut(draw(text)))]
    names = draw(st.lists(st.sampled_from(sorted(ARGUMENTS)), max_size=3))
    for index, name in enumerate(names):
        head = CallDelta(index=index, call_id=f"call_{index}", name=name)
        arguments = json.dumps(ARGUMENTS[name], ensure_ascii=draw(st.booleans()))
        pieces = [CallDelta(index=index, arguments=piece) for piece in draw(cut(arguments))]
        if draw(st.booleans()):
            news.append(GenerationEvent(calls=(head, *pieces)))
        else:
            news += [GenerationEvent(calls=(delta,)) for delta in (head, *pieces)]
    reason: Any = "tool_calls" if names else "stop"
    if draw(st.integers(0, 3)) == 0:
        # Cut off anywhere, in the middle of a call too.
        news, reason = news[: draw(st.integers(0, len(news)))], "length"
    if news and draw(st.booleans()):
        last = news.pop()
        end = GenerationEvent(
            reasoning=last.reasoning, content=last.content, calls=last.calls, finish_reason=reason, usage=USAGE
        )
    else:
        end = GenerationEvent(finish_reason=reason, usage=USAGE)
    return [*news, end]


def fold_responses(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The response that a client puts together from deltas; every `done` is checked against them."""
    items: list[dict[str, Any]] = []
    text = ""
    for event in events:
        kind = event["type"].removeprefix("response.")
        if "output_index" in event:
            assert event["output_index"] == len(items) - (kind != "output_item.added")
        if kind == "output_item.added":
            items.append(event["item"])
            assert event["item"]["status"] == "in_progress"
            text = ""
        elif "item_id" in event:
            assert event["item_id"] == items[-1]["id"]
        if kind.endswith(".delta"):
            assert event["delta"] or kind == "output_text.delta"
            text += event["delta"]
        if kind in ("output_text.done", "reasoning_text.done"):
            assert event["text"] == text
        if kind == "function_call_arguments.done":
            assert event["arguments"] == text
        if kind == "custom_tool_call_input.done":
            assert event["input"] == text
        if kind == "content_part.done":
            assert event["part"]["text"] == text
        if kind == "output_item.done":
            assert event["item"]["id"] == items[-1]["id"]
            items[-1] = event["item"]
    last = events[-1]["response"]
    assert last["output"] == items
    return last  # type: ignore[no-any-return]


@hypothesis.settings(max_examples=40)
@given(answers(), st.booleans())
def test_responses_fold_to_the_whole(news: list[GenerationEvent], seals: bool) -> None:
    builder = make_builder(include=["reasoning.encrypted_content"] if seals else [])
    events = builder.start()
    for one in news:
        events += builder.add(one)
    whole = builder.response()
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == f"response.{whole['status']}"
    assert fold_responses(events) == whole
    for event in events:
        found = OPENAI_EVENT.validate_python(event)
        assert found.type == event["type"]
        assert not isinstance(found.to_dict().get("item"), str)
    assert OPENAI_RESPONSE.validate_python(whole).status == whole["status"]
    reason = news[-1].finish_reason
    assert whole["status"] == ("incomplete" if reason == "length" else "completed")
    assert whole["incomplete_details"] == ({"reason": "max_output_tokens"} if reason == "length" else None)
    texts = "".join(one.content for one in news)
    assert "".join(item["content"][0]["text"] for item in whole["output"] if item["type"] == "message") == texts
    for item in whole["output"]:
        if item["type"] == "reasoning":
            text = item["content"][0]["text"]
            assert text == "".join(one.reasoning for one in news)
            assert unseal(item.get("encrypted_content", "")) == (text if seals else None)
    if reason != "length":
        assert whole["output"], "an answer always has an item"
        calls = [d.name for one in news for d in one.calls if d.name is not None]
        turn = to_messages([{"role": "user", "content": "q"}, *whole["output"]])[1]
        sent = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in turn.get("tool_calls", [])]
        assert sent == [(name, ARGUMENTS[name]) for name in calls], "what comes back is what was called"
        assert turn["content"] == texts
        phases = {item["phase"] for item in whole["output"] if item["type"] == "message"}
        assert phases <= {"commentary" if calls else "final_answer"}


def test_the_order_of_events() -> None:
    builder = make_builder()
    news = [
        GenerationEvent(reasoning="r"),
        GenerationEvent(content="c"),
        GenerationEvent(calls=(CallDelta(index=0, call_id="call_0", name="ns__g"),)),
        GenerationEvent(calls=(CallDelta(index=0, arguments="{}"),)),
        GenerationEvent(finish_reason="tool_calls", usage=USAGE),
    ]
    events = builder.start() + [event for one in news for event in builder.add(one)]
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    call = events[-1]["response"]["output"][2]
    assert (call["name"], call["namespace"], call["call_id"]) == ("g", "ns", "call_0")
    assert events[-1]["response"]["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 6,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 16,
    }


def test_a_failure_ends_the_item_and_the_response() -> None:
    builder = make_builder()
    events = [*builder.start(), *builder.add(GenerationEvent(content="half")), *builder.fail(ApiError(503, "gone"))]
    last = events[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "gone"}
    assert [item["status"] for item in last["response"]["output"]] == ["incomplete"]
    for event in events:
        OPENAI_EVENT.validate_python(event)


def test_log_probabilities_stand_at_their_text() -> None:
    top = (TopLogprob(token_id=1, token="H", bytes=b"H", logprob=-0.5),)
    row = TokenLogprob(token_id=1, token="H", bytes=b"H", logprob=-0.5, top=top, reasoning=False, text_offset=0)
    builder = make_builder(top_logprobs=1)
    news = [
        GenerationEvent(content="H", logprobs=(row,)),
        GenerationEvent(logprobs=(row,), finish_reason="stop", usage=USAGE),
    ]
    events = builder.start() + [event for one in news for event in builder.add(one)]
    for event in events:
        OPENAI_EVENT.validate_python(event)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [len(event["logprobs"]) for event in deltas] == [1, 1]
    (part,) = builder.response()["output"][0]["content"]
    assert (
        part["logprobs"]
        == [
            {
                "token": "H",
                "logprob": -0.5,
                "bytes": [72],
                "top_logprobs": [{"token": "H", "logprob": -0.5, "bytes": [72]}],
            }
        ]
        * 2
    )


@given(st.data(), st.text(max_size=20), st.booleans())
def test_the_input_of_a_custom_tool_streams(data: st.DataObject, text: str, ascii_only: bool) -> None:
    arguments = json.dumps({"input": text}, ensure_ascii=ascii_only)
    custom = CustomInput()
    sent = "".join(custom.push(piece) for piece in data.draw(cut(arguments)))
    rest, whole = custom.finish()
    assert whole == text
    assert sent + rest == text
    assert rest == "" or "\\ud" in arguments


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"input": "cut off', "cut off"),
        ('{"input": "half an escape \\u00', "half an escape "),
        ('{"input": 5}', '{"input": 5}'),
        ('{"input": "x", "more": 1}', "x"),
        ('{"other": "x"}', '{"other": "x"}'),
        ("{}", "{}"),
        ("", ""),
    ],
)
def test_arguments_of_another_shape(arguments: str, expected: str) -> None:
    for size in (1, 3, 100):
        custom = CustomInput()
        sent = "".join(custom.push(arguments[n : n + size]) for n in range(0, len(arguments), size))
        rest, whole = custom.finish()
        assert sent + rest == whole == expected


def fold_messages(events: list[dict[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {}
    pieces = ""
    for event in events:
        match event["type"]:
            case "message_start":
                message = event["message"]
                assert message["content"] == []
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(dict(event["content_block"]))
                pieces = ""
            case "content_block_delta":
                block, delta = message["content"][event["index"]], event["delta"]
                match delta["type"]:
                    case "text_delta":
                        block["text"] += delta["text"]
                    case "thinking_delta":
                        block["thinking"] += delta["thinking"]
                    case "signature_delta":
                        block["signature"] += delta["signature"]
                    case "input_json_delta":
                        pieces += delta["partial_json"]
            case "content_block_stop":
                if pieces and events[-2]["delta"]["stop_reason"] != "max_tokens":
                    message["content"][event["index"]]["input"] = json.loads(pieces)
                elif pieces:
                    message["content"][event["index"]]["input"] = None
            case "message_delta":
                message |= event["delta"]
                message["usage"] = event["usage"]
    return message


@given(answers(), st.booleans())
def test_messages_fold_to_the_whole(news: list[GenerationEvent], omits: bool) -> None:
    builder = MessageBuilder("msg_1", "m", 10, omits_thinking=omits)
    events = builder.start()
    for one in news:
        events += builder.add(one)
    whole = builder.message()
    folded = fold_messages(events)
    for block, found in zip(folded["content"], whole["content"], strict=True):
        if block.get("input", ...) is None:
            block["input"] = found["input"]
    assert folded == whole
    for event in events:
        assert ANTHROPIC_EVENT.validate_python(event).type == event["type"]
    ANTHROPIC_MESSAGE.validate_python(whole)
    assert whole["content"], "a message without blocks could not be sent back"
    reason = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[str(news[-1].finish_reason)]
    assert whole["stop_reason"] == reason
    assert whole["usage"]["input_tokens"] + whole["usage"]["cache_read_input_tokens"] == 10
    assert "".join(b["text"] for b in whole["content"] if b["type"] == "text") == "".join(n.content for n in news)
    for block in whole["content"]:
        if block["type"] == "thinking":
            text = "".join(n.reasoning for n in news)
            assert (block["thinking"], unseal(block["signature"])) == (("", text) if omits else (text, None))
        if block["type"] == "tool_use" and reason == "tool_use":
            assert block["input"] == ARGUMENTS[block["name"]]


def test_a_stop_sequence() -> None:
    for stop, expected in (("END", ("stop_sequence", "END")), (7, ("end_turn", None)), (None, ("end_turn", None))):
        builder = MessageBuilder("msg_1", "m", 10, omits_thinking=False)
        builder.start()
        builder.add(GenerationEvent(content="x", finish_reason="stop", stop_reason=stop, usage=USAGE))
        found = builder.message()
        assert (found["stop_reason"], found["stop_sequence"]) == expected


def test_errors_of_the_messages_api() -> None:
    kinds = {
        400: "invalid_request_error",
        401: "authentication_error",
        404: "not_found_error",
        413: "request_too_large",
        415: "invalid_request_error",
        429: "rate_limit_error",
        500: "api_error",
        503: "overloaded_error",
    }
    for status, kind in kinds.items():
        body = json.loads(ApiError(status, "m").anthropic_body())
        assert body == {"type": "error", "error": {"type": kind, "message": "m"}}
    line, data, *_ = failure(ApiError(503, "m")).decode().split("\n")
    assert line == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["type"] == "overloaded_error"
