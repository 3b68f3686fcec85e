"""POST /v1/completions: the request body, whole answers and stream chunks. Log probabilities stand in
`completion_logprobs`."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from server import limits
from server.errors import bad_request, unsupported
from server.grammar.formats import output_format_of
from server.protocol import sse
from server.protocol.common import LARGEST_INT32, SYSTEM_FINGERPRINT, FormatFields, SamplingFields
from server.protocol.known_fields import ACCEPTED_WITHOUT_EFFECT, REASONS, REFUSED_EVERYWHERE

DEFAULT_TOKENS = 16
"""max_tokens of a request that names none, as OpenAI's."""

TextOrIds = str | list[int]
OneOrMore = TextOrIds | list[TextOrIds]


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


class CompletionBody(SamplingFields, FormatFields):
    REFUSED = REFUSED_EVERYWHERE | {"add_special_tokens": (False, True)}
    IGNORED = ACCEPTED_WITHOUT_EFFECT

    prompt: Annotated[tuple[Any, ...], BeforeValidator(_prompts, json_schema_input_type=OneOrMore)]
    suffix: str | None = None
    """What shall stand behind the answer: the prompt becomes the fill-in-the-middle form."""
    echo: bool = False
    max_tokens: Annotated[int, Field(ge=0, le=LARGEST_INT32)] | None = None
    """0: only the prompt's log probabilities."""
    best_of: Annotated[int, Field(ge=1, le=LARGEST_INT32)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=limits.MOST_LOGPROBS)] | None = None
    parse_special: bool = False
    """Spellings of special tokens in the prompt are those tokens; without it they are plain text."""

    @property
    def num_prompt_logprobs(self) -> int | None:
        """What the engine is asked for; `echo` with `logprobs` shows the prompt's too."""
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((n for n in asked if n is not None), default=None)

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != self.n:
            raise unsupported("best_of", REASONS["best_of"])
        if self.max_tokens == 0 and (asked := output_format_of(self)) is not None:
            raise bad_request(f"{asked.param} asks for a format of no tokens: max_tokens is 0.", param=asked.param)
        if len(self.prompt) * self.n > limits.MOST_ANSWERS:
            raise bad_request(f"at most {limits.MOST_ANSWERS} answers (prompts times n) in one request", param="n")
        if self.max_tokens == 0:
            if not self.echo and self.prompt_logprobs is None:
                raise bad_request("max_tokens may be 0 only with echo or prompt_logprobs", param="max_tokens")
            if self.min_tokens:
                message = f"min_tokens ({self.min_tokens}) is greater than max_tokens (0)."
                raise bad_request(message, param="min_tokens")
        if self.suffix:
            if not all(isinstance(prompt, str) for prompt in self.prompt):
                raise bad_request("suffix needs a prompt that is text, not token ids", param="suffix")
            if self.truncate_prompt_tokens is not None:
                message = "truncate_prompt_tokens would cut the form that suffix gives the prompt"
                raise bad_request(message, param="truncate_prompt_tokens")
            if self.echo and self.logprobs is not None:
                raise bad_request("logprobs of an echoed prompt are not available with suffix", param="echo")


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
        usage: dict[str, Any] | None = None,
    ) -> bytes:
        parts = [self._head, b'{"index":%d,"text":' % index, sse.json_string(text), b',"logprobs":']
        parts.append(b"null" if logprobs is None else sse.json_bytes(logprobs))
        parts.append(b',"finish_reason":')
        parts.append(b"null" if finish_reason is None else sse.json_string(finish_reason))
        if token_ids is not None:
            parts += [b',"token_ids":', sse.json_bytes(token_ids)]
        if prompt_token_ids is not None:
            parts += [b',"prompt_token_ids":', sse.json_bytes(prompt_token_ids)]
        parts += [self._end] if usage is None else [b'}],"usage":', sse.json_bytes(usage), b"}\n\n"]
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
