"""What a simulation serves: texts described by a few numbers, requests made of them, and the hits they could have.

A text is a row of segments. Token i of a segment is a hash of the segment's seed and i, so texts that share leading
segments share leading tokens, and a million tokens take a few bytes until an engine asks for them.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_FIRST_TOKEN = 2
"""Ids below are BOS and EOS in every preset."""


def seed_of(*names: str | int) -> int:
    """A 64-bit segment seed from names; equal names give equal seeds in every process."""
    text = "\0".join(str(name) for name in names)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Text:
    """Segments, each a seed and a length in tokens. Immutable."""

    __slots__ = ("lengths", "num_tokens", "seeds")

    def __init__(self, seeds: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        self.seeds = np.asarray(seeds, dtype=np.uint64)
        """uint64 [segments]"""
        self.lengths = np.asarray(lengths, dtype=np.int64)
        """int64 [segments], each > 0"""
        assert self.seeds.shape == self.lengths.shape and (self.lengths > 0).all()
        self.num_tokens = int(self.lengths.sum())

    def __add__(self, other: "Text") -> "Text":
        return Text(np.concatenate([self.seeds, other.seeds]), np.concatenate([self.lengths, other.lengths]))

    def segments(self) -> Iterable[tuple[int, int]]:
        """(seed, length) pairs."""
        return zip(self.seeds.tolist(), self.lengths.tolist(), strict=True)

    def tokens(self, vocab_size: int) -> np.ndarray:
        """int32 [num_tokens], ids in 2 .. vocab_size - 1."""
        starts = np.cumsum(self.lengths) - self.lengths
        offsets = np.arange(self.num_tokens, dtype=np.uint64)
        offsets -= np.repeat(starts.astype(np.uint64), self.lengths)
        offsets *= _GOLDEN
        offsets += np.repeat(self.seeds, self.lengths)
        offsets ^= offsets >> np.uint64(30)
        offsets *= _MIX_1
        offsets ^= offsets >> np.uint64(27)
        offsets *= _MIX_2
        offsets >>= np.uint64(33)
        offsets %= np.uint64(vocab_size - _FIRST_TOKEN)
        return offsets.astype(np.int32) + np.int32(_FIRST_TOKEN)

    def tokens_after(self, vocab_size: int, known: "tuple[Text, np.ndarray] | None") -> np.ndarray:
        """The same as `tokens`, copying what this text has in common with a `known` text and its tokens."""
        if known is None:
            return self.tokens(vocab_size)
        text, tokens = known
        count = min(len(text.seeds), len(self.seeds))
        same = (text.seeds[:count] == self.seeds[:count]) & (text.lengths[:count] == self.lengths[:count])
        shared = count if same.all() else int(same.argmin())
        if not shared:
            return self.tokens(vocab_size)
        head = tokens[: int(self.lengths[:shared].sum())]
        if shared == len(self.seeds):
            return head
        return np.concatenate([head, Text(self.seeds[shared:], self.lengths[shared:]).tokens(vocab_size)])


@dataclass(frozen=True, slots=True, kw_only=True)
class SimRequest:
    """One request of a trace."""

    request_id: str
    prompt: Text
    answer: Text
    """What it will generate: its tokens are "sampled" one by one."""
    kind: str
    """The class it is reported under."""
    arrival: float = 0.0
    """Seconds after the start; it arrives then or when its predecessors allow, whichever is later."""
    after: tuple[str, ...] = ()
    """Requests that must have ended `delay` seconds before."""
    delay: float = 0.0
    session: str | None = None
    key: str = ""
    """API key: the party that fairness is owed to."""
    priority: int = 0
    cancel_after: float | None = None
    """Seconds after its arrival at which the client goes away."""

    @property
    def conversation(self) -> Text:
        """Prompt and answer: the start of the next turn's prompt."""
        return self.prompt + self.answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests in an order in which predecessors come first."""

    name: str
    requests: tuple[SimRequest, ...]

    def __post_init__(self) -> None:
        known: set[str] = set()
        for request in self.requests:
            assert request.request_id not in known, f"{request.request_id} is in the trace twice"
            assert known.issuperset(request.after), f"{request.request_id} waits for a request that comes later"
            known.add(request.request_id)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(r.prompt.num_tokens for r in self.requests)

    @property
    def num_answer_tokens(self) -> int:
        return sum(r.answer.num_tokens for r in self.requests)


def merge(name: str, *traces: Trace) -> Trace:
    """One trace of all requests; ids are prefixed where two traces use the same."""
    ids = [r.request_id for trace in traces for r in trace.requests]
    if len(set(ids)) == len(ids):
        return Trace(name=name, requests=tuple(r for trace in traces for r in trace.requests))
    merged: list[SimRequest] = []
    for trace in traces:
        merged += [
            replace(
                r, request_id=f"{trace.name}/{r.request_id}", after=tuple(f"{trace.name}/{other}" for other in r.after)
            )
            for r in trace.requests
        ]
    return Trace(name=name, requests=tuple(merged))


class PrefixHistory:
    """Everything an infinite cache would hold, to the token."""

    def __init__(self) -> None:
        self._longest: dict[tuple[int, int], int] = {}
        """(node, seed) to the longest run of that segment seen there."""
        self._nodes: dict[tuple[int, int, int], int] = {}
        """(node, seed, length) to the node behind the whole segment."""

    def match(self, text: Text) -> int:
        """Leading tokens of `text` that were seen before."""
        node, matched = 0, 0
        for seed, length in text.segments():
            following = self._nodes.get((node, seed, length))
            if following is None:
                return matched + min(length, self._longest.get((node, seed), 0))
            node, matched = following, matched + length
        return matched

    def add(self, text: Text) -> None:
        node = 0
        for seed, length in text.segments():
            place = (node, seed)
            self._longest[place] = max(length, self._longest.get(place, 0))
            node = self._nodes.setdefault((node, seed, length), len(self._nodes) + 1)


def reusable_tokens(trace: Trace) -> dict[str, int]:
    """For each request the prompt tokens that an infinite cache would skip: the upper bound of its hits.

    Requests are taken in the order in which they would start if every answer came at once. The last token of a prompt
    always runs, for an answer starts from its logits.
    """
    starts: dict[str, float] = {}
    for request in trace.requests:
        ready = max((starts[other] + request.delay for other in request.after), default=request.arrival)
        starts[request.request_id] = max(request.arrival, ready)
    history = PrefixHistory()
    hits: dict[str, int] = {}
    for request in sorted(trace.requests, key=lambda r: starts[r.request_id]):
        hits[request.request_id] = min(history.match(request.prompt), request.prompt.num_tokens - 1)
        history.add(request.conversation)
    return hits


def hit_rate_bound(trace: Trace) -> float:
    """Share of all prompt tokens that an infinite cache would skip."""
    return sum(reusable_tokens(trace).values()) / max(1, trace.num_prompt_tokens)
