"""What the request bodies share: how they are read, and the fields that several APIs have."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from server import limits
from server.config import VERSION
from server.errors import bad_request, echo, from_validation, unsupported
from server.generation import Usage
from server.protocol.known_fields import REASONS

LARGEST_INT32 = 2**31 - 1
SYSTEM_FINGERPRINT = f"fathom-{VERSION}"


class Body(BaseModel):
    """A JSON request body: strict types, null means absent, unknown members are ignored and reported."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Known members that would change the answer and are not honoured, with the values that ask for nothing."""
    IGNORED: ClassVar[frozenset[str]] = frozenset()
    """Known members that are accepted without effect."""
    ALIASES: ClassVar[dict[str, str]] = {}
    """Other spellings of fields."""

    @classmethod
    def read(cls, body: bytes) -> tuple[Self, list[str]]:
        """The parsed body and the names of unknown members.

        Raises:
            ApiError: 400 with `param`.
        """
        return cls.from_object(limits.read_object(body))

    @classmethod
    def from_object(cls, raw: dict[str, Any]) -> tuple[Self, list[str]]:
        """As `read`, from an object without nulls, which is changed."""
        for name, neutral in cls.REFUSED.items():
            if name in raw and not any(type(raw[name]) is type(value) and raw[name] == value for value in neutral):
                raise unsupported(name, REASONS.get(name))
        aliases = [alias for alias in cls.ALIASES if alias in raw]
        unknown = [k for k in raw if not cls.knows(k)]
        cls.normalise(raw)
        spelled: dict[str, str] = {}
        for alias in aliases:
            name, value = cls.ALIASES[alias], raw.pop(alias)
            if name in raw and raw[name] != value:
                raise bad_request(f"{alias} and {spelled.get(name, name)} ask for different things.", param=alias)
            raw[name] = value
            spelled[name] = alias
        try:
            return cls.model_validate(raw), unknown
        except ValidationError as error:
            raise from_validation([_as_spelled(e, spelled) for e in error.errors(include_url=False)]) from None

    @classmethod
    def knows(cls, name: str) -> bool:
        """Whether a member has a meaning here, is refused or is accepted without effect."""
        return name in cls.model_fields or name in cls.REFUSED or name in cls.IGNORED or name in cls.ALIASES

    @classmethod
    def normalise(cls, raw: dict[str, Any]) -> None:
        """Rewrite members that say in one object what others say in several; raises ApiError."""

    def check(self) -> None:
        """Rules over several fields; raises ApiError."""


def _as_spelled(error: Mapping[str, Any], spelled: Mapping[str, str]) -> dict[str, Any]:
    """An error of a field, blamed on the spelling that the client used."""
    place: tuple[Any, ...] = error["loc"]
    return {**error, "loc": (spelled.get(place[0], place[0]), *place[1:])} if place else dict(error)


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """vLLM's: every chunk has the usage so far."""


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


TokenId = Annotated[int, Field(ge=0, le=LARGEST_INT32)]


