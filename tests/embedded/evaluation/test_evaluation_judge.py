"""Exact judgement: what counts as the same answer, and what does not."""

from typing import Any

import pytest

from embedded.data.example import Answer, Call, Example
from embedded.evaluation.client import Reply
from embedded.evaluation.judge import has_type, judge_answer, judge_json, same_json
from embedded.evaluation.rows import ROWS, ROWS_BY_NAME

CALL = Call(name="find_boat", arguments={"size": 3, "color": "red"})


def example(answer: Answer, **fields: Any) -> Example:
    return Example(task="t", messages=({"role": "user", "content": "?"},), answer=answer, **fields)


def test_content_is_compared_after_strip() -> None:
    asked = example(Answer(content="The code is 12."))
    assert judge_answer(asked, Reply(content=" The code is 12.\n")) is None
    assert judge_answer(asked, Reply(content="The code is 12")) == "expected 'The code is 12.', found 'The code is 12'"
    assert judge_answer(asked, Reply(content="The code is 12.", reasoning="anything")) is None
    assert judge_answer(asked, Reply(content="The code is 12.", calls=(("find_boat", "{}"),))) is not None


@pytest.mark.parametrize(
    ("calls", "right"),
    [
        ([("find_boat", '{"color": "red", "size": 3}')], True),
        ([("find_boat", '{"size": 3.0, "color": "red"}')], True),
        ([("find_boat", '{"size": "3", "color": "red"}')], False),
        ([("find_boat", '{"size": 3}')], False),
        ([("find_boats", '{"size": 3, "color": "red"}')], False),
        ([("find_boat", '{"size": 3, "color": "red"')], False),
        ([("find_boat", '{"size": 3, "color": "red"}')] * 2, False),
        ([], False),
    ],
)
def test_calls_are_compared_as_json(calls: list[tuple[str, str]], right: bool) -> None:
    assert (judge_answer(example(Answer(calls=(CALL,))), Reply(calls=tuple(calls))) is None) == right


def test_parallel_calls_have_an_order() -> None:
    other = Call(name="b", arguments={})
    asked = example(Answer(calls=(CALL, other)))
    texts = (("find_boat", '{"size": 3, "color": "red"}'), ("b", "{}"))
    assert judge_answer(asked, Reply(calls=texts)) is None
    assert judge_answer(asked, Reply(calls=texts[::-1])) is not None


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "parts": {"type": "array", "items": {"type": "integer"}}},
    "required": ["name", "parts"],
}


@pytest.mark.parametrize(
    ("content", "right"),
    [
        ('{"name": "x", "parts": [1, 2]}', True),
        ('{"parts": [], "name": ""}', True),
        ('{"name": "x", "parts": [1, 2.5]}', False),
        ('{"name": "x", "parts": [true]}', False),
        ('{"name": 1, "parts": []}', False),
        ('{"name": "x"}', False),
        ('{"name": "x", "parts": [], "more": 1}', False),
        ('{"name": "x", "parts": []', False),
        ("[]", False),
    ],
)
def test_json_is_judged_by_keys_and_types(content: str, right: bool) -> None:
    asked = example(
        Answer(content='{"name": "boat", "parts": [3]}'),
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
    )
    assert (judge_json(asked, Reply(content=content)) is None) == right


def test_json_without_a_schema_takes_the_types_of_the_answer() -> None:
    asked = example(Answer(content='{"count": 3, "open": true}'))
    assert judge_json(asked, Reply(content='{"count": 4.5, "open": false}')) is None
    assert judge_json(asked, Reply(content='{"count": true, "open": false}')) is not None
    assert judge_json(asked, Reply(content='{"count": 1, "open": 1}')) is not None


def test_values_and_types() -> None:
    assert same_json({"a": [1, {"b": 2.0}]}, {"a": [1.0, {"b": 2}]})
    assert not same_json([1], [True])
    assert not same_json({"a": 1}, {"a": 1, "b": 1})
    assert has_type("low", {"enum": ["low", "high"]}) and not has_type("mid", {"enum": ["low", "high"]})
    assert has_type({"x": 1}, {"type": "object", "required": ["x"]}) and not has_type(
        {}, {"required": ["x"], "type": "object"}
    )


def test_rows_have_the_targets_and_numbers_that_were_promised() -> None:
    targets = {row.name: row.target for row in ROWS if row.target is not None}
    assert targets == {
        "recall_1k": 0.98,
        "recall_8k": 0.95,
        "recall_32k": 0.85,
        "list_1k": 0.98,
        "list_8k": 0.95,
        "tool_call": 0.97,
        "tool_calls": 0.90,
        "tool_result": 0.97,
        "arithmetic": 0.90,
        "json": 0.95,
    }
    assert {row.num_examples for row in ROWS if (row.num_tokens or 0) <= 8192 and row.name != "list_8k"} == {200}
    assert ROWS_BY_NAME["recall_32k"].num_examples == 40 and ROWS_BY_NAME["recall_128k"].num_examples == 10


def test_haystack_questions_share_their_beginning_and_spread_over_the_depth() -> None:
    row = ROWS_BY_NAME["recall_1k"]
    examples = row.examples(20)
    assert [e.details["haystack"] for e in examples] == [0] * 10 + [1] * 10
    assert sorted(min(9, int(e.details["depth"] * 10)) for e in examples[:10]) == list(range(10))
    bodies = {str(e.messages[0]["content"])[:2000] for e in examples}
    assert len(bodies) == 2


def test_arithmetic_row_takes_two_operands_and_thinks() -> None:
    for one in ROWS_BY_NAME["arithmetic"].examples(30):
        assert one.details["operands"] == 2 and one.thinking
