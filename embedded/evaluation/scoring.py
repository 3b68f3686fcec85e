"""Run a row: ask all of its questions, judge the answers, count."""

import time
from collections.abc import Sequence

from embedded.data.example import Example
from embedded.evaluation.client import Client, Reply, at_once
from embedded.evaluation.results import RowResult, kept
from embedded.evaluation.rows import Row

AT_ONCE = 8
_DECILES = 10


def score(client: Client, row: Row, count: int | None = None) -> RowResult:
    """The row's result; raises ClientError."""
    began = time.monotonic()
    examples = row.examples(count)
    replies = answers(client, row, examples, AT_ONCE)
    verdicts = [row.judge(example, reply) for example, reply in zip(examples, replies, strict=True)]
    return RowResult(
        name=row.name,
        num_examples=len(examples),
        num_right=verdicts.count(None),
        target=row.target,
        seconds=time.monotonic() - began,
        deciles=deciles(examples, verdicts) if row.is_recall else (),
        differences=kept(verdict for verdict in verdicts if verdict is not None),
        token_ids=tuple(reply.token_ids for reply in replies),
    )


def answers(client: Client, row: Row, examples: Sequence[Example], num_threads: int) -> list[Reply]:
    """In order; questions on one text find it in the prefix cache."""
    return at_once(lambda example: row.ask(client, row.body(example)), examples, num_threads)


def deciles(examples: Sequence[Example], verdicts: Sequence[str | None]) -> tuple[tuple[int, int], ...]:
    """(right, examples) of each tenth of the depth; () when no example has one."""
    counts = [[0, 0] for _ in range(_DECILES)]
    for example, verdict in zip(examples, verdicts, strict=True):
        depth = example.details.get("depth")
        if depth is None:
            return ()
        tenth = min(_DECILES - 1, int(depth * _DECILES))
        counts[tenth][0] += verdict is None
        counts[tenth][1] += 1
    return tuple((right, count) for right, count in counts)
