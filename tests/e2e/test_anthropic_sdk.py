"""/v1/messages through the `anthropic` SDK, against a running server with scripted answers."""

import json
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import BaseModel, TypeAdapter

EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
MESSAGE: TypeAdapter[Any] = TypeAdapter(Message)
DSML = "｜DSML｜"
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "Weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}
USER: dict[str, Any] = {"role": "user", "content": "Weather?"}
OFF: dict[str, Any] = {"type": "disabled"}


def block(*arguments: dict[str, Any]) -> str:
    """Calls of `weather` as the model writes them."""
    invokes = []
    for given in arguments:
        lines = [
            f'<{DSML}parameter name="{key}" string="{str(isinstance(value, str)).lower()}">'
            f"{value if isinstance(value, str) else json.dumps(value)}</{DSML}parameter>\n"
            for key, value in given.items()
        ]
        invokes.append(f'<{DSML}invoke name="weather">\n{"".join(lines)}</{DSML}invoke>')
    return f"\n\n<{DSML}tool_calls>\n" + "\n".join(invokes) + f"\n</{DSML}tool_calls>"


@pytest.fixture(params=["", "/anthropic"])
def client(scripted: Any, request: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=scripted.url + request.param, api_key="none", max_retries=0, timeout=30)


def streamed(client: anthropic.Anthropic, **fields: Any) -> tuple[list[Any], Any]:
    """All events, each checked against the SDK's types, and the message that the SDK put together."""
    with client.messages.stream(**fields) as stream:
        events = list(stream)
        final = stream.get_final_message()
    for event in client.messages.create(**fields, stream=True):
        EVENT.validate_python(event.to_dict())
    return events, final


def content_of(message: Any) -> list[dict[str, Any]]:
    """Blocks without what differs from answer to answer."""
    return [{k: v for k, v in b.to_dict().items() if k not in ("id", "signature")} for b in message.content]


@pytest.mark.parametrize("thinking", [True, False])
def test_create_and_stream(scripted: Any, client: anthropic.Anthropic, thinking: bool) -> None:
    scripted.say = ("Let me see.</think>" if thinking else "") + "Hello, wörld 😀"
    fields: dict[str, Any] = {
        "model": "scripted",
        "max_tokens": 100,
        "system": "Be brief.",
        "messages": [USER],
        "thinking": {"type": "enabled", "budget_tokens": 1024} if thinking else OFF,
    }
    whole = client.messages.create(**fields)
    MESSAGE.validate_python(whole.to_dict())
    thought = [{"type": "thinking", "thinking": "Let me see."}] if thinking else []
    assert content_of(whole) == [*thought, {"type": "text", "text": "Hello, wörld 😀"}]
    assert (whole.stop_reason, whole.stop_sequence) == ("end_turn", None)
    assert whole._request_id is not None
    events, final = streamed(client, **fields)
    assert content_of(final) == content_of(whole)
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert "".join(e.text for e in events if e.type == "text") == "Hello, wörld 😀"
    assert "".join(e.thinking for e in events if e.type == "thinking") == ("Let me see." if thinking else "")
    counted = client.messages.count_tokens(**{k: v for k, v in fields.items() if k != "max_tokens"})
    for usage in (whole.usage, final.usage):
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("omits", [True, False])
def test_a_tool_loop(scripted: Any, client: anthropic.Anthropic, thinking: bool, stream: bool, omits: bool) -> None:
    """Two calls, their results, the answer: the second prompt begins with every token of the first turn."""
    calls = [{"city": "Paris", "days": 2}, {"city": 'Bern "x"\n', "days": 1}]
    thought = "I need the weather.</think>" if thinking else ""
    scripted.say = lambda prompt: thought + ("It rains." if "<tool_result>" in prompt else f"Looking.{block(*calls)}")
    shown = {"type": "adaptive", "display": "omitted" if omits else "summarized"}
    fields: dict[str, Any] = {
        "model": "scripted",
        "max_tokens": 200,
        "tools": [WEATHER],
        "thinking": shown if thinking else OFF,
    }

    def ask(messages: list[Any]) -> Any:
        if stream:
            return streamed(client, **fields, messages=messages)[1]
        return client.messages.create(**fields, messages=messages)

    first = ask([USER])
    assert first.stop_reason == "tool_use"
    uses = [b for b in first.content if b.type == "tool_use"]
    assert [(b.name, b.input) for b in uses] == [("weather", arguments) for arguments in calls]
    assert [b.type for b in first.content] == ["thinking", "text", "tool_use", "tool_use"][not thinking :]
    results = [
        {"type": "tool_result", "tool_use_id": b.id, "content": [{"type": "text", "text": "rain"}]} for b in uses
    ]
    expected = [*scripted.prompts[-1], *scripted.answers[-1], 1]
    second = ask([USER, first.to_param(), {"role": "user", "content": results}])
    assert (second.stop_reason, second.content[-1].text) == ("end_turn", "It rains.")
    assert scripted.prompts[-1][: len(expected)] == expected, "the first turn is what was sampled"
    assert second.usage.cache_read_input_tokens >= len(expected) // 256 * 256


