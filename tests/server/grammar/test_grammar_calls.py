"""Tool calls: what DeepSeek's own encoder renders is accepted, what the tools do not allow is not, and no prefix is a
dead end."""

import json
import random
from collections.abc import Callable
from typing import Any

import deepseek_recipe
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from server.grammar.messages import GrammarJob, ToolSpec

Compiled = Callable[..., LLMatcher]
Accepts = Callable[[LLMatcher, str], bool]
OPEN, CLOSE = "<｜DSML｜tool_calls>\n", "</｜DSML｜tool_calls>"
Calls = list[tuple[str, dict[str, Any]]]


def rendered(calls: Calls, content: str = "") -> str:
    """What the model would have to say, from DeepSeek's own encoder."""
    tool_calls = [
        {"id": f"c{n}", "type": "function", "function": {"name": name, "arguments": json.dumps(args)}}
        for n, (name, args) in enumerate(calls)
    ]
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": content, "tool_calls": tool_calls},
        *({"role": "tool", "tool_call_id": f"c{n}", "content": "y"} for n in range(len(calls))),
    ]
    body = {"model": "DeepSeek-V4-Pro", "messages": messages, "thinking": {"type": "disabled"}}
    request = deepseek_recipe.ChatCompletionRequest(body).convert(deepseek_recipe.ConversionOptions())
    prompt = deepseek_recipe.DeepseekV4Encoding().render_conversation(request.conversation).prompt
    begin = prompt.index("</think>") + len("</think>")
    return prompt[begin : prompt.index(CLOSE, begin) + len(CLOSE)]


def tool(name: str, properties: dict[str, Any], required: list[str] | None = None, **more: Any) -> ToolSpec:
    schema = {"type": "object", "properties": properties, "required": required or [], **more}
    return ToolSpec(name=name, parameters=schema)


WEATHER = tool(
    "get_weather",
    {
        "city": {"type": "string", "minLength": 1, "maxLength": 20},
        "unit": {"type": "string", "enum": ["c", "f"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "note": {"type": ["string", "null"]},
        "place": {"$ref": "#/$defs/place"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        "when": {"anyOf": [{"type": "string", "format": "date"}, {"type": "boolean"}]},
        "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]+$"},
    },
    ["city", "days"],
    **{"$defs": {"place": {"type": "object", "properties": {"in": {"$ref": "#/$defs/place"}}, "required": []}}},
)
NO_ARGUMENTS = tool("now", {})
ANYTHING = ToolSpec(name="log", parameters={"type": "object"})
TOOLS = (WEATHER, NO_ARGUMENTS, ANYTHING)

# The library's JSON strings leave U+007F out; raw text has it.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="｜\x7f"), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(-1e3, 1e3).map(lambda x: round(x, 3)),
    lambda inner: st.lists(inner | TEXT, max_size=3) | st.dictionaries(TEXT, inner | TEXT, max_size=3),
    max_leaves=6,
)
PLACE = st.recursive(st.just({}), lambda inner: st.fixed_dictionaries({"in": inner}), max_leaves=3)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "city": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="｜"), min_size=1, max_size=20),
    "unit": st.sampled_from(["c", "f"]),
    "days": st.integers(1, 9),
    "note": TEXT | st.none(),
    "place": PLACE,
    "tags": st.lists(TEXT, max_size=3),
    "when": st.booleans() | st.dates().map(str),
    "code": st.from_regex(r"\A[A-Z]{2}[0-9]{1,4}\Z"),
}
WRONG: dict[str, list[Any]] = {
    "city": ["", "x" * 21, 5, None, ["a"]],
    "unit": ["k", "", "C", 1],
    "days": [0, 10, 1.5, "3", True, None],
    "note": [0, True, []],
    "place": ["here", {"in": 1}, []],
    "tags": ["a", [1], ["a", "b", "c", "d"]],
    "when": ["2024-02-30", "tomorrow", 1],
    "code": ["A1", "AB", "ab1", "xAB1"],
}
KEYS = st.lists(st.sampled_from([k for k in VALUES if k not in ("city", "days")]), unique=True).flatmap(
    lambda keys: st.permutations([*keys, "city", "days"])
)


