"""The rows of the table: which questions, how many, how an answer is judged, and what share must be right."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from embedded.data.example import Example
from embedded.data.recall import haystack_questions
from embedded.data.seeds import FIRST_EVALUATION_SEED
from embedded.data.tasks import make
from embedded.evaluation.client import Client, Reply
from embedded.evaluation.judge import Judge, judge_answer, judge_json

SEED = FIRST_EVALUATION_SEED + 5
"""Training never sees seeds from FIRST_EVALUATION_SEED on."""
QUESTIONS_PER_TEXT = 10
"""Of a haystack: one for each tenth of its depth. The text is read once, the prefix cache keeps it."""

Ask = Callable[[Client, Mapping[str, Any]], Reply]


def ask(client: Client, body: Mapping[str, Any]) -> Reply:
    """The way of every row but one."""
    return client.chat(body)


def ask_without_grammar(client: Client, body: Mapping[str, Any]) -> Reply:
    """The prompt of this request, schema and all, continued without the grammar that a chat completion would impose."""
    prompt = client.prompt_ids({name: value for name, value in body.items() if name != "max_tokens"})
    reply = client.complete(prompt, int(body["max_tokens"]), skip_special_tokens=True)
    reasoning, closed, content = reply.content.partition("</think>")
    thinks = body["thinking"]["type"] == "enabled"
    return Reply(
        content=content if closed or thinks else reply.content,
        reasoning=reasoning if closed else "",
        token_ids=reply.token_ids,
        prompt_token_ids=prompt,
        cached_tokens=reply.cached_tokens,
        finish_reason=reply.finish_reason,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    name: str
    task: str
    num_examples: int
    target: float | None
    """Least share of right answers; None: told, not judged."""
    num_tokens: int | None = None
    """Length of the text."""
    shares_text: bool = False
    """QUESTIONS_PER_TEXT questions on each text."""
    max_tokens: int = 768
    """Two calls with objects in them take some 250 tokens, and three times as many of a tokenizer without merges."""
    judge: Judge = judge_answer
    ask: Ask = ask
    accepts: Callable[[Example], bool] = lambda example: True

    @property
    def is_recall(self) -> bool:
        return self.task.startswith("recall")

    @property
    def is_plain(self) -> bool:
        """A prompt and an answer in words: no tools, no format, and so no grammar."""
        return self.is_recall or self.task in ("unknown", "arithmetic")

    def examples(self, count: int | None = None) -> list[Example]:
        """The first `count` held-out examples (None: all of the row)."""
        wanted = self.num_examples if count is None else min(count, self.num_examples)
        found: list[Example] = []
        for example in self._candidates():
            if len(found) >= wanted:
                break
            if self.accepts(example):
                found.append(example)
        return found

    def _candidates(self) -> Iterator[Example]:
        index = 0
        while True:
            if self.shares_text:
                assert self.num_tokens is not None
                yield from haystack_questions(SEED, index, num_tokens=self.num_tokens, num_questions=QUESTIONS_PER_TEXT)
            else:
                yield make(self.task, SEED, index, num_tokens=self.num_tokens)
            index += 1

    def body(self, example: Example) -> dict[str, Any]:
        """What is sent for an example."""
        return {**example.body(), "max_tokens": self.max_tokens}


def _recall(name: str, num_tokens: int, num_examples: int, target: float | None) -> Row:
    return Row(
        name=name,
        task="recall_haystack",
        num_examples=num_examples,
        target=target,
        num_tokens=num_tokens,
        shares_text=True,
        max_tokens=128,
    )


def _list(name: str, num_tokens: int, num_examples: int, target: float | None) -> Row:
    return Row(
        name=name,
        task="recall_list",
        num_examples=num_examples,
        target=target,
        num_tokens=num_tokens,
        max_tokens=128,
    )


def _told(task: str, num_tokens: int | None = None) -> Row:
    return Row(name=task, task=task, num_examples=200, target=None, num_tokens=num_tokens)


ROWS = (
    _recall("recall_1k", 1024, 200, 0.98),
    _recall("recall_8k", 8192, 200, 0.95),
    _recall("recall_32k", 32768, 40, 0.85),
    _recall("recall_128k", 131072, 10, None),
    # The same question on a list, where every line looks like the one that is asked for; each list is read once only.
    _list("list_1k", 1024, 200, 0.98),
    _list("list_8k", 8192, 100, 0.95),
    Row(name="tool_call", task="tool_call", num_examples=200, target=0.97),
    Row(name="tool_calls", task="tool_calls", num_examples=200, target=0.90),
    Row(name="tool_result", task="tool_result", num_examples=200, target=0.97),
    Row(
        name="arithmetic",
        task="arithmetic",
        num_examples=200,
        target=0.90,
        accepts=lambda example: example.details.get("operands") == 2,
    ),
    Row(
        name="json",
        task="json",
        num_examples=200,
        target=0.95,
        judge=judge_json,
        ask=ask_without_grammar,
    ),
    _told("unknown", num_tokens=1024),
    _told("repeat"),
    _told("transform"),
    _told("arithmetic_direct"),
    _told("tool_results"),
    _told("tool_none"),
    _told("chat"),
    _told("chat_system"),
    _told("world"),
)
ROWS_BY_NAME = {row.name: row for row in ROWS}
