"""The model's answer, read while it is made: which tokens are reasoning, which are content.

Structure is recognised by token id and never by spelling. `</think>` written with ordinary tokens is text. Without
tools DSML is content, as it stands.

The newline rules are DeepSeek's: newlines that open a part are dropped, and so are those before `</think>`. A client
that sends the parts back then gets the prompt that was sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal, NamedTuple

from server.text.detokenizer import Detokenizer
from server.text.tokenizer import Tokenizer

StartsIn = Literal["reasoning", "content", "calls", "raw"]


class Delta(NamedTuple):
    """What the tokens of one call add to the answer."""

    reasoning: str
    content: str


class State(Enum):
    REASONING_START = auto()
    """Before the first character of the reasoning that is not a newline."""
    REASONING = auto()
    CONTENT_START = auto()
    CONTENT = auto()
    RAW = auto()
    """A completion: every token is content and nothing is structure."""


class Marker(Enum):
    """Tokens that are structure in some states."""

    THINK_END = "</think>"


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a state does with text, and the state after text that was not only dropped newlines."""

    channel: Literal["reasoning", "content"]
    drops_leading_newlines: bool
    holds_newlines: bool
    """Newlines wait for what follows: a marker drops them, text brings them back."""
    then: State


_RULES = {
    State.REASONING_START: _Rule("reasoning", True, True, State.REASONING),
    State.REASONING: _Rule("reasoning", False, True, State.REASONING),
    State.CONTENT_START: _Rule("content", True, False, State.CONTENT),
    State.CONTENT: _Rule("content", False, False, State.CONTENT),
    State.RAW: _Rule("content", False, False, State.RAW),
}

# A pair that is missing here: the marker is text in that state.
_TRANSITIONS = {
    (State.REASONING_START, Marker.THINK_END): State.CONTENT_START,
    (State.REASONING, Marker.THINK_END): State.CONTENT_START,
    (State.CONTENT_START, Marker.THINK_END): State.CONTENT,
    (State.CONTENT, Marker.THINK_END): State.CONTENT,
}

_STARTS = {
    ("reasoning", False): State.REASONING_START,
    ("reasoning", True): State.REASONING,
    ("content", False): State.CONTENT_START,
    ("content", True): State.CONTENT,
    ("calls", False): State.CONTENT,
    ("raw", False): State.RAW,
    ("raw", True): State.RAW,
}


class OutputParser:
    """One answer. However its ids are cut into `push` calls, the deltas join to the same texts."""

    __slots__ = (
        "_content",
        "_detokenizer",
        "_held",
        "_markers",
        "_reasoning",
        "_rule",
        "num_reasoning_tokens",
        "state",
    )

    def __init__(
        self, tokenizer: Tokenizer, *, starts_in: StartsIn, continues: bool = False, skip_special: bool = True
    ) -> None:
        """`continues`: the prompt ends inside the part, so its first newlines are kept."""
        self.state = _STARTS[starts_in, continues]
        self.num_reasoning_tokens = 0
        """Tokens so far that belong to the reasoning; `</think>` does not."""
        self._rule = _RULES[self.state]
        self._markers = {tokenizer.required_id(marker.value): marker for marker in Marker}
        self._detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
        self._held = 0
        self._reasoning: list[str] = []
        self._content: list[str] = []

    @property
    def in_reasoning(self) -> bool:
        return self._rule.channel == "reasoning"

    def is_marker(self, token_id: int) -> bool:
        """Whether the id, coming next, is structure and no text."""
        marker = self._markers.get(token_id)
        return marker is not None and (self.state, marker) in _TRANSITIONS

    def push(self, token_ids: Sequence[int]) -> Delta:
        """Read ids in [0, vocab_size); returns what is certain of their text."""
        start = 0
        for n, token_id in enumerate(token_ids):
            if token_id in self._markers and self.is_marker(token_id):
                self._run(token_ids[start:n])
                self._cross(self._markers[token_id])
                start = n + 1
        self._run(token_ids[start:] if start else token_ids)
        return self._take()

    def finish(self) -> Delta:
        """What was held back, when no token follows."""
        self._text(self._detokenizer.flush())
        self._release()
        return self._take()

    def _run(self, token_ids: Sequence[int]) -> None:
        if self.in_reasoning:
            self.num_reasoning_tokens += len(token_ids)
        self._text(self._detokenizer.push(token_ids))

    def _cross(self, marker: Marker) -> None:
        self._text(self._detokenizer.flush())
        self._held = 0
        self._enter(_TRANSITIONS[self.state, marker])

    def _enter(self, state: State) -> None:
        self.state = state
        self._rule = _RULES[state]

    def _text(self, text: str) -> None:
        if self._rule.drops_leading_newlines:
            text = text.lstrip("\n")
        if not text:
            return
        if self._rule.then is not self.state:
            self._enter(self._rule.then)
        if not self._rule.holds_newlines:
            self._out().append(text)
            return
        kept = text.rstrip("\n")
        if kept:
            self._release()
            self._out().append(kept)
        self._held += len(text) - len(kept)

    def _release(self) -> None:
        if self._held:
            self._out().append("\n" * self._held)
            self._held = 0

    def _out(self) -> list[str]:
        return self._reasoning if self._rule.channel == "reasoning" else self._content

    def _take(self) -> Delta:
        delta = Delta("".join(self._reasoning), "".join(self._content))
        self._reasoning.clear()
        self._content.clear()
        return delta
