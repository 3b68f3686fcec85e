"""/v1/responses through the `openai` SDK, against a running server with scripted answers."""

import json
import time
from typing import Any

import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
DSML = "｜DSML｜"
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "Weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "strict": False,
}
OFF: dict[str, Any] = {"effort": "none"}


def block(*calls: tuple[str, dict[str, Any]]) -> str:
    """Calls as the model writes them."""
    invokes = []
    for name, arguments in calls:
        lines = [
            f'<{DSML}parameter name="{key}" string="{str(isinstance(value, str)).lower()}">'
            f"{value if isinstance(value, str) else json.dumps(value)}</{DSML}parameter>\n"
            for key, value in arguments.items()
        ]
        invokes.append(f'<{DSML}invoke name="{name}">\n{"".join(lines)}</{DSML}invoke>')
    return f"\n\n<{DSML}tool_calls>\n" + "\n".join(invokes) + f"\n</{DSML}tool_calls>"


@pytest.fixture
def client(scripted: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0, timeout=30)


def streamed(client: openai.OpenAI, **fields: Any) -> tuple[list[Any], Any]:
    """All events, each checked against the SDK's types, and the response that the SDK put together."""
    with client.responses.stream(model="scripted", **fields) as stream:
        events = list(stream)
        final = stream.get_final_response()
    raw = list(client.responses.create(model="scripted", stream=True, **fields))
    for event in raw:
        EVENT.validate_python(event.to_dict())
    assert [event.sequence_number for event in raw] == list(range(len(raw)))
    return events, final


@pytest.mark.parametrize("thinking", [True, False])
def test_create_and_stream(scripted: Any, client: openai.OpenAI, thinking: bool) -> None:
    scripted.say = ("Let me see.</think>" if thinking else "") + "Hello, wörld 😀"
    fields: dict[str, Any] = {"input": "Hi", "reasoning": {"effort": "high" if thinking else "none"}}
    whole = client.responses.create(model="scripted", **fields)
    assert whole.output_text == "Hello, wörld 😀"
    assert (whole.status, whole.error, whole.incomplete_details) == ("completed", None, None)
    assert [item.type for item in whole.output] == ["reasoning", "message"][not thinking :]
    assert whole.usage is not None
    assert (whole.usage.output_tokens_details.reasoning_tokens > 0) is thinking
    events, final = streamed(client, **fields)
    assert final.output_text == whole.output_text
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    reasoning = "".join(e.delta for e in events if e.type == "response.reasoning_text.delta")
    assert reasoning == ("Let me see." if thinking else "")
    assert whole._request_id is not None


def test_retrieve_delete_and_input_items(scripted: Any, client: openai.OpenAI) -> None:
    scripted.say = "</think>ok"
    made = client.responses.create(model="scripted", input=[{"role": "user", "content": f"m{n}"} for n in range(3)])
    assert client.responses.retrieve(made.id).to_dict() == made.to_dict()
    items = list(client.responses.input_items.list(made.id, order="asc", limit=2))
    assert [item.content[0].text for item in items] == ["m0", "m1", "m2"]  # type: ignore[union-attr]
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    count = client.responses.input_tokens.count(model="scripted", input="m0")
    assert count.input_tokens == client.responses.create(model="scripted", input="m0").usage.input_tokens  # type: ignore[union-attr]


def test_the_background(scripted: Any, client: openai.OpenAI) -> None:
    scripted.say = "</think>ok"
    made = client.responses.create(model="scripted", input="Hi", background=True)
    assert made.status in ("queued", "in_progress")
    deadline = time.monotonic() + 10
    while made.status in ("queued", "in_progress") and time.monotonic() < deadline:
        time.sleep(0.02)
        made = client.responses.retrieve(made.id)
    assert (made.status, made.output_text) == ("completed", "ok")
    assert client.responses.cancel(made.id).status == "completed"
    events = list(client.responses.create(model="scripted", input="Hi", background=True, stream=True))
    response_id = events[0].response.id  # type: ignore[union-attr]
    again = list(client.responses.retrieve(response_id, stream=True, starting_after=3))
    assert [event.to_dict() for event in again] == [event.to_dict() for event in events[4:]]