@st.composite
def weather(draw: st.DrawFn) -> dict[str, Any]:
    return {key: draw(VALUES[key]) for key in draw(KEYS)}


LOGGED = st.dictionaries(st.from_regex(r"\A[a-z_]{1,8}\Z"), TEXT | JSON, max_size=4)
CALL = weather().map(lambda args: ("get_weather", args)) | st.just(("now", {})) | LOGGED.map(lambda args: ("log", args))
FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FAST
@given(st.lists(CALL, min_size=1, max_size=3), TEXT.map(lambda text: text.rstrip("\n")))
def test_what_a_prompt_renders_is_accepted(
    compiled: Compiled, accepts: Accepts, marker: int, calls: Calls, content: str
) -> None:
    auto = compiled(tools=TOOLS, calls="auto", marker=marker)
    assert accepts(auto, rendered(calls, content))
    answer = rendered(calls)
    assert accepts(compiled(tools=TOOLS, calls="required", marker=marker), answer)
    opened = answer.removeprefix("\n\n" + OPEN)
    assert accepts(compiled(tools=TOOLS, calls="opened", marker=marker), opened)
    single = compiled(tools=TOOLS, calls="required", parallel=False, marker=marker)
    assert accepts(single, answer) == (len(calls) == 1)


@FAST
@given(weather(), st.data())
def test_what_the_tools_do_not_allow_is_refused(
    compiled: Compiled, accepts: Accepts, marker: int, args: dict[str, Any], data: st.DataObject
) -> None:
    matcher = compiled(tools=TOOLS, calls="required", marker=marker)
    good = rendered([("get_weather", args)])
    assert accepts(matcher, good)
    key = data.draw(st.sampled_from(sorted(args)))
    assert not accepts(matcher, rendered([("get_weather", {**args, key: data.draw(st.sampled_from(WRONG[key]))})]))
    missing = data.draw(st.sampled_from(["city", "days"]))
    assert not accepts(matcher, rendered([("get_weather", {k: v for k, v in args.items() if k != missing})]))
    assert not accepts(matcher, rendered([("get_weather", {**args, "more": 1})]))
    assert not accepts(matcher, rendered([("get_wether", args)]))
    assert not accepts(matcher, rendered([("now", args)]))
    for broken in (
        good.replace('">\n', '">', 1),
        good.replace("</｜DSML｜invoke>\n", "</｜DSML｜invoke>", 1),
        good.removeprefix("\n"),
        good + "\n",
        good.replace("<｜DSML｜parameter", "<parameter", 1),
        good.replace('string="', 'string= "', 1),
    ):
        assert not accepts(matcher, broken), broken


@pytest.mark.parametrize("text", ["", "Sure.", "a <b> c", "a\n\n", "<", "a\n\n<x>", "\n\n", "ein ｜ DSML"])
def test_text_without_a_call_is_free(compiled: Compiled, accepts: Accepts, marker: int, text: str) -> None:
    assert accepts(compiled(tools=TOOLS, calls="auto", marker=marker), text)
    assert not accepts(compiled(tools=TOOLS, calls="required", marker=marker), text)


def test_content_keeps_its_distance_as_a_prompt_has_it(compiled: Compiled, accepts: Accepts, marker: int) -> None:
    auto = compiled(tools=TOOLS, calls="auto", marker=marker)
    block = rendered([("now", {})]).removeprefix("\n\n")
    assert accepts(auto, f"Sure.\n\n{block}") and accepts(auto, f"\n\n{block}")
    for distance in ("", "\n", "\n\n\n", "\n\n "):
        assert not accepts(auto, f"Sure.{distance}{block}")
    assert not accepts(auto, f"Sure.\n\n{block}more")


def walk(matcher: LLMatcher, draw: random.Random, most: int) -> bool:
    """Random allowed tokens; True when the answer ended. A prefix without a next token fails."""
    copy = matcher.deep_copy()
    for _ in range(most):
        bits = np.frombuffer(copy.compute_bitmask(), dtype=np.uint8)
        assert not copy.is_error(), copy.get_error()
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        assert len(allowed), "a dead end"
        # Closing brackets and markers come often, so that walks get somewhere.
        ends = [t for t in allowed.tolist() if t in (1, 3 + ord("<"), 3 + ord("/"), 3 + ord('"')) or t > 258]
        token = draw.choice(ends) if ends and draw.random() < 0.4 else int(draw.choice(allowed.tolist()))
        assert copy.consume_token(token), copy.get_error()
        if token == 1:
            return True
    return False


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["auto", "required", "opened"]))
def test_no_prefix_is_a_dead_end(compiled: Compiled, marker: int, seed: int, calls: str) -> None:
    walk(compiled(tools=TOOLS, calls=calls, marker=marker), random.Random(seed), 400)


