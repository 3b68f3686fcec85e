"""Tool calls in the model's own markup (DSML), read while they are made.

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="NAME">
    <｜DSML｜parameter name="KEY" string="true">raw text</｜DSML｜parameter>
    <｜DSML｜parameter name="KEY" string="false">JSON</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

`｜DSML｜` is one token; what merely spells it is text. What goes out are pieces of a JSON object for each call. Texts
stream as they come. A value that should be JSON waits for its end, because a value that is none goes out as a string;
where a grammar already saw to it, it streams too.

Repairs are few: a missing closing tag before the next parameter or call, a missing `string`, JSON that is none, and
closing brackets when the answer ended between two values. An answer that ended inside a value stays cut.
"""

import json
import re
import secrets
import string
from enum import Enum, auto

import msgspec

DSML = "｜DSML｜"
_ALPHABET = string.ascii_letters + string.digits
_MOST_TAG_CHARS = 4096

_INVOKE = re.compile(r' ?invoke name="([^"\n]*)"')
_PARAMETER = re.compile(r' ?parameter name="(.*?)"(?: string="(true|false)"| string="[^"]*")? *(/?)')
_TAG_END = re.compile(r'["\n>]')
_BLOCK_END = re.compile(r" ?(?:tool_)?calls")
# In a value only these begin a tag; anything else is the value's own text.
_NEXT_CALL, _NEXT_PARAMETER = ' invoke name="', ' parameter name="'
_TRAILING = re.compile(r"(?:\n|\n?</?)\Z")
_LONGEST_TRAILING = 3
_RAW = msgspec.json.Decoder(msgspec.Raw)


class CallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a tool call. The first piece of a call has its id and name, and no arguments."""

    index: int
    call_id: str | None = None
    name: str | None = None
    arguments: str = ""
    """The pieces of a call join to the text of a JSON object, unless the answer ended with "length"."""


class _State(Enum):
    BLOCK = auto()
    """Outside of calls: text is dropped."""
    TAG = auto()
    """Behind `<｜DSML｜`, up to `>`."""
    CLOSING_TAG = auto()
    ARGUMENTS = auto()
    """Inside a call, between parameters: text is dropped."""
    VALUE = auto()
    TAG_IN_VALUE = auto()
    """Behind `<｜DSML｜` in a value: the next parameter or call, or text."""
    FINISHED = auto()
    """Behind the block: everything is dropped."""


class _Kind(Enum):
    """How a value goes out."""

    TEXT = auto()
    """At once, escaped."""
    JSON = auto()
    """At once, as it stands."""
    DOUBTFUL = auto()
    """At its end: as it stands if it is JSON, else as a string."""


class CallReader:
    """One answer's block of calls, from behind the newlines that lead to it. `text` and `marker` alternate as they
    come; `take` hands out the pieces so far. Time is linear in the text.
    """

    __slots__ = (
        "_call_open",
        "_deltas",
        "_held",
        "_key",
        "_kind",
        "_num_parameters",
        "_opener",
        "_pieces",
        "_quoted",
        "_state",
        "_streams_json",
        "_tag",
        "incomplete",
        "num_calls",
    )

    def __init__(self, *, streams_json: bool = False) -> None:
        """`streams_json`: values with string="false" are known to be JSON."""
        self.num_calls = 0
        self.incomplete = False
        """The answer ended inside a value."""
        self._state = _State.BLOCK
        self._streams_json = streams_json
        self._call_open = False
        self._num_parameters = 0
        self._opener = ""
        """`<` or `</` at the end of the text so far; in a value, with a newline before it."""
        self._tag = ""
        self._quoted = False
        self._key = ""
        self._kind = _Kind.TEXT
        self._held: list[str] = []
        """Of a doubtful value."""
        self._pieces: list[str] = []
        self._deltas: list[CallDelta] = []

    def text(self, text: str) -> None:
        """Characters between markers."""
        while text:
            match self._state:
                case _State.VALUE:
                    self._value_text(text)
                    return
                case _State.TAG | _State.CLOSING_TAG:
                    text = self._tag_text(text)
                case _State.TAG_IN_VALUE:
                    text = self._tag_in_value(text)
                case _State.BLOCK | _State.ARGUMENTS:
                    self._opener = opener_of(self._opener + text[-2:])
                    return
                case _State.FINISHED:
                    return

    def marker(self) -> None:
        """The token `｜DSML｜`."""
        if self._state in (_State.TAG, _State.CLOSING_TAG):
            opener = opener_of(self._tag)
            self._end_tag(self._tag[: len(self._tag) - len(opener)])
            self._opener = opener
        elif self._state is _State.TAG_IN_VALUE:
            self._back_to_value()
        opener, self._opener = self._opener, ""
        closing, opening = opener.endswith("</"), opener.endswith("<")
        if self._state is _State.VALUE:
            if closing:
                self._put(opener[:-2])
                self._end_value()
                self._begin_tag(_State.CLOSING_TAG)
            elif opening:
                self._opener = opener
                self._begin_tag(_State.TAG_IN_VALUE)
            else:
                self._put(opener + DSML)
        elif self._state in (_State.BLOCK, _State.ARGUMENTS):
            if closing:
                if self._state is _State.ARGUMENTS:
                    self._end_call()
                self._begin_tag(_State.CLOSING_TAG)
            elif opening:
                self._begin_tag(_State.TAG)

    def finish(self, *, cut: bool) -> None:
        """No text follows. `cut`: the answer was too long, so nothing is made complete that is not."""
        if self._state is _State.TAG_IN_VALUE:
            self._opener, self._state = "", _State.VALUE
        if self._state is _State.VALUE:
            self._put(self._opener)
            if self._kind is _Kind.DOUBTFUL:
                self._piece(self._lead() + "".join(self._held))
            self.incomplete = True
        else:
            if self._state is _State.TAG:
                invoke = _INVOKE.match(self._tag)
                if invoke is not None:
                    self._begin_call(invoke[1])
            if self._call_open and not cut:
                self._end_call()
        self._state = _State.FINISHED

    def take(self) -> tuple[CallDelta, ...]:
        """The pieces since the last time; adjoining ones of a call are one."""
        if not self._pieces and not self._deltas:
            return ()
        self._close_piece()
        deltas = tuple(self._deltas)
        self._deltas.clear()
        return deltas

    # Tags

    def _begin_tag(self, state: _State) -> None:
        self._state, self._tag, self._quoted = state, "", False

    def _tag_text(self, text: str) -> str:
        """Read a tag on; returns what stands behind it."""
        tag = self._tag + text
        for match in _TAG_END.finditer(tag, len(self._tag), _MOST_TAG_CHARS):
            end = match.start()
            if match[0] == '"':
                self._quoted = not self._quoted
            # A quotation mark inside a name, which nothing escapes, leaves the count odd.
            elif match[0] == "\n" or not self._quoted or tag.endswith(('true"', 'false"'), 0, end):
                self._end_tag(tag[:end])
                return tag[end + 1 :]
        if len(tag) >= _MOST_TAG_CHARS:
            self._end_tag(tag[:_MOST_TAG_CHARS])
            return tag[_MOST_TAG_CHARS:]
        self._tag = tag
        return ""

    def _end_tag(self, tag: str) -> None:
        closing = self._state is _State.CLOSING_TAG
        self._state = _State.ARGUMENTS if self._call_open else _State.BLOCK
        if closing:
            if not self._call_open and _BLOCK_END.fullmatch(tag):
                self._state = _State.FINISHED
            return
        invoke = _INVOKE.match(tag)
        if invoke is not None:
            self._begin_call(invoke[1])
            if tag.endswith("/"):
                self._end_call()
            return
        parameter = _PARAMETER.fullmatch(tag)
        if parameter is not None and self._call_open:
            name, is_string, self_closing = parameter.groups()
            self._begin_value(name, is_text=is_string == "true")
            if self_closing:
                self._end_value()

    def _tag_in_value(self, text: str) -> str:
        """Read on behind `<｜DSML｜` until it is the next parameter or call, or the value's own text."""
        seen = self._tag + text[: len(_NEXT_PARAMETER)]
        spaced = seen if seen.startswith(" ") else " " + seen
        if spaced.startswith((_NEXT_CALL, _NEXT_PARAMETER)):
            # The newline in front belongs to the closing tag that is missing.
            self._opener = ""
            self._end_value()
            text = self._tag + text
            self._begin_tag(_State.TAG)
            return text
        if _NEXT_CALL.startswith(spaced) or _NEXT_PARAMETER.startswith(spaced):
            self._tag += text
            return ""
        self._back_to_value()
        return text

    def _back_to_value(self) -> None:
        """What looked like a tag is text of the value."""
        opener, self._opener = self._opener, ""
        self._state = _State.VALUE
        self._put(opener + DSML)
        self._value_text(self._tag)

    # Calls and their parameters

    def _begin_call(self, name: str) -> None:
        if self._call_open:
            self._end_call()
        self._close_piece()
        self._deltas.append(CallDelta(index=self.num_calls, call_id=_call_id(self.num_calls), name=name))
        self.num_calls += 1
        self._call_open, self._num_parameters = True, 0
        self._state = _State.ARGUMENTS

    def _end_call(self) -> None:
        self._piece("}" if self._num_parameters else "{}")
        self._close_piece()
        self._call_open = False
        self._state = _State.BLOCK

    def _begin_value(self, key: str, *, is_text: bool) -> None:
        self._state, self._key = _State.VALUE, key
        if is_text:
            self._kind = _Kind.TEXT
            self._piece(self._lead() + '"')
        elif self._streams_json:
            self._kind = _Kind.JSON
            self._piece(self._lead())
        else:
            self._kind = _Kind.DOUBTFUL
            self._held.clear()

    def _lead(self) -> str:
        """What stands in front of a value."""
        self._num_parameters += 1
        start = "{" if self._num_parameters == 1 else ", "
        return start + _quoted(self._key) + ": "

    def _value_text(self, text: str) -> None:
        if self._opener:
            text, self._opener = self._opener + text, ""
        trailing = _TRAILING.search(text, max(0, len(text) - _LONGEST_TRAILING))
        if trailing is not None:
            text, self._opener = text[: trailing.start()], trailing[0]
        self._put(text)

    def _put(self, text: str) -> None:
        if not text:
            return
        match self._kind:
            case _Kind.TEXT:
                self._piece(_quoted(text)[1:-1])
            case _Kind.JSON:
                self._piece(text)
            case _Kind.DOUBTFUL:
                self._held.append(text)

    def _end_value(self) -> None:
        if self._kind is _Kind.TEXT:
            self._piece('"')
        elif self._kind is _Kind.DOUBTFUL:
            value = "".join(self._held)
            self._piece(self._lead() + (value if _is_json(value) else _quoted(value)))
            self._held.clear()
        self._state = _State.ARGUMENTS

    # Pieces

    def _piece(self, arguments: str) -> None:
        self._pieces.append(arguments)

    def _close_piece(self) -> None:
        if self._pieces:
            self._deltas.append(CallDelta(index=self.num_calls - 1, arguments="".join(self._pieces)))
            self._pieces.clear()


def opener_of(tail: str) -> str:
    """How a tag may begin at the end of a text."""
    if tail.endswith("</"):
        return "</"
    return "<" if tail.endswith("<") else ""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _is_json(text: str) -> bool:
    try:
        _RAW.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        return False
    return True


def _call_id(index: int) -> str:
    """Source: DeepSeek's API."""
    letters = "".join(secrets.choice(_ALPHABET) for _ in range(20))
    return f"call_{index:02d}_{letters}{secrets.randbelow(10_000):04d}"
