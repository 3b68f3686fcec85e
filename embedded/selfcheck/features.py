"""The suite of prompts through the engine, with every feature on and off: the answers must not change.

A server with the flags that one gets gives the first answers, one request at a time. The others are compared with them
token by token. Where sums may be taken in another order, an answer may part from its twin only where the two likeliest
tokens are as good as equal; under a grammar the likeliest tokens are not known, and nothing may differ.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from embedded.evaluation.client import Client, Reply, at_once
from embedded.evaluation.identities import EPSILON, first_difference
from embedded.evaluation.judge import difference, has_type, same_json
from embedded.evaluation.launched import launched
from embedded.evaluation.pressure import GROUP, pressed, small_cache_flags
from embedded.selfcheck.prompts import SuitePrompt, answer_of
from embedded.selfcheck.report import Check

BATCH = 16
_SECONDS_BETWEEN = 0.05
_PRESSED_PROMPT, _PRESSED_TOKENS = 226, 70
"""Lengths: answers grow past the first page of 256 tokens."""
_GRAMMAR_TOKENS = 200
_VERDICT = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}, "grade": {"enum": ["low", "high"]}},
    "required": ["sure", "grade"],
    "additionalProperties": False,
}
_ANYTHING = r"(?s:.*)"

OWN_SERVERS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("steps of 128 tokens", 1, ("--max-num-batched-tokens", "128", "--max-num-seqs", "16")),
    ("steps of 2,048 tokens", 1, ("--max-num-batched-tokens", "2048")),
    ("without a prefix cache", 1, ("--no-enable-prefix-cache",)),
    ("without host memory (slots are replayed)", 2, ("--host-cache-bytes", "0")),
)
"""Name, how often the suite is asked, and flags."""


class FeatureChecks:
    """All checks of one model. The first one that is run asks for the answers that the others compare with."""

    def __init__(
        self,
        connect: Callable[[], Client],
        suite: Sequence[SuitePrompt],
        model_dir: Path | None,
        *,
        epsilon: float = EPSILON,
    ) -> None:
        """`connect` gives the server of the first answers, started when first asked; `model_dir` starts others."""
        self._connect = connect
        self._suite = suite
        self._model_dir = model_dir
        self._epsilon = epsilon
        self._answers: list[Reply] | None = None

    def checks(self) -> Iterator[Check]:
        yield Check("answers, one request at a time", self._first)
        if any(prompt.expected is not None for prompt in self._suite):
            yield Check("the answers are right", self._right)
            yield Check("a grammar that allows everything", self._free_grammar)
        yield Check("again, from the prefix cache", self._cached)
        yield Check("streamed", self._streamed)
        yield Check(f"{BATCH} at once", partial(self._at_once, 0.0))
        yield Check("arriving while others run", partial(self._at_once, _SECONDS_BETWEEN))
        yield Check("three choices", self._choices)
        yield Check("log probabilities", self._logprobs)
        yield Check("a grammar: JSON by a schema", self._schema)
        yield Check("a grammar: a call is forced", self._forced_call)
        if self._model_dir is None:
            return
        for name, rounds, flags in OWN_SERVERS:
            yield Check(name, partial(self._other_server, flags, rounds))
        yield Check("deterministic, alone and together", self._deterministic)
        yield Check("hibernated and woken", self._hibernated)

    @property
    def answers(self) -> list[Reply]:
        """The first answers."""
        if self._answers is None:
            raise RuntimeError("there are no first answers to compare with")
        return self._answers

    def _first(self) -> str | None:
        client = self._connect()
        answers = [client.chat(prompt.body) for prompt in self._suite]
        empty = [p.name for p, answer in zip(self._suite, answers, strict=True) if not answer.token_ids]
        if empty:
            return f"{empty[0]}: no tokens"
        self._answers = answers
        return None

    def _right(self) -> str | None:
        for prompt, reply in zip(self._suite, self.answers, strict=True):
            if prompt.expected is not None and not same_json(prompt.expected, answer_of(reply)):
                return f"{prompt.name}: {difference(dict(prompt.expected), answer_of(reply))}"
        return None

    def _free_grammar(self) -> str | None:
        """Only where answers mean something: others may hold bytes that are no text, which no grammar allows."""
        client = self._connect()
        for number, prompt in enumerate(self._suite):
            if prompt.is_plain:
                reply = client.chat({**prompt.body, "guided_regex": _ANYTHING})
                found = self._compare_one(number, reply)
                if found is not None:
                    return found
        return None

    def _cached(self) -> str | None:
        client = self._connect()
        replies = [client.chat(prompt.body) for prompt in self._suite]
        cached, total = sum(r.cached_tokens for r in replies), sum(len(r.prompt_token_ids) for r in replies)
        # Of short prompts as much is computed again as is cheaper than to fetch. A running server may have no cache.
        if self._model_dir is not None and 2 * cached < total:
            return f"cached tokens: expected most of {total}, found {cached}"
        return self._compare(replies)

    def _streamed(self) -> str | None:
        client = self._connect()
        for prompt, whole in zip(self._suite, self.answers, strict=True):
            reply = client.streamed(prompt.body)
            for part in ("token_ids", "content", "reasoning", "calls", "finish_reason"):
                if getattr(reply, part) != getattr(whole, part):
                    return f"{prompt.name}, {part}: {difference(getattr(whole, part), getattr(reply, part))}"
        return None

    def _at_once(self, seconds_between: float) -> str | None:
        client = self._connect()
        numbers = [n % len(self._suite) for n in range(BATCH)]
        replies = at_once(lambda n: client.chat(self._suite[n].body), numbers, BATCH, seconds_between=seconds_between)
        return self._first_of(self._compare_one(n, reply) for n, reply in zip(numbers, replies, strict=True))

    def _choices(self) -> str | None:
        client = self._connect()
        for number, prompt in enumerate(self._suite[:4]):
            replies = client.choices({**prompt.body, "n": 3})
            if len(replies) != 3:
                return f"{prompt.name}: expected 3 choices, found {len(replies)}"
            found = self._first_of(self._compare_one(number, reply) for reply in replies)
            if found is not None:
                return found
        return None

    def _logprobs(self) -> str | None:
        """Asked for, they change nothing; and a greedy token is the likeliest one."""
        client = self._connect()
        for number, prompt in enumerate(self._suite):
            if not prompt.is_plain:
                continue
            reply = client.chat({**prompt.body, "logprobs": True, "top_logprobs": 2})
            found = self._compare_one(number, reply)
            if found is not None:
                return found
            assert reply.logprobs is not None
            for place, row in enumerate(reply.logprobs.get("content") or ()):
                best = max(top["logprob"] for top in row["top_logprobs"])
                if row["logprob"] < best or row["logprob"] > 0:
                    return f"{prompt.name}, content token {place}: expected {best:.4f}, found {row['logprob']:.4f}"
        return None

    def _schema(self) -> str | None:
        reply = self._connect().chat(
            {
                "messages": [{"role": "user", "content": "Is water wet?"}],
                "thinking": {"type": "disabled"},
                "response_format": {"type": "json_schema", "json_schema": {"name": "verdict", "schema": _VERDICT}},
                "max_tokens": _GRAMMAR_TOKENS,
            }
        )
        return _misfit(reply.content, reply.finish_reason)

    def _forced_call(self) -> str | None:
        tool = {"type": "function", "function": {"name": "judge", "parameters": _VERDICT}}
        reply = self._connect().chat(
            {
                "messages": [{"role": "user", "content": "Is water wet?"}],
                "thinking": {"type": "disabled"},
                "tools": [tool],
                "tool_choice": {"type": "function", "function": {"name": "judge"}},
                "parallel_tool_calls": False,
                "max_tokens": _GRAMMAR_TOKENS,
            }
        )
        if len(reply.calls) != 1 or reply.calls[0][0] != "judge":
            return difference("one call of judge", reply.calls)
        return _misfit(reply.calls[0][1], reply.finish_reason)

    def _other_server(self, flags: tuple[str, ...], rounds: int) -> str | None:
        assert self._model_dir is not None
        with launched(self._model_dir, *flags) as client:
            for _ in range(rounds):
                found = self._compare(at_once(lambda p: client.chat(p.body), self._suite, BATCH))
                if found is not None:
                    return found
        return None

    def _deterministic(self) -> str | None:
        """What is computed together is what is computed alone, near ties or not. Of the shorter half of the suite: the
        fixed order of sums takes its time."""
        assert self._model_dir is not None
        by_length = sorted(range(len(self._suite)), key=lambda n: len(self.answers[n].prompt_token_ids))
        numbers = sorted(by_length[: -(-len(self._suite) // 2)])
        with launched(self._model_dir, "--deterministic", "--no-enable-prefix-cache") as client:
            alone = [client.chat(self._suite[n].body) for n in numbers]
            together = at_once(lambda n: client.chat(self._suite[n].body), numbers, BATCH)
        for number, one, other in zip(numbers, alone, together, strict=True):
            at = first_difference(one.token_ids, other.token_ids)
            if at is not None:
                name = self._suite[number].name
                return f"{name}, together, token {at}: {difference(one.token_ids[at:], other.token_ids[at:])}"
        return self._first_of(self._compare_one(n, reply) for n, reply in zip(numbers, alone, strict=True))

    def _hibernated(self) -> str | None:
        """Requests are set aside in the middle of their answers, packed into host memory, and go on."""
        assert self._model_dir is not None
        client = self._connect()
        longest = max((reply.prompt_token_ids for reply in self.answers), key=len)
        # Longer than the longest one, if need be, and all different from their first token on.
        ids = longest * -(-(_PRESSED_PROMPT + 8 * GROUP) // len(longest))
        prompts = [ids[n : n + _PRESSED_PROMPT + 4 * n] for n in range(GROUP)]

        def complete(server: Client, prompt: Sequence[int]) -> Reply:
            return server.complete(prompt, _PRESSED_TOKENS, ignore_eos=True)

        expected = at_once(partial(complete, client), prompts, GROUP)
        flags = small_cache_flags(self._model_dir, client.cache_dtype, prompts)
        with launched(self._model_dir, *flags) as small, pressed(small) as counts:
            found = at_once(partial(complete, small), prompts, GROUP)
        if not counts.hibernations or not counts.wakes:
            return f"expected hibernations, found {counts.hibernations}, and {counts.wakes} wakes"
        return self._first_of(
            self._parted(f"prompt {n}", True, prompts[n], expected[n], found[n]) for n in range(GROUP)
        )

    def _compare(self, replies: Sequence[Reply]) -> str | None:
        """With the first answers."""
        return self._first_of(self._compare_one(number, reply) for number, reply in enumerate(replies))

    def _compare_one(self, number: int, reply: Reply) -> str | None:
        prompt, expected = self._suite[number], self.answers[number]
        return self._parted(prompt.name, prompt.is_plain, expected.prompt_token_ids, expected, reply)

    def _parted(self, name: str, may_tie: bool, prompt_ids: Sequence[int], expected: Reply, found: Reply) -> str | None:
        at = first_difference(expected.token_ids, found.token_ids)
        if at is None and len(found.token_ids) == len(expected.token_ids):
            return None
        if at is None:
            return f"{name}: expected {len(expected.token_ids)} tokens, found {len(found.token_ids)}"
        there = found.token_ids[at] if at < len(found.token_ids) else "the end"
        told = f"{name}, token {at}: expected {expected.token_ids[at]}, found {there}"
        if not may_tie:
            return told
        margin = self._connect().margin([*prompt_ids, *expected.token_ids[:at]])
        return None if margin < self._epsilon else f"{told}; margin {margin:.4f} nats"

    @staticmethod
    def _first_of(differences: Iterator[str | None]) -> str | None:
        return next((found for found in differences if found is not None), None)


def _misfit(text: str, finish_reason: str) -> str | None:
    """What is wrong with JSON that a grammar has led; an answer that did not end proves nothing."""
    if finish_reason == "length":
        return f"the answer did not end: {text[:80]!r}"
    try:
        value: Any = json.loads(text)
    except ValueError:
        return difference("JSON", text)
    fits = has_type(value, _VERDICT) and value.keys() == _VERDICT["properties"].keys()  # type: ignore[attr-defined]
    return None if fits else difference(_VERDICT, value)
