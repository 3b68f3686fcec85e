"""The model's answer, read while it is made: which tokens are reasoning, which are content, which are tool calls.

    REASONING ── </think> ──> CONTENT ── <｜DSML｜tag ──> CALLS        the call may also come from inside the reasoning

Structure is recognised by token id and never by spelling: `</think>` and `｜DSML｜` written with ordinary tokens are
text. Without tools DSML is content, as it stands.

The newline rules are DeepSeek's: newlines that open a part are dropped, and so are those before `</think>` and before a
block of calls. A client that sends the parts back then gets the prompt that was sampled.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal, NamedTuple

from server.text.calls import DSML, CallDelta, CallReader, opener_of
from server.text.detokenizer import Detokenizer
from server.text.tokenizer import Tokenizer

StartsIn = Literal["reasoning", "content", "calls", "raw"]

_TAG_NAME = re.compile(r" ?([A-Za-z_]+)")
_MOST_NAME_CHARS = 40
_MOST_BLANKS = 16
_TAGS = ("invoke", "parameter", "tool_calls", "tool_call", "toolcalls", "toolcall", "function_calls", "function_call")
_WORDS = ("calls", "tool")
"""Tags only where the tag ends behind them."""


class Delta(NamedTuple):
    """What the tokens of one call of `push` add to the answer."""

    reasoning: str
    content: str
    calls: tuple[CallDelta, ...] = ()


class State(Enum):
    REASONING_START = auto()
    """Before the first character of the reasoning that is not a newline."""
    REASONING = auto()
    CONTENT_START = auto()
    CONTENT = auto()
    CALLS = auto()
    """Inside or behind a block of tool calls: no content comes any more."""
    RAW = auto()
    """A completion: every token is content and nothing is structure."""


class Marker(Enum):
    """Tokens that are structure in some states."""

    THINK_START = "<think>"
    THINK_END = "</think>"
    DSML = DSML


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a state does with text, and the state after text that was not only dropped newlines."""

    channel: Literal["reasoning", "content", "calls"]
    drops_leading_newlines: bool
    holds_newlines: bool
    """Newlines wait for what follows: a marker drops them, text brings them back. With tools those of the content too.
    """
    then: State


_RULES = {
    State.REASONING_START: _Rule("reasoning", True, True, State.REASONING),
    State.REASONING: _Rule("reasoning", False, True, State.REASONING),
    State.CONTENT_START: _Rule("content", True, False, State.CONTENT),
    State.CONTENT: _Rule("content", False, False, State.CONTENT),
    State.CALLS: _Rule("calls", False, False, State.CALLS),
    State.RAW: _Rule("content", False, False, State.RAW),
}

# A pair that is missing here: the marker is text in that state. DSML has rules of its own.
_TRANSITIONS = {
    (State.REASONING_START, Marker.THINK_START): State.REASONING_START,
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
    ("calls", False): State.CALLS,
    ("raw", False): State.RAW,
    ("raw", True): State.RAW,
}


