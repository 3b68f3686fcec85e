"""The same answers whatever the engine does: token ids of the recall rows, and of a sample of the others, again under
other circumstances.

    warm        every prompt is cached, to its last token but one
    alone       one request at a time                batch16    sixteen at once
    chunk128    prompts computed in steps of 128     chunk2048  of 2,048 tokens
    hibernated  few pages, and answers that outgrow them: requests are set aside in their middle and come back

Sums taken in another order may differ in their last bits. An answer may therefore part from its twin where the two
likeliest tokens are as good as equal: their log probabilities within `epsilon`. Such answers count as identical and
are told apart in the table.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from embedded.evaluation.client import Client, ClientError, Reply, at_once
from embedded.evaluation.launched import launched
from embedded.evaluation.pressure import GROUP, LONG_TOKENS, groups, pressed, small_cache_flags
from embedded.evaluation.results import Results, RowResult, kept
from embedded.evaluation.rows import Row
from embedded.evaluation.scoring import answers

EPSILON = 1e-3
"""Nats. Fast float32 operations agree within 1e-5 of the largest logit, and logits are below some 30."""
BFLOAT16_EPSILON = 0.05
"""The same where the model computes in bfloat16, a GPU's default: its logits have some three digits."""
SAMPLE = 20
"""Questions of each row whose questions do not share texts, which would take too long to read again."""


@dataclass(frozen=True, slots=True)
class Circumstance:
    name: str
    num_threads: int = 8
    flags: tuple[str, ...] | None = None
    """Of a server of its own; None: the one that gave the first answers."""
    hibernates: bool = False


CIRCUMSTANCES = (
    Circumstance("warm"),
    Circumstance("alone", num_threads=1),
    Circumstance("batch16", num_threads=16),
    Circumstance("chunk128", flags=("--max-num-batched-tokens", "128", "--max-num-seqs", "16")),
    Circumstance("chunk2048", flags=("--max-num-batched-tokens", "2048")),
    Circumstance("hibernated", flags=(), hibernates=True),
)
CIRCUMSTANCES_BY_NAME = {circumstance.name: circumstance for circumstance in CIRCUMSTANCES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Identities:
    """Compares with the answers of `client`, whose rows stand in `results`."""

    client: Client
    model_dir: Path | None
    """To start other servers from; None: only circumstances that need none."""
    results: Results
    show: Callable[[RowResult], None]
    epsilon: float

    def check(self, circumstance: Circumstance, rows: Sequence[Row]) -> None:
        """Ask the questions of `rows`, all scored before, again; add and show a result `row/circumstance` for each.

        Raises ClientError.
        """
        todo = []
        for row in rows:
            if circumstance.hibernates and not row.is_plain:
                continue
            name, count = f"{row.name}/{circumstance.name}", self._num_compared(row)
            finished = self.results.finished(name, count)
            if finished is None:
                todo.append((name, row, count))
            else:
                self.show(finished)
        if not todo:
            return
        with self._server(circumstance) as server:
            for name, row, count in todo:
                result = self._again(name, row, count, circumstance, server)
                self.results.add(result)
                self.show(result)

    def _num_compared(self, row: Row) -> int:
        count = self.results.rows[row.name].num_examples
        return count if row.shares_text else min(count, SAMPLE)

    def _server(self, circumstance: Circumstance) -> AbstractContextManager[Client]:
        # How many pages run short depends on the row: those servers are started for each.
        if circumstance.flags is None or circumstance.hibernates:
            return nullcontext(self.client)
        assert self.model_dir is not None
        return launched(self.model_dir, *circumstance.flags)

    def _again(self, name: str, row: Row, count: int, circumstance: Circumstance, server: Client) -> RowResult:
        began = time.monotonic()
        scored = self.results.rows[row.name]
        examples = row.examples(scored.num_examples)[:count]
        expected, notes = scored.token_ids[:count], ""
        if circumstance.hibernates:
            expected = tuple(ids[:LONG_TOKENS] for ids in expected)
            prompts = [self.client.prompt_ids(example.body()) for example in examples]
            replies, notes = self._hibernated(prompts)
        else:
            replies = answers(server, row, examples, circumstance.num_threads)
            prompts = [reply.prompt_token_ids for reply in replies]
            if circumstance.name == "warm":
                notes = _cached_note(replies, prompts)
        found = [reply.token_ids for reply in replies]
        result = compared(name, self.client, prompts, expected, found, epsilon=self.epsilon)
        return replace(result, seconds=time.monotonic() - began, notes=notes)

    def _hibernated(self, prompts: Sequence[Sequence[int]]) -> tuple[list[Reply], str]:
        """Each answer goes on past its end, for pages must run short while it is being written."""
        assert self.model_dir is not None
        flags = small_cache_flags(self.model_dir, self.client.cache_dtype, prompts)
        with launched(self.model_dir, *flags) as client, pressed(client) as counts:
            replies = [
                reply
                for group in groups(prompts)
                for reply in at_once(lambda p: client.complete(p, LONG_TOKENS, ignore_eos=True), group, GROUP)
            ]
        if not counts.hibernations or not counts.wakes:
            raise ClientError(f"pages did not run short: {counts.hibernations} hibernations, {counts.wakes} wakes")
        return replies, f"{counts.hibernations} hibernations"


def epsilon_of(client: Client) -> float:
    """How near two tokens are as good as equal on this server."""
    return EPSILON if client.cache_dtype == "float32" else BFLOAT16_EPSILON


def first_difference(expected: Sequence[int], found: Sequence[int]) -> int | None:
    """Where two answers part; None when the shorter one begins the other one and nothing of `expected` is missing."""
    for position, token in enumerate(expected):
        if position >= len(found) or found[position] != token:
            return position
    return None


def compared(
    name: str,
    client: Client,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    found: Sequence[Sequence[int]],
    *,
    epsilon: float,
) -> RowResult:
    """Every answer in `found` begins with its expected one, or parts from it at a near tie."""
    num_identical, num_near_ties, differences = 0, 0, []
    for number, (prompt, one, other) in enumerate(zip(prompts, expected, found, strict=True)):
        at = first_difference(one, other)
        if at is None:
            num_identical += 1
            continue
        margin = client.margin([*prompt, *one[:at]])
        if margin < epsilon:
            num_near_ties += 1
            continue
        there = other[at] if at < len(other) else "the end"
        differences.append(
            f"question {number}, token {at}: expected {one[at]}, found {there}; margin {margin:.4f} nats"
        )
    return RowResult(
        name=name,
        num_examples=len(prompts),
        num_right=num_identical + num_near_ties,
        target=1.0,
        seconds=0.0,
        num_near_ties=num_near_ties,
        differences=kept(differences),
    )


def _cached_note(replies: Sequence[Reply], prompts: Sequence[Sequence[int]]) -> str:
    share = sum(reply.cached_tokens for reply in replies) / max(1, sum(map(len, prompts)))
    return f"{share:.1%} cached"