class SamplingFields(Body):
    """Fields of all completion APIs. Ranges that do not depend on the engine are checked here."""

    ALIASES = {
        "thinking_budget": "thinking_token_budget",
        "max_thinking_tokens": "thinking_token_budget",
        "no_stop_trim": "include_stop_str_in_output",
    }

    model: Annotated[str, Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=limits.MOST_CHOICES)] = 1
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
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=limits.MOST_ALLOWED_IDS)] | None = None
    bad_words: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=limits.MOST_STOP_CHARS)]],
        Field(max_length=limits.MOST_BAD_WORDS),
    ] = []
    seed: Annotated[int, Field(ge=-(2**63), le=limits.MOST_INTEGER)] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops, json_schema_input_type=str | list[str])] = ()
    stop_token_ids: Annotated[list[int], Field(max_length=limits.MOST_STOP_IDS)] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: Annotated[int, Field(ge=0, le=limits.MOST_LOGPROBS)] | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=LARGEST_INT32)] | None = None
    """So many tokens of the prompt are kept; -1: as many as fit."""
    truncation_side: Literal["left", "right"] = "left"
    """left keeps the end of the prompt."""
    thinking_token_budget: Annotated[int, Field(ge=-1, le=LARGEST_INT32)] | None = None
    """Reasoning ends after so many tokens; -1: no bound."""
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    cache_salt: Annotated[str, Field(max_length=256)] = ""
    extra_key: Annotated[str, Field(max_length=256)] = ""
    user_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,512}$")] | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def continuous_usage(self) -> bool:
        return (
            self.include_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)
        )

    @property
    def salt(self) -> str:
        """What keeps this request's cached prefixes apart from others of the same API key."""
        parts = (self.user_id or "", self.cache_salt, self.extra_key)
        return "".join(f"{len(part)}:{part}" for part in parts) if any(parts) else ""

    def check(self) -> None:
        super().check()
        if self.truncate_prompt_tokens == 0:
            raise bad_request("truncate_prompt_tokens must be -1 or at least 1", param="truncate_prompt_tokens")
        if self.stream and self.prompt_logprobs is not None:
            raise bad_request("prompt_logprobs are not available when stream = true", param="prompt_logprobs")
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options should be set along with stream = true", param="stream_options")


class ThinkingFields(Body):
    """The spellings of whether, how hard and how long the model thinks; server.text.effort reads them."""

    thinking: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @classmethod
    def knows(cls, name: str) -> bool:
        return name == "reasoning" or super().knows(name)

    @classmethod
    def normalise(cls, raw: dict[str, Any]) -> None:
        """`reasoning` (OpenRouter's and SGLang's object) and `thinking.budget_tokens` become the fields they mean."""
        super().normalise(raw)
        reasoning = raw.pop("reasoning", {})
        if not isinstance(reasoning, dict):
            raise bad_request("reasoning must be an object", param="reasoning")
        for name, value in reasoning.items():
            if value is None:
                continue
            match name:
                case "effort":
                    raw.setdefault("reasoning_effort", value)
                case "max_tokens":
                    raw.setdefault("thinking_token_budget", value)
                case "enabled" | "enable" | "exclude" if not isinstance(value, bool):
                    raise bad_request(f"reasoning.{name} must be true or false", param=f"reasoning.{name}")
                case "exclude" if "include_reasoning" in cls.model_fields:
                    raw.setdefault("include_reasoning", not value)
                case "enabled" | "enable":
                    raw.setdefault("thinking", {"type": "enabled" if value else "disabled"})
                case _:
                    raise unsupported(f"reasoning.{echo(name)}")
        thinking, kwargs = raw.get("thinking"), raw.get("chat_template_kwargs")
        if isinstance(thinking, dict) and thinking.get("budget_tokens") is not None:
            raw.setdefault("thinking_token_budget", thinking["budget_tokens"])
        if isinstance(kwargs, dict):
            for name in kwargs:
                if name not in ("thinking", "enable_thinking", "reasoning_effort") and kwargs[name] is not None:
                    raise unsupported(f"chat_template_kwargs.{echo(name)}")


class ReasoningViewFields(Body):
    """How much of its reasoning an answer shows; server.reasoning_view reads them."""

    include_reasoning: bool = True
    separate_reasoning: bool = True
    stream_reasoning: bool = True


class FormatFields(Body):
    """The spellings of what the content must look like; `server.grammar.formats` reads them."""

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None


def usage_counts(usage: Usage, *, thinking: bool = False) -> dict[str, Any]:
    """OpenAI's and DeepSeek's counts; for whoever wonders, why the prefix cache had no more.

    `completion_tokens_details` are there when the model thinks.
    """
    details: dict[str, Any] = {"cached_tokens": usage.cached_tokens}
    if usage.miss_reason is not None:
        details["cache_miss_reason"] = usage.miss_reason
    counts: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": details,
        "prompt_cache_hit_tokens": usage.cached_tokens,
        "prompt_cache_miss_tokens": usage.prompt_tokens - usage.cached_tokens,
    }
    if thinking:
        counts["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return counts
