"""Tags: numbers that stand for rows, and tokens that are a function of a whole history.

    tag of position t = root(salt) + sum over i <= t of mix(token_i, i)          modulo 2^64

So a tag names everything that a row may depend on: the tokens before it, its position and whose cache it may be in.
Sums can be made for all positions of a prompt at once and continued token by token.
"""

from hashlib import blake2b

import numpy as np

from engine.messages import FinishReason, SamplingParams

NOTHING = 0
"""Tag of what was never written, or of what a failure left behind."""
MASK = 2**64 - 1
_A, _B, _C = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def root(salt: str) -> int:
    return int.from_bytes(blake2b(salt.encode(), digest_size=8).digest(), "little")


def history(token_ids: np.ndarray) -> np.ndarray:
    """uint64 [num_tokens]: tags of all positions without the root."""
    x = token_ids.astype(np.uint64) + (np.arange(len(token_ids), dtype=np.uint64) << np.uint64(32)) + np.uint64(_A)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_B)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_C)
    return np.cumsum(x ^ (x >> np.uint64(31)), dtype=np.uint64)


def step(token_id: int, position: int) -> int:
    """What a token adds to the tag before it."""
    return _mix(token_id + (position << 32))


def _mix(x: int) -> int:
    x = (x + _A) & MASK
    x = ((x ^ (x >> 30)) * _B) & MASK
    x = ((x ^ (x >> 27)) * _C) & MASK
    return x ^ (x >> 31)


def sample(tag: int, sampling: SamplingParams, num_output: int, *, eos_token_id: int, vocab_size: int) -> int:
    """The token after a history; `tag` is that of its last position, without the root. One in 32 ends the answer."""
    assert sampling.seed is not None, "the engine draws a seed when the request arrives"
    word = _mix(tag ^ _mix(sampling.seed % 2**64))
    if word >> 59 == 0 and num_output >= sampling.min_tokens and not sampling.ignore_eos:
        return eos_token_id
    token_id = word % vocab_size
    return token_id if token_id != eos_token_id else (token_id + 1) % vocab_size


def answer(
    prompt: np.ndarray, sampling: SamplingParams, *, eos_token_id: int, vocab_size: int, max_model_len: int
) -> tuple[list[int], FinishReason]:
    """What a request must answer, whatever else runs."""
    tag, tokens = int(history(prompt)[-1]), []
    for position in range(len(prompt), len(prompt) + sampling.max_tokens):
        token_id = sample(tag, sampling, len(tokens), eos_token_id=eos_token_id, vocab_size=vocab_size)
        tokens.append(token_id)
        if token_id == eos_token_id and not sampling.ignore_eos:
            return tokens, "stop"
        if position + 1 >= max_model_len:
            break
        tag = (tag + step(token_id, position)) & MASK
    return tokens, "length"
