"""Server-sent events: one `data:` line and an empty line, LF only; and the JSON pieces they are put together from."""

from typing import Any

import msgspec

from server.errors import ApiError

DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"
MEDIA_TYPE = "text/event-stream"


def json_string(text: str) -> bytes:
    """A JSON string literal on one line for every client: some split at U+2028, U+2029 and U+0085 as well."""
    raw = msgspec.json.encode(text)
    if text.isascii():
        return raw
    for character, escaped in ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085")):
        raw = raw.replace(character, escaped)
    return raw


def json_bytes(value: Any) -> bytes:
    """Any value of dicts, lists, numbers and strings, with the same escapes."""
    raw = msgspec.json.encode(value)
    for character, escaped in ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085")):
        if character in raw:
            raw = raw.replace(character, escaped)
    return raw


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def named_event(name: str, data: bytes) -> bytes:
    """An event whose `data` has the same word as its `type`."""
    return b"event: " + name.encode("ascii") + b"\ndata: " + data + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """The last event of a stream that failed; no [DONE] follows it."""
    return event(error.body())
