"""What the OpenAI-shaped request bodies share: how they are read, sampling fields, and what is refused by name."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from engine.messages import EngineInfo, SamplingParams
from server import limits
from server.config import VERSION
from server.errors import bad_request, from_validation, unsupported
from server.generation import Usage

LARGEST_INT32 = 2**31 - 1
SYSTEM_FINGERPRINT = f"fathom-{VERSION}"


class Body(BaseModel):
    """A JSON request body: strict types, null means absent, unknown members are ignored and counted."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Known members that would change the answer and are not honoured, with the values that ask for nothing."""
    IGNORED: ClassVar[frozenset[str]] = frozenset()
    """Known members that are accepted without effect."""

    @classmethod
    def read(cls, body: bytes) -> tuple[Self, int]:
        """The parsed body and the number of unknown members.

        Raises:
            ApiError: 400 with `param`.
        """
        raw = limits.read_object(body)
        for name, neutral in cls.REFUSED.items():
            if name in raw and not any(type(raw[name]) is type(value) and raw[name] == value for value in neutral):
                raise unsupported(name, _REFUSALS.get(name))
        unknown = sum(1 for k in raw if k not in cls.model_fields and k not in cls.REFUSED and k not in cls.IGNORED)
        try:
            return cls.model_validate(raw), unknown
        except ValidationError as error:
            raise from_validation(error.errors(include_url=False, include_context=False)) from None


_REFUSALS = {
    "n": "Invalid n value (currently only n = 1 is supported)",
    "best_of": "Invalid best_of value (currently only best_of = 1 is supported)",
    "functions": "`functions` is not supported; use `tools`.",
    "function_call": "`function_call` is not supported; use `tool_choice`.",
    "response_format": "`response_format` other than text is not supported by this version of the server.",
}

ACCEPTED_WITHOUT_EFFECT = frozenset(
    {
        *("user", "user_id", "metadata", "store", "service_tier", "safety_identifier", "moderation", "verbosity"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "request_id", "rid"),
        *("parallel_tool_calls", "spaces_between_special_tokens", "client_metadata"),
    }
)

REFUSED_EVERYWHERE: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logits_processors": ([],),
    "custom_logit_processor": (),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "structural_tag": (),
    "response_format": ({"type": "text"},),
    "truncate_prompt_tokens": (),
    "skip_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "detokenize": (True,),
    "kv_transfer_params": ({},),
    "session_params": ({},),
    "lora_path": (),
    "vllm_xargs": ({},),
}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    include_usage: bool | None = None


def _stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > limits.MOST_STOPS:
        raise ValueError(f"Stop string array too long: {len(stops)}; at most {limits.MOST_STOPS}")
    if any(not stop or len(stop) > limits.MOST_STOP_CHARS for stop in stops):
        raise ValueError(f"each stop string must have 1 to {limits.MOST_STOP_CHARS} characters")
    return tuple(stops)


Real = Annotated[float, Field(allow_inf_nan=False)]


class SamplingFields(Body):
    """Fields of both completion APIs. Ranges that do not depend on the engine are checked here."""

    model: Annotated[str, Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=LARGEST_INT32)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=LARGEST_INT32)] = 0
    temperature: Annotated[Real, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[Real, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=LARGEST_INT32)] = 0
    min_p: Annotated[Real, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[Real, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Real, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[Real, Field(gt=0, le=10)] = 1.0
    logit_bias: Annotated[
        dict[Annotated[str, Field(max_length=12)], Annotated[Real, Field(ge=-100, le=100)]],
        Field(max_length=limits.MOST_BIASES),
    ] = {}
    seed: Annotated[int, Field(ge=-(2**63), le=limits.MOST_INTEGER)] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops)] = ()
    stop_token_ids: Annotated[list[int], Field(max_length=limits.MOST_STOP_IDS)] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    return_token_ids: bool = False
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    cache_salt: Annotated[str, Field(max_length=256)] = ""

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage is True

    def check(self) -> None:
        """Rules over several fields; raises ApiError."""
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options should be set along with stream = true", param="stream_options")

    def sampling(self, info: EngineInfo, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """The engine's parameters; every token id is checked against the width of the logits.

        Raises:
            ApiError: 400 with `param`.
        """
        if self.min_tokens > max_tokens:
            message = f"min_tokens ({self.min_tokens}) is greater than max_tokens ({max_tokens})."
            raise bad_request(message, param="min_tokens")
        check_token_ids(self.stop_token_ids, info.vocab_size, "stop_token_ids")
        bias: dict[int, float] = {}
        for text, value in self.logit_bias.items():
            if not (text.isascii() and text.isdigit()) or int(text) >= info.vocab_size:
                message = f"logit_bias: keys must be token ids from 0 to {info.vocab_size - 1}."
                raise bad_request(message, param="logit_bias")
            bias[int(text)] = float(value)
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k) if self.top_k < info.vocab_size else 0,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=bias,
            seed=None if self.seed is None else self.seed % 2**63,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop_token_ids=tuple(dict.fromkeys(self.stop_token_ids)),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
        )


class ThinkingFields(Body):
    """The three spellings of whether and how hard the model thinks; server.text.effort reads them."""

    thinking: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises ApiError 400 unless every id is one the logits have: a larger one would index a neighbour's memory."""
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        raise bad_request(f"{param}: token ids must be from 0 to {vocab_size - 1}.", param=param)


def usage_counts(usage: Usage) -> dict[str, Any]:
    """OpenAI's and DeepSeek's counts; for whoever wonders, why the prefix cache had no more."""
    details: dict[str, Any] = {"cached_tokens": usage.cached_tokens}
    if usage.miss_reason is not None:
        details["cache_miss_reason"] = usage.miss_reason
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": details,
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "prompt_cache_hit_tokens": usage.cached_tokens,
        "prompt_cache_miss_tokens": usage.prompt_tokens - usage.cached_tokens,
    }
