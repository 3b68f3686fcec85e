"""Reading the input file of a batch: JSON lines, each a request with an id of its own."""

from typing import Any

import msgspec

from server import limits
from server.batches.store import Line
from server.errors import ApiError, bad_request, echo

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
MOST_LINES = 50_000
MOST_ERRORS = 100
LONGEST_CUSTOM_ID = 512


class InvalidBatch(ValueError):
    """What is wrong with the file: OpenAI's error objects, at least one and at most MOST_ERRORS."""

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        super().__init__(f"{len(errors)} errors in the input file")
        self.errors = errors


def read_lines(data: bytes, endpoint: str) -> list[Line]:
    """Every request of the file; empty lines are skipped. The bodies are checked when they are run.

    Raises:
        InvalidBatch: nothing of this file is run.
    """
    lines: list[Line] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    start = number = 0
    while start < len(data) and len(errors) < MOST_ERRORS:
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        number += 1
        text = data[start:end]
        if text.strip():
            try:
                custom_id = _check(text, endpoint, seen)
            except _LineError as error:
                errors.append({"code": error.code, "line": number, "message": error.message, "param": error.param})
            else:
                seen.add(custom_id)
                lines.append(Line(number=number, custom_id=custom_id, start=start, size=end - start))
                if len(lines) > MOST_LINES:
                    message = f"The file has more than {MOST_LINES} requests."
                    errors.append({"code": "too_many_requests", "line": number, "message": message, "param": None})
                    break
        start = end + 1
    if not lines and not errors:
        errors.append({"code": "empty_file", "line": None, "message": "The file has no requests.", "param": None})
    if errors:
        raise InvalidBatch(errors)
    return lines


class _Request(msgspec.Struct):
    body: msgspec.Raw


class _Body(msgspec.Struct):
    stream: Any = None
    background: Any = None


def read_body(text: bytes) -> bytes:
    """The `body` of a line that `read_lines` has accepted, as it stands there.

    Raises:
        ApiError: 400 for a body whose answer would not come as one piece.
    """
    raw = bytes(msgspec.json.decode(text, type=_Request).body)
    body = msgspec.json.decode(raw, type=_Body)
    for name in ("stream", "background"):
        if getattr(body, name) not in (None, False):
            raise bad_request(f"`{name}` is not possible in a batch.", param=name, code="unsupported_parameter")
    return raw


class _LineError(ValueError):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


def _check(text: bytes, endpoint: str, seen: set[str]) -> str:
    try:
        line = limits.read_object(text)
    except ApiError as error:
        raise _LineError("invalid_json_line", error.message) from None
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= LONGEST_CUSTOM_ID:
        message = f"custom_id must be a string of 1 to {LONGEST_CUSTOM_ID} characters."
        raise _LineError("invalid_custom_id", message, "custom_id")
    if custom_id in seen:
        message = f"The custom_id `{echo(custom_id)}` was used on an earlier line."
        raise _LineError("duplicate_custom_id", message, "custom_id")
    if line.get("method") != "POST":
        raise _LineError("invalid_method", "method must be POST.", "method")
    if line.get("url") != endpoint:
        raise _LineError("mismatched_url", f"url must be the endpoint of the batch, {endpoint}.", "url")
    if not isinstance(line.get("body"), dict):
        raise _LineError("invalid_body", "body must be a JSON object.", "body")
    return custom_id
