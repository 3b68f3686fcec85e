"""The one check below all endpoints: what a request asks for against what the engine has.

    sampling_params      before anything is tokenised: ids against the width of the logits, words to ids
    truncated            the prompt's ids as `truncate_prompt_tokens` wants them
    for_answer           once the prompt is known: the parameters of one answer

Ranges of single fields stand with the fields; lengths of text and context in `server.routes.call`.
"""

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from engine.messages import ForcedToken, SamplingParams, pack_ids
from server import limits
from server.errors import bad_request
from server.protocol.common import SamplingFields
from server.state import Serving
from server.text.calls import DSML
from server.text.tokenizer import Tokenizer

END_OF_REASONING = "</think>"
_GOLDEN = 0x9E3779B97F4A7C15
_MOST_SEED = 2**63


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises ApiError 400 unless every id is one the logits have: a larger one would index a neighbour's memory."""
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        raise bad_request(f"{param}: token ids must be from 0 to {vocab_size - 1}.", param=param)


def sampling_params(fields: SamplingFields, serving: Serving, num_logprobs: int | None) -> SamplingParams:
    """The engine's parameters but for the answer's length (see `for_answer`).

    Raises:
        ApiError: 400 with `param`.
    """
    vocab_size = serving.info.vocab_size
    check_token_ids(fields.stop_token_ids, vocab_size, "stop_token_ids")
    bias: dict[int, float] = {}
    for text, value in fields.logit_bias.items():
        if not (text.isascii() and text.isdigit()) or int(text) >= vocab_size:
            message = f"logit_bias: keys must be token ids from 0 to {vocab_size - 1}."
            raise bad_request(message, param="logit_bias")
        bias[int(text)] = float(value)
    bad_words = _bad_words(serving.tokenizer, fields.bad_words)
    return SamplingParams(
        temperature=fields.temperature,
        top_p=fields.top_p,
        top_k=max(0, fields.top_k) if fields.top_k < vocab_size else 0,
        min_p=fields.min_p,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        repetition_penalty=fields.repetition_penalty,
        logit_bias=bias,
        seed=None if fields.seed is None else fields.seed % _MOST_SEED,
        min_tokens=fields.min_tokens,
        stop_token_ids=tuple(dict.fromkeys(fields.stop_token_ids)),
        ignore_eos=fields.ignore_eos,
        logprobs=num_logprobs,
        prompt_logprobs=fields.prompt_logprobs,
        allowed_token_ids=_allowed(fields, bad_words, serving),
        bad_words=bad_words,
        forced_token=_forced(fields.thinking_token_budget, serving.tokenizer),
    )


def for_answer(params: SamplingParams, *, max_tokens: int, reasoning: bool = False, choice: int = 0) -> SamplingParams:
    """The parameters of one answer of at most `max_tokens` tokens.

    `reasoning`: the answer begins inside reasoning, so that its bound counts. `choice` numbers the answers to one
    prompt: each has a seed of its own, and the prompt's log probabilities come with the first.

    Raises:
        ApiError: 400 for `min_tokens`.
    """
    if params.min_tokens > max_tokens:
        message = f"min_tokens ({params.min_tokens}) is greater than max_tokens ({max_tokens})."
        raise bad_request(message, param="min_tokens")
    seed = params.seed
    return msgspec.structs.replace(
        params,
        max_tokens=max_tokens,
        forced_token=params.forced_token if reasoning else None,
        seed=None if seed is None else (seed + choice * _GOLDEN) % _MOST_SEED,
        prompt_logprobs=None if choice else params.prompt_logprobs,
    )


def truncated(token_ids: np.ndarray, fields: SamplingFields, limit: int, max_tokens: int | None) -> np.ndarray:
    """The ids that `truncate_prompt_tokens` keeps; `limit` is the context, `max_tokens` what the answer asks for."""
    count = fields.truncate_prompt_tokens
    if count is None:
        return token_ids
    if count == -1:
        count = max(1, limit - (max_tokens or 1))
    return token_ids[-count:] if fields.truncation_side == "left" else token_ids[:count]


def check_prompt_logprobs(lengths: Iterable[int], num_top: int | None, param: str) -> None:
    """Raises ApiError 400 when the log probabilities of these prompts are more than an answer may hold."""
    total = 0 if num_top is None else sum(lengths) * (1 + num_top)
    if total > limits.MOST_PROMPT_LOGPROBS:
        message = (
            f"{param}: {total} log probabilities of prompt tokens were asked for; "
            f"at most {limits.MOST_PROMPT_LOGPROBS} come in one answer."
        )
        raise bad_request(message, param=param)


def _bad_words(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Each word as it is spelled and as it stands behind a space. Plain text: no word is a special token."""
    spelled = dict.fromkeys(text for word in words for text in (word, f" {word.lstrip(' ')}"))
    found = dict.fromkeys(tuple(ids) for ids in tokenizer.encode_plain_batch(list(spelled))) if spelled else ()
    return tuple(ids for ids in found if ids)


def _allowed(fields: SamplingFields, bad_words: Sequence[Sequence[int]], serving: Serving) -> bytes | None:
    if fields.allowed_token_ids is None:
        return None
    check_token_ids(fields.allowed_token_ids, serving.info.vocab_size, "allowed_token_ids")
    allowed = set(fields.allowed_token_ids)
    banned = {word[0] for word in bad_words if len(word) == 1}
    if fields.min_tokens:
        banned |= {serving.info.eos_token_id, *fields.stop_token_ids}
    if allowed <= banned:
        message = "allowed_token_ids: every allowed token is excluded by bad_words or min_tokens."
        raise bad_request(message, param="allowed_token_ids")
    return pack_ids(sorted(allowed))


def _forced(budget: int | None, tokenizer: Tokenizer) -> ForcedToken | None:
    if budget is None or budget < 0:
        return None
    calls = tokenizer.special_id(DSML)
    # A call that begins inside reasoning ends it too.
    unless = () if calls is None else (calls,)
    return ForcedToken(token_id=tokenizer.required_id(END_OF_REASONING), after=budget, unless=unless)