@pytest.mark.parametrize("thinking", [True, False])
def test_a_turn_that_no_renderer_would_write(scripted: Any, client: anthropic.Anthropic, thinking: bool) -> None:
    """Odd numbers come back by the calls' ids, whatever the client's JSON library made of them."""
    thought = "Hm.\n</think>" if thinking else ""
    odd = block({"a": 1.5}).replace("1.5", "1.50")
    scripted.say = lambda prompt: thought + ("Done." if "<tool_result>" in prompt else f"Looking.{odd}")
    number = {"type": "object", "properties": {"a": {"type": "number"}}}
    fields: dict[str, Any] = {
        "model": "scripted",
        "tools": [{**WEATHER, "input_schema": number}],
        "thinking": {"type": "adaptive"} if thinking else OFF,
    }
    first = client.messages.create(**fields, max_tokens=100, messages=[USER])
    result = {"type": "tool_result", "tool_use_id": first.content[-1].id, "content": "rain"}  # type: ignore[union-attr]
    messages: list[Any] = [USER, first.to_param(), {"role": "user", "content": [result]}]
    expected = [*scripted.prompts[-1], *scripted.answers[-1], 1]
    counted = client.messages.count_tokens(**fields, messages=messages)
    usage = client.messages.create(**fields, max_tokens=100, messages=messages).usage
    assert scripted.prompts[-1][: len(expected)] == expected
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens


def test_parse(scripted: Any, client: anthropic.Anthropic) -> None:
    class City(BaseModel):
        name: str
        people: int

    scripted.say = 'thinking</think>{"name": "Bern", "people": 134000}'
    fields: dict[str, Any] = {"model": "scripted", "max_tokens": 100, "messages": [USER], "output_format": City}
    assert client.messages.parse(**fields).parsed_output == City(name="Bern", people=134000)
    with client.messages.stream(**fields) as stream:
        assert stream.get_final_message().parsed_output == City(name="Bern", people=134000)
    assert "You MUST strictly adhere" in scripted.tokenizer.decode(scripted.prompts[-1])


def test_what_a_coding_agent_sends(scripted: Any, client: anthropic.Anthropic) -> None:
    """Claude Code: a changing billing line, cache marks, system messages amid the conversation, beta fields."""
    scripted.say = lambda prompt: "hm</think>" + ("Done." if "<tool_result>" in prompt else block({"city": "Paris"}))
    mark = {"type": "ephemeral"}

    def fields(n: int) -> dict[str, Any]:
        return {
            "model": "claude-opus-5",
            "max_tokens": 32000,
            "betas": ["claude-code-20250219", "interleaved-thinking-2025-05-14"],
            "system": [
                {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1; cch={n};"},
                {"type": "text", "text": "You are an agent.", "cache_control": mark},
            ],
            "thinking": {"type": "adaptive"},
            "output_config": {"effort": "high"},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "metadata": {"user_id": json.dumps({"session_id": "x"})},
            "tools": [{**WEATHER, "cache_control": mark, "eager_input_streaming": True}],
        }

    messages: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "go", "cache_control": mark}]},
        {"role": "system", "content": "Today is Tuesday."},
    ]
    with client.beta.messages.stream(messages=messages, **fields(1)) as stream:
        first = stream.get_final_message()
    assert first.stop_reason == "tool_use"
    use = next(b for b in first.content if b.type == "tool_use")
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "rain", "is_error": False, "cache_control": mark}
    expected = [*scripted.prompts[-1], *scripted.answers[-1], 1]
    again = [*messages, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = client.beta.messages.create(messages=again, **fields(2))
    assert second.content[-1].text == "Done."  # type: ignore[union-attr]
    assert scripted.prompts[-1][: len(expected)] == expected, "the billing line does not cost the cache"
    assert (second.usage.cache_read_input_tokens or 0) >= len(expected) // 256 * 256


def test_stops(scripted: Any, client: anthropic.Anthropic) -> None:
    scripted.say = f"One. STOP Two.{block({'city': 'Paris'})}"
    fields: dict[str, Any] = {"model": "scripted", "messages": [USER], "tools": [WEATHER], "thinking": OFF}
    found = client.messages.create(**fields, max_tokens=100, stop_sequences=["STOP"])
    assert (found.stop_reason, found.stop_sequence, found.content[0].text) == ("stop_sequence", "STOP", "One. ")  # type: ignore[union-attr]
    size = len(scripted.tokenizer.encode(scripted.say, special=True))
    for cut in (2, size // 2, size - 12):
        short = client.messages.create(**fields, max_tokens=cut)
        assert short.stop_reason == "max_tokens"
        _, final = streamed(client, **fields, max_tokens=cut)
        assert content_of(final) == content_of(short)
        assert all(DSML not in b.text for b in short.content if b.type == "text")


@pytest.mark.parametrize(
    ("changes", "error", "kind"),
    [
        ({"model": "other"}, anthropic.NotFoundError, "not_found_error"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "invalid_request_error"),
        ({"messages": []}, anthropic.BadRequestError, "invalid_request_error"),
        ({"system": "x " * 70000}, anthropic.BadRequestError, "invalid_request_error"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            anthropic.BadRequestError,
            "invalid_request_error",
        ),
    ],
)
def test_errors(
    client: anthropic.Anthropic, changes: dict[str, Any], error: type[anthropic.APIStatusError], kind: str
) -> None:
    for stream in (False, True):
        with pytest.raises(error) as caught:
            client.messages.create(
                **{"model": "scripted", "max_tokens": 9, "messages": [USER], "stream": stream, **changes}
            )
        body: Any = caught.value.body
        assert body["error"]["type"] == kind
        assert caught.value.request_id is not None
        if "system" in changes:
            assert body["error"]["message"].startswith("prompt is too long: ")
