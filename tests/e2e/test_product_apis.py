"""{responses, messages} x thinking x tool choice x format x stream: the right fields are filled and nothing stands in
the wrong one."""

import itertools
import json
from typing import Any

import httpx
import pytest

DSML = "｜DSML｜"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
CITY = f'<{DSML}parameter name="city" string="true">Paris</{DSML}parameter>'
CALL = f'<{DSML}invoke name="weather">\n{CITY}\n</{DSML}invoke>'
CLOSE = f"\n</{DSML}tool_calls>"
OPEN = f"\n\n<{DSML}tool_calls>\n"
MATRIX = list(itertools.product((True, False), ("none", "auto", "required", "named"), (True, False), (True, False)))


def script(*, thinking: bool, choice: str, structured: bool) -> tuple[str, str, bool]:
    """(what the model says, its content, whether it calls)."""
    thought = "A thought.</think>" if thinking else ""
    if choice == "none":
        content = '{"city": "Paris"}' if structured else "It rains."
        return thought + content, content, False
    if choice == "auto":
        content = "" if structured else "Looking."
        return thought + content + OPEN + CALL + CLOSE, content, True
    # Without thinking the prompt has opened the block.
    return thought + (OPEN if thinking else "") + CALL + CLOSE, "", True


def sent_events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def no_markup(value: Any) -> None:
    assert DSML not in json.dumps(value, ensure_ascii=False)
    assert "think>" not in json.dumps(value)


@pytest.mark.parametrize(("thinking", "choice", "structured", "stream"), MATRIX)
def test_responses(scripted: Any, thinking: bool, choice: str, structured: bool, stream: bool) -> None:
    scripted.say, content, calls = script(thinking=thinking, choice=choice, structured=structured)
    body: dict[str, Any] = {
        "model": "scripted",
        "input": "Weather?",
        "tools": [{"type": "function", "name": "weather", "parameters": SCHEMA}],
        "tool_choice": {"type": "function", "name": "weather"} if choice == "named" else choice,
        "reasoning": {"effort": "low" if thinking else "none"},
        "stream": stream,
    }
    if structured:
        body["text"] = {"format": {"type": "json_schema", "name": "city", "schema": SCHEMA, "strict": True}}
    answer = httpx.post(f"{scripted.url}/v1/responses", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    found = sent_events(answer.text)[-1]["response"] if stream else answer.json()
    no_markup(found["output"])
    assert (found["status"], found["incomplete_details"], found["error"]) == ("completed", None, None)
    kinds = ["reasoning"] * thinking + ["message"] * bool(content) + ["function_call"] * calls
    assert [item["type"] for item in found["output"]] == kinds
    for item in found["output"]:
        if item["type"] == "reasoning":
            assert item["content"] == [{"type": "reasoning_text", "text": "A thought."}]
        elif item["type"] == "message":
            assert item["content"][0]["text"] == content
        else:
            assert (item["name"], json.loads(item["arguments"])) == ("weather", {"city": "Paris"})
    assert (found["usage"]["output_tokens_details"]["reasoning_tokens"] > 0) is thinking


@pytest.mark.parametrize(("thinking", "choice", "structured", "stream"), MATRIX)
def test_messages(scripted: Any, thinking: bool, choice: str, structured: bool, stream: bool) -> None:
    scripted.say, content, calls = script(thinking=thinking, choice=choice, structured=structured)
    choices = {"required": {"type": "any"}, "named": {"type": "tool", "name": "weather"}}
    body: dict[str, Any] = {
        "model": "scripted",
        "max_tokens": 200,
        "messages": [{"role": "user", "content": "Weather?"}],
        "tools": [{"name": "weather", "input_schema": SCHEMA}],
        "tool_choice": choices.get(choice, {"type": choice}),
        "thinking": {"type": "adaptive" if thinking else "disabled"},
        "stream": stream,
    }
    if structured:
        body["output_config"] = {"format": {"type": "json_schema", "schema": SCHEMA}}
    answer = httpx.post(f"{scripted.url}/v1/messages", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    found = folded(sent_events(answer.text)) if stream else answer.json()
    no_markup(found["content"])
    assert found["stop_reason"] == ("tool_use" if calls else "end_turn")
    kinds = ["thinking"] * thinking + ["text"] * bool(content) + ["tool_use"] * calls
    assert [block["type"] for block in found["content"]] == kinds
    for block in found["content"]:
        match block["type"]:
            case "thinking":
                assert block["thinking"] == "A thought."
            case "text":
                assert block["text"] == content
            case "tool_use":
                assert (block["name"], block["input"]) == ("weather", {"city": "Paris"})


def folded(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message of a stream."""
    message: dict[str, Any] = {}
    pieces: dict[int, str] = {}
    for event in events:
        if event["type"] == "message_start":
            message = event["message"]
        elif event["type"] == "content_block_start":
            message["content"].append(event["content_block"])
        elif event["type"] == "message_delta":
            message |= event["delta"]
        elif event["type"] == "content_block_delta":
            block = message["content"][event["index"]]
            delta = event["delta"]
            if delta["type"] == "input_json_delta":
                pieces[event["index"]] = pieces.get(event["index"], "") + delta["partial_json"]
            else:
                name = delta["type"].removesuffix("_delta")
                block[name] += delta[name]
    for index, text in pieces.items():
        message["content"][index]["input"] = json.loads(text)
    return message