def test_many_parameters_have_the_order_of_the_schema(compiled: Compiled, accepts: Accepts, marker: int) -> None:
    names = [f"p{n:02}" for n in range(70)]
    wide = tool("wide", {name: {"type": "integer"} for name in names}, [names[3], names[60]])
    matcher = compiled(tools=(wide,), calls="required", marker=marker)
    assert accepts(matcher, rendered([("wide", dict.fromkeys(names, 1))]))
    assert accepts(matcher, rendered([("wide", {names[3]: 1, names[60]: 2})]))
    assert not accepts(matcher, rendered([("wide", {names[60]: 2, names[3]: 1})]))
    assert not accepts(matcher, rendered([("wide", {names[3]: 1})]))


def test_sixty_parameters_come_in_any_order(compiled: Compiled, accepts: Accepts, marker: int) -> None:
    names = [f"p{n:02}" for n in range(60)]
    matcher = compiled(
        tools=(tool("f", {n: {"type": "integer"} for n in names}, names[:50]),), calls="required", marker=marker
    )
    shuffled = random.Random(3).sample(names, 60)
    assert accepts(matcher, rendered([("f", dict.fromkeys(shuffled, 1))]))
    assert not accepts(matcher, rendered([("f", {name: 1 for name in shuffled if name != names[49]})]))


PATCH = """start: begin hunk+ end
begin: "*** Begin" LF
end: "*** End"
hunk: "@@ " /(.+)/ LF change+
change: ("+" | "-" | " ") /(.*)/ LF -> line
%import common.LF"""
ONE_TEXT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


def patching(grammar: str) -> ToolSpec:
    """A tool of one text that follows a client's grammar."""
    return ToolSpec(name="patch", parameters=ONE_TEXT, grammar=grammar)


@pytest.mark.parametrize("calls", ["auto", "required"])
def test_the_text_of_a_tool_follows_its_grammar(compiled: Compiled, accepts: Accepts, marker: int, calls: str) -> None:
    spec = patching(PATCH)
    matcher = compiled(tools=(spec, *TOOLS), calls=calls, marker=marker)
    good = "*** Begin\n@@ a.py </\n+x < y\n-</x>\n*** End"
    assert accepts(matcher, rendered([("patch", {"input": good})]))
    assert accepts(matcher, rendered([("patch", {"input": good}), ("now", {}), ("patch", {"input": good})]))
    for bad in ("", "x", good + "\n", good.replace("+x", "*x"), good.removesuffix("*** End")):
        assert not accepts(matcher, rendered([("patch", {"input": bad})])), bad
    assert not accepts(matcher, rendered([("patch", {})]))


def test_a_client_s_rules_do_not_meet_ours(compiled: Compiled, accepts: Accepts, marker: int) -> None:
    """Rules of the same names, in two tools with different grammars."""
    one, other = patching('start: calls\ncalls: "a" tool0\ntool0: "b"'), patching('start: calls\ncalls: "c"')
    other = ToolSpec(name="other", parameters=ONE_TEXT, grammar=other.grammar)
    matcher = compiled(tools=(one, other), calls="required", marker=marker)
    assert accepts(matcher, rendered([("patch", {"input": "ab"}), ("other", {"input": "c"})]))
    assert not accepts(matcher, rendered([("patch", {"input": "c"})]))
    assert not accepts(matcher, rendered([("other", {"input": "ab"})]))


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        ("banana", "neither Lark"),
        ('start: "a" <[5]>', "cannot name tokens"),
        ('start: "a"\n}\nextra: <[5]>\nx: %lark {\nstart: "b"', "cannot name"),
        ("start: @content", "cannot name"),
        ('start: %json {"type": "string"}', "cannot name"),
        ("%import other.X\nstart: X", "cannot name"),
        ("start: /(?=a)b/", "look-around"),
        ("start: missing", "missing"),
    ],
)
def test_a_tool_s_grammar_that_cannot_be_kept_is_refused(
    refused: Callable[..., str], marker: int, grammar: str, why: str
) -> None:
    message = refused(tools=(patching(grammar),), calls="auto", marker=marker, format_param="")
    assert "function `patch`" in message and why in message, message


