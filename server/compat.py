"""`--api-compat deepseek`: what api.deepseek.com does differently from what a request says."""

from dataclasses import replace

from server.chat_request import ChatRequest
from server.errors import ApiError, unsupported

_TOOLS_TOP_P = 0.95
_RANGES = {
    "temperature": "Invalid temperature value, the valid range of temperature is [0, 2]",
    "top_p": "Invalid top_p value, the valid range of top_p is (0, 1.0]",
    "n": "Invalid n value (currently only n = 1 is supported)",
}


def as_deepseek(chat: ChatRequest) -> ChatRequest:
    """The request that DeepSeek's API would run.

    Thinking has temperature 1, and top_p 0.95 with tools and 1 without, whatever is sent; presence and frequency
    penalties never count (facts of V4-Pro). Raises ApiError 400 for more than one choice.
    """
    if chat.num_choices > 1:
        raise unsupported("n", _RANGES["n"])
    forced: dict[str, float] = {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    if chat.thinking:
        has_tools = bool(chat.tools) and chat.tool_choice.mode != "none"
        forced |= {"temperature": 1.0, "top_p": _TOOLS_TOP_P if has_tools else 1.0}
    return replace(chat, fields=chat.fields.model_copy(update=forced))


def in_dialect(error: ApiError, dialect: str) -> ApiError:
    """The error as a server of that dialect words it; DeepSeek names no field, and a bad request has one code."""
    if dialect != "deepseek":
        return error
    bad = error.status == 400
    message = error.message
    if bad and error.param in _RANGES and message.startswith(f"{error.param}:"):
        message = _RANGES[error.param]
    code = "invalid_request_error" if bad else error.code
    return ApiError(error.status, message, type=error.type, code=code, headers=error.headers)
