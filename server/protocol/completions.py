"""POST /v1/completions: the request body, whole answers and stream chunks."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from server import limits
from server.generation import TokenLogprob
from server.protocol import sse
from server.protocol.common import (
    ACCEPTED_WITHOUT_EFFECT,
    REFUSED_EVERYWHERE,
    SYSTEM_FINGERPRINT,
    SamplingFields,
)

DEFAULT_TOKENS = 16
"""max_tokens of a request that names none, as OpenAI's."""

TextOrIds = str | list[int]


def _prompts(value: object) -> tuple[TextOrIds, ...]:
    """One or several prompts, each a text or token ids."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of token ids, or a list of those")
    if not value:
        raise ValueError("must not be empty")
    if _is_ids(value):
        return (value,)
    if len(value) > limits.MOST_PROMPTS:
        raise ValueError(f"at most {limits.MOST_PROMPTS} prompts in one request")
    for prompt in value:
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and _is_ids(prompt)):
            raise ValueError("must be a string, a list of token ids, or a list of those")
    return tuple(value)


def _is_ids(value: list[Any]) -> bool:
    return all(type(item) is int for item in value)


class CompletionBody(SamplingFields):
    REFUSED = REFUSED_EVERYWHERE | {
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
        "add_special_tokens": (False, True),
    }
    IGNORED = ACCEPTED_WITHOUT_EFFECT

    prompt: Annotated[tuple[Any, ...], BeforeValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=limits.MOST_LOGPROBS)] | None = None


def completion_logprobs(rows: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The old shape: four columns. The sampled token is always among its `top_logprobs`."""
    return {
        "tokens": [row.token for row in rows],
        "token_logprobs": [row.logprob for row in rows],
        "top_logprobs": [{**{t.token: t.logprob for t in row.top}, row.token: row.logprob} for row in rows],
        "text_offset": [row.text_offset for row in rows],
    }


class CompletionChunks:
    """Writes the chunks of one stream around a prefix that never changes."""

    def __init__(self, answer_id: str, created: int, model: str, *, include_usage: bool) -> None:
        self._head = b"".join(
            (
                b'data: {"id":',
                sse.json_string(answer_id),
                b',"object":"text_completion","created":%d,"model":' % created,
                sse.json_string(model),
                b',"system_fingerprint":',
                sse.json_string(SYSTEM_FINGERPRINT),
                b',"choices":[',
            )
        )
        self._end = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"

    def text(
        self,
        index: int,
        text: str,
        *,
        finish_reason: str | None = None,
        logprobs: Any = None,
        token_ids: list[int] | None = None,
        prompt_token_ids: list[int] | None = None,
    ) -> bytes:
        parts = [self._head, b'{"index":%d,"text":' % index, sse.json_string(text), b',"logprobs":']
        parts.append(b"null" if logprobs is None else sse.json_bytes(logprobs))
        parts.append(b',"finish_reason":')
        parts.append(b"null" if finish_reason is None else sse.json_string(finish_reason))
        if token_ids is not None:
            parts += [b',"token_ids":', sse.json_bytes(token_ids)]
        if prompt_token_ids is not None:
            parts += [b',"prompt_token_ids":', sse.json_bytes(prompt_token_ids)]
        parts.append(self._end)
        return b"".join(parts)

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk without choices that include_usage asks for."""
        return self._head + b'],"usage":' + sse.json_bytes(usage) + b"}\n\n"


def completion_answer(
    *, answer_id: str, created: int, model: str, choices: list[dict[str, Any]], usage: dict[str, Any]
) -> bytes:
    return sse.json_bytes(
        {
            "id": answer_id,
            "object": "text_completion",
            "created": created,
            "model": model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
            "choices": choices,
            "usage": usage,
        }
    )


def completion_choice(
    index: int,
    text: str,
    finish_reason: str,
    logprobs: Any,
    token_ids: list[int] | None = None,
    prompt_token_ids: list[int] | None = None,
) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
    if token_ids is not None:
        choice["token_ids"] = token_ids
        choice["prompt_token_ids"] = prompt_token_ids
    return choice
