"""Bodies of /tokenize and /detokenize."""

from typing import Annotated, Any

from pydantic import Field

from server import limits
from server.protocol.common import Body, ThinkingFields


class TokenizeBody(ThinkingFields):
    """Either `prompt` (as /v1/completions would read it) or `messages` (as /v1/chat/completions would)."""

    IGNORED = frozenset({"add_special_tokens", "add_generation_prompt"})

    model: str | None = None
    prompt: str | None = None
    parse_special: bool = False
    """Spellings of special tokens in `prompt` are those tokens."""
    return_token_strs: bool = False
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=limits.MOST_MESSAGES)] | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[int]
