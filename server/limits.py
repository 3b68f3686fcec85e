"""Bounds on what a client may send, and a JSON reader that no body can hurt."""

import re
from typing import Any

import msgspec

from server.errors import ApiError, bad_request

MOST_HEADERS = 100
MOST_HEADER_BYTES = 64 * 1024
DEEPEST_JSON = 64
MOST_CONTAINERS = 200_000
"""Arrays and objects in one body: each costs the server some hundred bytes."""
MOST_MEMBERS = 500_000
"""Members of objects, counted by `":` so that JSON quoted inside a prompt counts too: no context holds that many."""
MOST_INTEGER = 2**63 - 1

MOST_PROMPTS = 128
MOST_MESSAGES = 20_000
MOST_CHOICES = 8
MOST_STOPS = 16
MOST_STOP_CHARS = 1024
MOST_STOP_IDS = 128
MOST_BIASES = 1024
MOST_ALLOWED_IDS = 2**18
MOST_BAD_WORDS = 128
MOST_LOGPROBS = 20
MOST_CHOICES = 8
MOST_ANSWERS = 256
"""Prompts times choices of one request."""
MOST_PROMPT_LOGPROBS = 2**20
"""Numbers in the log probabilities of all prompts of one request: tokens times (1 + likeliest tokens)."""
MOST_IGNORED_NAMES = 16
MOST_IGNORED_CHARS = 64
"""Of unknown fields that a response header names, and of each name."""

# Possessive quantifiers: a string is skipped in one pass, without a backtracking stack.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[{]|[\]}]', re.DOTALL)
_OPENING = (b"[", b"{")
_CLOSING = (b"]", b"}")


def read_json(body: bytes) -> Any:
    """Decode strict JSON (no NaN, no lone surrogates, no BOM, at most 64 levels).

    Raises:
        ApiError: 400 with a message that names the trouble.
    """
    _check_structure(body)
    try:
        return msgspec.json.decode(body)
    except RecursionError:
        raise bad_request("The JSON body is nested too deeply.", code="invalid_json") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error).rstrip(".")
        raise bad_request(f"The request body is not valid JSON: {reason}.", code="invalid_json") from None


def read_object(body: bytes) -> dict[str, Any]:
    """Decode a JSON object and drop members that are null: they mean the same as absent ones."""
    value = read_json(body)
    if not isinstance(value, dict):
        raise bad_request("The request body must be a JSON object.", code="invalid_json")
    return {key: member for key, member in value.items() if member is not None}


def _check_structure(body: bytes) -> None:
    if body.count(b'":') > MOST_MEMBERS:
        raise bad_request(f"The JSON body has more than {MOST_MEMBERS} members.")
    if body.count(b"[") + body.count(b"{") <= DEEPEST_JSON:
        return
    depth = containers = 0
    for match in _TOKEN.finditer(body):
        token = match.group()
        if token in _OPENING:
            depth += 1
            containers += 1
            if depth > DEEPEST_JSON:
                raise bad_request(f"The JSON body has more than {DEEPEST_JSON} levels.", code="invalid_json")
            if containers > MOST_CONTAINERS:
                raise bad_request(f"The JSON body has more than {MOST_CONTAINERS} arrays and objects.")
        elif token in _CLOSING:
            depth -= 1


def check_content_type(headers: list[tuple[bytes, bytes]]) -> None:
    """JSON in UTF-8, uncompressed. Browsers cannot send this type across origins without asking first.

    Raises:
        ApiError: 415.
    """
    content_type = b""
    for name, value in headers:
        if name == b"content-type":
            content_type = value.lower()
        elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise ApiError(415, "Compressed request bodies are not accepted.", code="unsupported_media_type")
    media_type, _, parameters = content_type.partition(b";")
    media_type = media_type.strip()
    is_json = media_type == b"application/json" or (
        media_type.startswith(b"application/") and media_type.endswith(b"+json")
    )
    charset = parameters.partition(b"charset=")[2].split(b";")[0].strip(b' "')
    if not is_json or charset not in (b"", b"utf-8", b"utf8"):
        message = "The request body must have the content type application/json (UTF-8)."
        raise ApiError(415, message, code="unsupported_media_type")


def declared_length(headers: list[tuple[bytes, bytes]]) -> int | None:
    """Content-Length in bytes; None when the client does not say.

    Raises:
        ApiError: 400 when it is not a number.
    """
    for name, value in headers:
        if name == b"content-length":
            if not value.isdigit() or len(value) > 18:
                raise bad_request("The Content-Length header is not a usable number.")
            return int(value)
    return None


def check_head(target: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """Bound the bytes of request target and headers, and the number of headers.

    Raises:
        ApiError: 431.
    """
    size = len(target) + sum(len(name) + len(value) for name, value in headers)
    if len(headers) > MOST_HEADERS or size > MOST_HEADER_BYTES:
        raise ApiError(431, "The request head is too large.", code="headers_too_large")