STRICT_SCHEMA = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/pair"}, "b": {"type": "string"}},
    "$defs": {"pair": {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}}},
}


def test_a_strict_tool_is_closed_and_wants_everything(compiled: Compiled, accepts: Accepts, marker: int) -> None:
    strict = ToolSpec(name="f", parameters=STRICT_SCHEMA, strict=True)
    matcher = compiled(tools=(strict,), calls="required", marker=marker)
    assert accepts(matcher, rendered([("f", {"a": {"x": 1, "y": 2}, "b": "z"})]))
    for args in ({"a": {"x": 1, "y": 2}}, {"a": {"x": 1}, "b": "z"}, {"a": {"x": 1, "y": 2, "z": 3}, "b": "z"}):
        assert not accepts(matcher, rendered([("f", args)]))
    loose = compiled(tools=(ToolSpec(name="f", parameters=STRICT_SCHEMA),), calls="required", marker=marker)
    assert accepts(loose, rendered([("f", {"a": {"x": 1, "more": 3}})]))


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"type": "object", "properties": {"a": {"not": {}}}}, "`not` at #/properties/a"),
        ({"type": "object", "properties": {"a": {"type": "string", "format": "regex"}}}, "`format` at #/properties/a"),
        ({"type": "object", "properties": {"a": {"$ref": "http://x"}}}, "`$ref`"),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)"}}}, "look-around"),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": True}, "`additionalProperties`"),
        ({"type": "object", "properties": {"a": {}, "b": {}}, "required": ["a"]}, "`required`"),
        ({"type": "object", "anyOf": [{"required": ["a"]}]}, "`anyOf`"),
        ({"type": "object", "properties": {"a": {"enum": []}}}, "cannot have any value"),
        ({"type": "object", "properties": {"a": False}}, "cannot have any value"),
        ({"type": "array"}, "type object"),
        ({"type": "object", "properties": {"a": {"type": "banana"}}}, "`type` at #/properties/a"),
    ],
)
def test_a_strict_tool_that_cannot_be_kept_is_refused_by_keyword(
    refused: Callable[..., str], marker: int, parameters: Any, named: str
) -> None:
    spec = ToolSpec(name="f", parameters=parameters, strict=True)
    message = refused(tools=(spec,), calls="auto", marker=marker, format_param="")
    assert message.startswith("tools: function `f`: ") and named in message


def test_a_tool_that_is_not_strict_keeps_what_can_be_kept(
    compiled: Compiled, checker: Any, accepts: Accepts, marker: int
) -> None:
    loose = tool(
        "f",
        {
            "ids": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
            "where": {"type": "string", "format": "uri-reference", "maxLength": 5},
            "odd": {"type": "string", "pattern": "(?=x)y"},
            "either": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        },
        ["ids"],
        **{"not": {"required": ["zzz"]}},
    )
    matcher = compiled(tools=(loose,), calls="required", marker=marker)
    assert accepts(matcher, rendered([("f", {"ids": [1, 1], "where": "a/b", "odd": "q", "either": 1})]))
    assert not accepts(matcher, rendered([("f", {"ids": ["1"]})]))
    assert not accepts(matcher, rendered([("f", {"ids": [1], "where": "longer"})]))
    answer = checker.answer(GrammarJob(tools=(loose,), calls="auto", marker=marker))
    left_out = answer.grammar.left_out
    for place in ("#/properties/ids/uniqueItems", "#/properties/where/format", "#/properties/odd", "#/not"):
        assert f"f: {place}" in left_out


def test_a_required_parameter_without_values_is_refused(refused: Callable[..., str], marker: int) -> None:
    spec = tool("f", {"a": {"type": "string", "enum": []}}, ["a"])
    assert "#/properties/a" in refused(tools=(spec,), calls="auto", marker=marker, format_param="")