def test_parse(scripted: Any, client: openai.OpenAI) -> None:
    class City(BaseModel):
        name: str
        people: int

    scripted.say = 'thinking</think>{"name": "Bern", "people": 134000}'
    parsed = client.responses.parse(model="scripted", input="A city.", text_format=City)
    assert parsed.output_parsed == City(name="Bern", people=134000)
    with client.responses.stream(model="scripted", input="A city.", text_format=City) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_parsed == City(name="Bern", people=134000)
    assert "You MUST strictly adhere" in scripted.tokenizer.decode(scripted.prompts[-1])


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("keeps", [True, False])
def test_a_tool_loop(scripted: Any, client: openai.OpenAI, thinking: bool, stream: bool, keeps: bool) -> None:
    """Two calls, their results, the answer: the second prompt begins with every token of the first turn."""
    thought = "I need the weather.</think>" if thinking else ""
    calls = [("weather", {"city": "Paris", "days": 2}), ("weather", {"city": 'Bern "x"\n', "days": 1})]

    def say(prompt: str) -> str:
        return thought + ("It rains." if "<tool_result>" in prompt else f"Looking.{block(*calls)}")

    scripted.say = say
    fields: dict[str, Any] = {
        "tools": [WEATHER],
        "reasoning": {"effort": "high" if thinking else "none"},
        "store": keeps,
    }
    history: list[Any] = [{"role": "user", "content": "Weather?"}]

    def ask(**more: Any) -> Any:
        return (
            streamed(client, **fields, **more)[1]
            if stream
            else client.responses.create(model="scripted", **fields, **more)
        )

    first = ask(input=history)
    made = [item for item in first.output if item.type == "function_call"]
    assert [json.loads(item.arguments) for item in made] == [arguments for _, arguments in calls]
    assert [item.name for item in made] == ["weather", "weather"]
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call", "function_call"][
        not thinking :
    ]
    results = [{"type": "function_call_output", "call_id": item.call_id, "output": "rain"} for item in made]
    prompt, sampled = scripted.prompts[-1], scripted.answers[-1]
    if keeps:
        second = ask(input=results, previous_response_id=first.id)
    else:
        second = ask(input=[*history, *[item.to_dict() for item in first.output], *results])
    assert second.output_text == "It rains."
    expected = [*prompt, *sampled, 1]
    assert scripted.prompts[-1][: len(expected)] == expected, "the first turn is what was sampled"
    assert second.usage.input_tokens_details.cached_tokens >= len(expected) // 256 * 256


def test_reasoning_survives_in_its_sealed_form(scripted: Any, client: openai.OpenAI) -> None:
    """Clients that keep nothing but `encrypted_content` still send the whole turn back."""
    scripted.say = f"Deep thought.</think>{block(('weather', {'city': 'Paris'}))}"
    fields: dict[str, Any] = {"tools": [WEATHER], "store": False, "include": ["reasoning.encrypted_content"]}
    first = client.responses.create(model="scripted", input="Weather?", **fields)
    items = [item.to_dict() for item in first.output]
    assert items[0].pop("content") == [{"type": "reasoning_text", "text": "Deep thought."}]
    expected = [*scripted.prompts[-1], *scripted.answers[-1], 1]
    result = {"type": "function_call_output", "call_id": items[1]["call_id"], "output": "rain"}
    client.responses.create(model="scripted", input=[{"role": "user", "content": "Weather?"}, *items, result], **fields)  # type: ignore[list-item]
    assert scripted.prompts[-1][: len(expected)] == expected


@pytest.mark.parametrize("thinking", [True, False])
def test_a_turn_that_no_renderer_would_write(scripted: Any, client: openai.OpenAI, thinking: bool) -> None:
    """Odd numbers come back by the calls' ids, whatever the client's JSON library made of them."""
    thought = "Hm.\n</think>" if thinking else ""
    odd = block(("weather", {"a": 1.5})).replace("1.5", "1.50")
    scripted.say = lambda prompt: thought + ("Done." if "<tool_result>" in prompt else f"Looking.{odd}")
    number = {"type": "object", "properties": {"a": {"type": "number"}}}
    fields: dict[str, Any] = {
        "model": "scripted",
        "tools": [{**WEATHER, "parameters": number}],
        "reasoning": {"effort": "low" if thinking else "none"},
    }
    history: list[Any] = [{"role": "user", "content": "Weather?"}]
    first = client.responses.create(**fields, input=history)
    items = [item.to_dict() for item in first.output]
    items[-1]["arguments"] = json.dumps(json.loads(items[-1]["arguments"]))
    result = {"type": "function_call_output", "call_id": items[-1]["call_id"], "output": "rain"}
    expected = [*scripted.prompts[-1], *scripted.answers[-1], 1]
    counted = client.responses.input_tokens.count(
        model="scripted", **{k: fields[k] for k in ("tools", "reasoning")}, input=[*history, *items, result]
    )
    second = client.responses.create(**fields, input=[*history, *items, result])
    assert scripted.prompts[-1][: len(expected)] == expected
    assert second.usage is not None and second.usage.input_tokens == counted.input_tokens