class OutputParser:
    """One answer. However its ids are cut into `push` calls, the deltas join to the same texts."""

    __slots__ = (
        "_calls",
        "_content",
        "_detokenizer",
        "_held",
        "_markers",
        "_opener",
        "_reasoning",
        "_rule",
        "_tag",
        "_tools",
        "num_reasoning_tokens",
        "state",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        starts_in: StartsIn,
        continues: bool = False,
        tools: bool = False,
        streams_json: bool = False,
        skip_special: bool = True,
    ) -> None:
        """`continues`: the prompt ends inside the part, so its first newlines are kept. `tools`: look for calls;
        `streams_json`: their values with string="false" are known to be JSON.
        """
        self.state = _STARTS[starts_in, continues]
        self.num_reasoning_tokens = 0
        """Tokens so far that belong to the reasoning; `</think>` does not."""
        self._tools = tools and starts_in != "raw"
        self._calls = CallReader(streams_json=streams_json)
        self._rule = _RULES[self.state]
        self._markers = {}
        for marker in Marker:
            token_id = tokenizer.special_id(marker.value)
            if token_id is not None and (self._tools or marker is not Marker.DSML):
                self._markers[token_id] = marker
        self._detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
        self._held = 0
        """Newlines at the end of the text so far,"""
        self._opener = ""
        """`<` or `</` behind them,"""
        self._tag: str | None = None
        """and what follows `｜DSML｜` behind that, until it is known to be a tag or not."""
        self._reasoning: list[str] = []
        self._content: list[str] = []

    @property
    def in_reasoning(self) -> bool:
        return self._rule.channel == "reasoning"

    @property
    def in_calls(self) -> bool:
        return self.state is State.CALLS

    @property
    def num_calls(self) -> int:
        """Calls whose name is known."""
        return self._calls.num_calls

    @property
    def incomplete(self) -> bool:
        """The answer ended inside an argument. Known after `finish`."""
        return self._calls.incomplete

    def is_marker(self, token_id: int) -> bool:
        """Whether the id, coming next, is structure and no text."""
        marker = self._markers.get(token_id)
        if marker is Marker.DSML:
            return self.in_calls or bool(self._opener)
        return marker is not None and (self.state, marker) in _TRANSITIONS

    def push(self, token_ids: Sequence[int]) -> Delta:
        """Read ids in [0, vocab_size); returns what is certain of their text."""
        start = 0
        for n, token_id in enumerate(token_ids):
            marker = self._markers.get(token_id)
            if marker is None:
                continue
            self._run(token_ids[start:n])
            self._text(self._detokenizer.flush())
            if marker is Marker.DSML:
                self._dsml()
            else:
                self._cross(marker)
            start = n + 1
        self._run(token_ids[start:] if start else token_ids)
        return self._take()

    def finish(self, *, cut: bool = False) -> Delta:
        """What was held back, when no token follows. `cut`: the answer was too long, so calls are left as they are."""
        self._text(self._detokenizer.flush())
        self._end_tag()
        self._release()
        self._calls.finish(cut=cut)
        return self._take()

    def _run(self, token_ids: Sequence[int]) -> None:
        if self.in_reasoning:
            self.num_reasoning_tokens += len(token_ids)
        self._text(self._detokenizer.push(token_ids))

    def _cross(self, marker: Marker) -> None:
        """`<think>` or `</think>`, where it is structure; elsewhere it is text."""
        if marker is Marker.THINK_END:
            self._end_tag()
        target = _TRANSITIONS.get((self.state, marker))
        if target is None or (marker is Marker.THINK_START and (self._opener or self._tag is not None)):
            self.num_reasoning_tokens += self.in_reasoning
            self._text(marker.value)
            return
        if self._opener or not self.in_reasoning:
            self._release()
        self._held = 0
        self._enter(target)

    def _dsml(self) -> None:
        if self.state is State.CALLS:
            self._calls.marker()
            return
        tag = self._tag
        if tag is not None and tag.endswith("<") and not tag.endswith("</") and _is_lone_name(tag[:-1]):
            # An opening tag of any name right before another one: a block under a wrong name.
            self._begin_calls("")
            self._calls.text("<")
            self._calls.marker()
            return
        self._end_tag()
        if self._opener:
            self._tag = ""
        else:
            self._text(DSML)

    def _enter(self, state: State) -> None:
        self.state = state
        self._rule = _RULES[state]

    def _text(self, text: str) -> None:
        if not text:
            return
        if self.state is State.CALLS:
            self._calls.text(text)
            return
        if self._tag is not None:
            self._tag += text
            self._decide()
            return
        if self._opener:
            text, self._opener = self._opener + text, ""
        if self._rule.drops_leading_newlines:
            text = text.lstrip("\n")
            if not text:
                return
        if self._tools:
            self._opener = opener_of(text)
            if self._opener:
                text = text[: -len(self._opener)]
        elif not self._rule.holds_newlines:
            self._deliver(text)
            return
        kept = text.rstrip("\n")
        if kept:
            self._release_newlines()
            self._deliver(kept)
        self._held += len(text) - len(kept)

    def _deliver(self, text: str) -> None:
        if self._rule.then is not self.state:
            self._enter(self._rule.then)
        (self._reasoning if self._rule.channel == "reasoning" else self._content).append(text)

    def _release(self) -> None:
        self._release_newlines()
        if self._opener:
            opener, self._opener = self._opener, ""
            self._deliver(opener)

    def _release_newlines(self) -> None:
        if self._held:
            held, self._held = self._held, 0
            self._deliver("\n" * held)

    # Behind `<｜DSML｜` or `</｜DSML｜` outside of a block

    def _decide(self) -> None:
        """See whether what was held back is a tag: one of a call, or text about tags."""
        tag = self._tag
        assert tag is not None
        name = _TAG_NAME.match(tag)
        if name is None:
            if tag not in ("", " "):
                self._no_tag()
            return
        rest = tag[name.end() :]
        if not rest:
            if len(tag) > _MOST_NAME_CHARS:
                self._no_tag()
            return
        closing = self._opener == "</"
        if name[1] in _TAGS or (name[1] in _WORDS and rest[0] in ">\r\n/"):
            if closing:
                self._drop_tag(rest)
            else:
                self._begin_calls(tag)
        elif closing or rest[0] != ">" or not _may_be_lone(rest[1:]):
            self._no_tag()

    def _begin_calls(self, tag: str) -> None:
        """A block begins, or a call without one. What leads to it is not part of any text."""
        self._held, self._opener, self._tag = 0, "", None
        self._enter(State.CALLS)
        self._calls.text("<")
        self._calls.marker()
        self._calls.text(tag)

    def _drop_tag(self, rest: str) -> None:
        """A closing tag that closes nothing."""
        self._held, self._opener, self._tag = 0, "", None
        self._text(rest.removeprefix(">"))

    def _no_tag(self) -> None:
        """What looked like a tag is text."""
        tag, self._tag = self._tag, None
        assert tag is not None
        self._release()
        self._text(DSML + tag)

    def _end_tag(self) -> None:
        """The text ends, or something else comes: a piece of a tag is dropped."""
        tag = self._tag
        if tag is None:
            return
        if any(name.startswith(tag.removeprefix(" ")) for name in (*_TAGS, *_WORDS)):
            self._held, self._opener, self._tag = 0, "", None
        else:
            self._no_tag()

    def _take(self) -> Delta:
        delta = Delta("".join(self._reasoning), "".join(self._content), self._calls.take())
        self._reasoning.clear()
        self._content.clear()
        return delta


def _may_be_lone(rest: str) -> bool:
    """Whether only blanks, and perhaps the beginning of a tag, follow a tag."""
    return len(rest) <= _MOST_BLANKS and rest.removesuffix("<").strip() == ""


def _is_lone_name(tag: str) -> bool:
    name = _TAG_NAME.match(tag)
    return name is not None and tag[name.end() :].startswith(">") and not tag[name.end() + 1 :].strip()
