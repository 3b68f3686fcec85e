"""Errors that a client sees: one shape for every route of an API, bounded in size, with nothing internal in it.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
{"type": "error", "error": {"type": ..., "message": ...}}    (the Messages API)
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
from starlette.responses import Response

MOST_ECHO = 200
"""Characters of a client's own input that a message may repeat."""
_MOST_KEY = 16
_MOST_VALUE = 80
MOST_REPORTED = 10
"""Errors of one body that a message lists."""

ErrorType = Literal[
    "invalid_request_error", "authentication_error", "not_found_error", "rate_limit_error", "server_error"
]


class ApiError(Exception):
    """An answer other than success. The message is one a client may read."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: ErrorType = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON error object."""
        return msgspec.json.encode(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        )

    def anthropic_body(self) -> bytes:
        """The JSON error object of the Messages API."""
        message = self.message
        if self.code == "context_length_exceeded":
            # Agents look for these words to shorten their conversation.
            message = f"prompt is too long: {message}"
        kind = _ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": message}})

    def response(self, path: str = "") -> Response:
        """The answer in the shape of the API that `path` belongs to."""
        body = self.anthropic_body() if speaks_anthropic(path) else self.body()
        return Response(body, self.status, self.headers, media_type="application/json")


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def speaks_anthropic(path: str) -> bool:
    """Whether clients of a path expect answers of the Messages API."""
    return path.startswith("/anthropic/") or path == "/v1/messages" or path.startswith("/v1/messages/")


def bad_request(message: str, *, param: str | None = None, code: str = "invalid_request_error") -> ApiError:
    return ApiError(400, message, code=code, param=param)


def unsupported(param: str, message: str | None = None) -> ApiError:
    """A known field that would change the answer and that this server does not honour."""
    return bad_request(message or f"`{param}` is not supported.", param=param, code="unsupported_parameter")


def model_not_found(name: str) -> ApiError:
    message = f"The model `{echo(name)}` does not exist."
    return ApiError(404, message, type="not_found_error", code="model_not_found", param="model")


def context_exceeded(limit: int, prompt_tokens: int, completion_tokens: int, *, param: str) -> ApiError:
    """The text DeepSeek's own API uses; clients look for `maximum context length is`."""
    message = (
        f"This model's maximum context length is {limit} tokens. However, you requested "
        f"{prompt_tokens + completion_tokens} tokens ({prompt_tokens} in the messages, {completion_tokens} in the "
        "completion). Please reduce the length of the messages or completion."
    )
    return bad_request(message, param=param, code="context_length_exceeded")


def overloaded(message: str, retry_after: int, *, code: str = "server_overloaded") -> ApiError:
    """503 with the seconds after which it makes sense to come back."""
    headers = {"Retry-After": str(max(1, retry_after))}
    return ApiError(503, message, type="server_error", code=code, headers=headers)


def internal() -> ApiError:
    return ApiError(500, "The server had an error while processing the request.", type="server_error", code="internal")


def echo(value: object) -> str:
    """A client's own input, shortened, on one line."""
    text = value if isinstance(value, str) else repr(value)
    text = text[: MOST_ECHO + 1]
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= MOST_ECHO else text[:MOST_ECHO] + "..."


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """One 400 for pydantic's list of errors; `param` is the path of the first."""
    lines = []
    for error in errors[:MOST_REPORTED]:
        where = path(error["loc"])
        message = str(error["msg"]).removeprefix("Value error, ")
        lines.append(f"{where}: {echo(message)}" if where else echo(message))
    if errors[0]["type"] != "missing":
        lines[0] += f", found {_found(errors[0].get('input'))}"
    if len(errors) > MOST_REPORTED:
        lines.append(f"and {len(errors) - MOST_REPORTED} more")
    return bad_request("; ".join(lines), param=path(errors[0]["loc"]) or None)


def path(location: Sequence[object]) -> str:
    """`("messages", 2, "content")` as `messages[2].content`; keys below the first are a client's text and are cut."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{echo(part)[:_MOST_KEY]}" if text else str(part)
    return text[:MOST_ECHO]


def _found(value: object) -> str:
    if isinstance(value, str):
        return echo(repr(value[:_MOST_VALUE]))
    if value is None or isinstance(value, (bool, int, float)):
        return echo(str(value) if not isinstance(value, int) or abs(value) < 10**40 else "a huge integer")
    return "an object" if isinstance(value, dict) else "an array"