PATCH = r"""start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?
hunk: ("*** Add File: " | "*** Update File: ") /(.+)/ LF line+
line: /[-+ ]/ /(.*)/ LF -> line
%import common.LF"""


def test_tools_of_a_coding_agent(scripted: Any, client: openai.OpenAI) -> None:
    """What Codex sends: namespaces, custom tools with a grammar, and tools that are not there."""
    patch = '*** Begin Patch\n*** Add File: a.py\n+print("é")\n*** End Patch'
    calls = [("exec", {"cmd": "ls"}), ("mail__send", {"to": "x"}), ("apply_patch", {"input": patch})]
    scripted.say = lambda prompt: "</think>" + ("Done." if "<tool_result>" in prompt else block(*calls))

    def of(name: str) -> dict[str, Any]:
        return {"type": "object", "properties": {name: {"type": "string"}}, "required": [name]}

    send = {**WEATHER, "name": "send", "parameters": of("to")}
    lark = {"type": "grammar", "syntax": "lark", "definition": PATCH}
    fields: dict[str, Any] = {
        "instructions": "You are Codex.",
        "tools": [
            {**WEATHER, "name": "exec", "parameters": of("cmd")},
            {"type": "namespace", "name": "mail", "description": "Mail.", "tools": [send]},
            {"type": "custom", "name": "apply_patch", "description": "Edits files.", "format": lark},
            {"type": "web_search", "external_web_access": True},
            {"type": "tool_search", "execution": "client", "description": "Find.", "parameters": {"type": "object"}},
            {"type": "local_shell"},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "thread",
        "text": {"verbosity": "low"},
        "extra_body": {"client_metadata": {"x": "y"}},
    }
    history: list[Any] = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "rules"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "go"}]},
    ]
    _, first = streamed(client, input=history, **fields)
    by_type = {item.type: item for item in first.output}
    assert by_type["custom_tool_call"].input == patch
    functions = [(item.name, getattr(item, "namespace", None)) for item in first.output if item.type == "function_call"]
    assert functions == [("exec", None), ("send", "mail")]
    expected = [*scripted.prompts[-1], *scripted.answers[-1], 1]
    results = [
        {"type": item.type + "_output", "call_id": item.call_id, "output": "ok"}
        for item in first.output
        if "call" in item.type
    ]
    second = client.responses.create(
        model="scripted", input=[*history, *[item.to_dict() for item in first.output], *results], **fields
    )
    assert second.output_text == "Done."
    assert scripted.prompts[-1][: len(expected)] == expected
    assert "web_search" not in scripted.tokenizer.decode(scripted.prompts[-1])


@pytest.mark.parametrize(
    ("fields", "error", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found"),
        ({"input": "x " * 70000}, openai.BadRequestError, "context_length_exceeded"),
        ({"truncation": "auto"}, openai.BadRequestError, "unsupported_parameter"),
        ({"tools": [{"type": "file_search", "vector_store_ids": []}]}, openai.BadRequestError, "unsupported_parameter"),
        ({"previous_response_id": "resp_none"}, openai.BadRequestError, "previous_response_not_found"),
    ],
)
def test_errors(client: openai.OpenAI, fields: dict[str, Any], error: type[openai.APIStatusError], code: str) -> None:
    for stream in (False, True):
        with pytest.raises(error) as caught:
            client.responses.create(**{"model": "scripted", "input": "Hi", "stream": stream, **fields})
        assert caught.value.code == code


def test_too_short_for_the_answer(scripted: Any, client: openai.OpenAI) -> None:
    scripted.say = f"</think>Text.{block(('weather', {'city': 'Paris'}))}"
    size = len(scripted.tokenizer.encode(scripted.say, special=True))
    fields: dict[str, Any] = {"model": "scripted", "input": "Hi", "tools": [WEATHER]}
    for cut in (2, size // 2, size - 12):
        found = client.responses.create(**fields, max_output_tokens=cut)
        assert found.status == "incomplete"
        assert found.incomplete_details.reason == "max_output_tokens"
        assert found.output[-1].status == "incomplete"
        assert DSML not in found.output_text
