"""What every task says is right: computed again here, from the request alone."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from embedded.data.arithmetic import column_work
from embedded.data.example import Example
from embedded.data.facts import LINES, SENTENCES, UNKNOWN
from embedded.data.recall import haystack_questions
from embedded.data.render import prompt_of
from embedded.data.tasks import LONG_TASKS, TASKS, make
from server.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]
SEED = (1 << 31) + 17
SENTENCE_END = r"(?<=\.) |(?<=,) (?=\")"
WHOLE = re.compile(r"The \w+ of .* is (.*)\.")


def examples(task: str, count: int = 120) -> Iterator[Example]:
    return (make(task, SEED, index) for index in range(count))


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    match schema["type"]:
        case "object":
            return (
                isinstance(value, dict)
                and set(schema.get("required", ())) <= value.keys() <= schema["properties"].keys()
                and all(fits(item, schema["properties"][key]) for key, item in value.items())
            )
        case "array":
            return isinstance(value, list) and all(fits(item, schema["items"]) for item in value)
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case kind:
            assert kind == "string"
            return isinstance(value, str) and value in schema.get("enum", [value])


def everything(example: Example) -> str:
    """What stands in front of the answer."""
    return "\n".join(str(message["content"]) for message in example.messages)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_answers_have_the_shape_of_their_mode(task: str) -> None:
    modes = set()
    for example in examples(task):
        assert example.task == task
        assert (example.answer.reasoning is not None) == example.thinking
        assert example.answer.reasoning != ""
        assert bool(example.answer.content) != bool(example.answer.calls)
        assert example.answer.content == example.answer.content.strip()
        assert example.messages[-1]["role"] in ("user", "tool")
        assert example.effort is None or example.thinking
        json.dumps(example.body())
        modes.add(example.thinking)
    assert modes == ({True} if task == "arithmetic" else {True, False})


@pytest.mark.parametrize("task", sorted(TASKS))
def test_examples_differ_by_seed_and_index(task: str) -> None:
    bodies = {json.dumps(make(task, seed, index).body()) for seed in (1, 2) for index in range(40)}
    assert len(bodies) > 60


def test_examples_are_the_same_in_every_process() -> None:
    def digest() -> str:
        made = [dataclasses.asdict(make(task, 5, index)) for task in TASKS for index in range(10)]
        return hashlib.sha256(json.dumps(made).encode()).hexdigest()

    code = (
        "import dataclasses, hashlib, json\n"
        "from embedded.data.tasks import TASKS, make\n"
        "made = [dataclasses.asdict(make(task, 5, index)) for task in TASKS for index in range(10)]\n"
        "print(hashlib.sha256(json.dumps(made).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "4242"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == digest()


@pytest.mark.parametrize("task", [task for task in LONG_TASKS if task != "unknown"])
def test_recalled_values_stand_beside_their_keys(task: str) -> None:
    for example in examples(task):
        content = example.answer.content
        whole = WHOLE.fullmatch(content)
        value = whole[1] if whole else content
        text = everything(example)
        question = str(example.messages[-1]["content"]).split("\n")[-1]
        beside = [line for line in re.split(rf"\n|{SENTENCE_END}", text) if value in line and line != question]
        assert beside, content
        if example.thinking:
            key = re.fullmatch(r"I look for (.*): .*\.", str(example.answer.reasoning))
            assert key is not None
            assert key[1] in question
            assert any(key[1].lower() in line.lower() for line in beside)


def states(text: str, key: str) -> bool:
    """Whether a line, a sentence or a member of an object gives the key a value."""
    forms = [*LINES, *SENTENCES, '"{key}": {value}']
    patterns = [re.escape(form).replace(r"\{key\}", re.escape(key)) for form in forms]
    patterns = [p.replace(r"\{attribute\}", r"\w+").replace(r"\{value\}", ".+") for p in patterns]
    return any(re.search(rf"^\s*(?:\d+\. )?{pattern}", text, re.M | re.I) for pattern in patterns)


def test_what_is_unknown_is_not_in_the_text() -> None:
    for example in examples("unknown"):
        assert example.answer.content == UNKNOWN
        if example.thinking:
            key = re.fullmatch(r"I look for (.*): it is not there\.", str(example.answer.reasoning))
            assert key is not None
            last = str(example.messages[-1]["content"]).split("\n")[-1]
            assert key[1] in last
            text = everything(example).removesuffix(last)
            assert not states(re.sub(SENTENCE_END, "\n", text), key[1])


def test_what_is_known_is_in_the_text() -> None:
    for example in examples("recall_list"):
        if example.thinking:
            key = re.fullmatch(r"I look for (.*?): .*", str(example.answer.reasoning))
            assert key is not None
            assert states(re.sub(SENTENCE_END, "\n", everything(example)).replace("{", "\n"), key[1])


def test_sums_are_right_and_so_is_every_step() -> None:
    for example in (*examples("arithmetic", 300), *examples("arithmetic_direct", 100)):
        work = example.answer.reasoning if example.thinking else example.answer.content
        for chain, result in re.findall(r"(\d+(?: [+-] \d+)+) = (-?\d+)", str(work)):
            terms = re.findall(r"([+-]?) ?(\d+)", chain)
            assert int(result) == sum(-int(term) if sign == "-" else int(term) for sign, term in terms)
        asked = re.findall(r"(\d+) ?(\+|-|plus|minus|and|less) ?(\d+)", str(example.messages[-1]["content"]))
        if len(asked) == 1 and example.details.get("operands", 2) == 2:
            left, sign, right = asked[0]
            result = int(left) + int(right) if sign in ("+", "plus", "and") else int(left) - int(right)
            assert re.findall(r"-?\d+", example.answer.content)[-1] == str(result)


@pytest.mark.parametrize(("first", "sign", "second"), [(0, "+", 0), (999, "+", 999), (5, "-", 500), (100, "-", 1)])
def test_column_work_ends_with_its_equation(first: int, sign: str, second: int) -> None:
    result = first + second if sign == "+" else first - second
    assert column_work(first, sign, second).endswith(f"\nSo {first} {sign} {second} = {result}.")


@pytest.mark.parametrize("task", ["tool_call", "tool_calls"])
def test_calls_fit_their_definitions_and_the_request(task: str) -> None:
    opaque = 0
    for example in examples(task):
        functions = {tool["function"]["name"]: tool["function"] for tool in example.tools}
        assert len(functions) == len(example.tools)
        assert len(example.answer.calls) == (1 if task == "tool_call" else 2)
        assert example.answer.calls[0] not in example.answer.calls[1:]
        for call in example.answer.calls:
            function = functions[call.name]
            assert fits(dict(call.arguments), function["parameters"])
            order = list(function["parameters"]["properties"])
            assert list(call.arguments) == [name for name in order if name in call.arguments]
            for value in call.arguments.values():
                if isinstance(value, (str, int, float)) and not isinstance(value, bool):
                    assert str(value) in example.messages[-1]["content"]
            opaque += bool(re.search(r"\d", call.name))
    assert opaque, "no tool can be told by its description only"


@pytest.mark.parametrize("task", ["tool_result", "tool_results"])
def test_results_answer_the_calls_of_the_history(task: str) -> None:
    for example in examples(task):
        called = [call["id"] for message in example.messages for call in message.get("tool_calls", ())]
        assert called == [message["tool_call_id"] for message in example.messages if message["role"] == "tool"]
        results = "\n".join(message["content"] for message in example.messages if message["role"] == "tool")
        for value in re.findall(r"(?:The \w+ is|failed:) (.*?)\.(?= The|$)", example.answer.content):
            assert value in results


def test_json_is_valid_and_fits_its_schema() -> None:
    kinds = set()
    for example in examples("json"):
        value = json.loads(example.answer.content)
        assert json.dumps(value, ensure_ascii=False) == example.answer.content
        kinds.add(example.details["format"])
        if example.details["format"] == "json_schema":
            assert example.response_format is not None
            schema = example.response_format["json_schema"]["schema"]
            assert fits(value, schema)
            assert list(value) == list(schema["properties"])
        else:
            assert all(key in example.messages[-1]["content"] for key in value)
    assert kinds == {"json_schema", "json_object", "none"}


@pytest.mark.parametrize("task", LONG_TASKS)
@pytest.mark.parametrize(("num_tokens", "count", "mean", "most"), [(1024, 16, 0.03, 0.08), (8192, 4, 0.03, 0.03)])
def test_lengths_are_what_was_asked_for(
    tokenizer: Tokenizer, task: str, num_tokens: int, count: int, mean: float, most: float
) -> None:
    errors = []
    for index in range(count):
        example = make(task, SEED, index, num_tokens=num_tokens)
        assert example.details["tokens"] == num_tokens
        prompt = prompt_of(tokenizer, dataclasses.replace(example, thinking=False, effort=None))
        errors.append(len(prompt.token_ids) / num_tokens - 1)
    assert abs(sum(errors) / count) < mean
    assert max(map(abs, errors)) < most


def test_the_longest_haystack_is_made(tokenizer: Tokenizer) -> None:
    example = dataclasses.replace(make("recall_haystack", SEED, 0, num_tokens=131072), thinking=False, effort=None)
    assert abs(len(prompt_of(tokenizer, example).token_ids) / 131072 - 1) < 0.03
    with pytest.raises(ValueError, match="num_tokens must be from 96 to 131072; found 131073"):
        make("recall_haystack", SEED, 0, num_tokens=131073)


def test_questions_share_their_haystack() -> None:
    asked = haystack_questions(SEED, 3, num_tokens=2048, num_questions=8)
    assert [example.details["depth"] for example in asked] == [n / 7 for n in range(8)]
    texts = [everything(example) for example in asked]
    same = next(n for n, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1)
    assert same > 0.97 * len(texts[0])
    assert len({example.answer.content for example in asked}) > 4
    for example in asked:
        value = example.answer.content.removesuffix(".").split(" is ")[-1]
        depth = texts[0].index(value) / len(texts[0])
        assert abs(depth - example.details["depth"]) < 0.1
