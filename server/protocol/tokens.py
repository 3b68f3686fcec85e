"""Bodies of /tokenize and /detokenize: vLLM's fields, and SGLang's lists of prompts."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from server import limits
from server.protocol.common import Body, ThinkingFields
from server.protocol.tools import MOST_TOOLS


def _texts(value: object) -> object:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise ValueError("must be a string or a list of strings")
    if len(value) > limits.MOST_PROMPTS:
        raise ValueError(f"at most {limits.MOST_PROMPTS} prompts in one request")
    return value


def _ids(value: object) -> object:
    """One list of ids or several."""
    if isinstance(value, list):
        nested = bool(value) and isinstance(value[0], list)
        if nested and len(value) > limits.MOST_PROMPTS:
            raise ValueError(f"at most {limits.MOST_PROMPTS} lists in one request")
        lists = value if nested else [value]
        if all(isinstance(ids, list) and all(type(n) is int for n in ids) for ids in lists):
            return value
    raise ValueError("must be a list of token ids, or a list of those")


class TokenizeBody(ThinkingFields):
    """Either `prompt` (as /v1/completions would read it) or `messages` (as /v1/chat/completions would)."""

    REFUSED = {  # noqa: RUF012
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "chat_template": (),
        "mm_processor_kwargs": ({},),
        "media_io_kwargs": ({},),
    }
    IGNORED = frozenset({"add_special_tokens"})

    model: str | None = None
    prompt: Annotated[Any, BeforeValidator(_texts, json_schema_input_type=str | list[str])] = None
    parse_special: bool = False
    """Spellings of special tokens in `prompt` are those tokens."""
    return_token_strs: bool = False
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=limits.MOST_MESSAGES)] | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list, max_length=MOST_TOOLS)
    tool_choice: Any = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Annotated[Any, BeforeValidator(_ids, json_schema_input_type=list[int] | list[list[int]])]
    skip_special_tokens: bool = False
