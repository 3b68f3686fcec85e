"""Log probabilities of completions: OpenAI's four columns, for answer and prompt, and vLLM's `prompt_logprobs`."""

import codecs
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.messages import PromptLogprobColumns
from server.generation import LEAST_LOGPROB, TokenLogprob
from server.text.tokenizer import Tokenizer

Columns = dict[str, list[Any]]
_CONTINUATION = frozenset(bytes([byte]) for byte in range(0x80, 0xC0))


class PromptScores:
    """Log probabilities of one prompt's tokens; the first token has none."""

    def __init__(self, prompt_ids: np.ndarray, columns: PromptLogprobColumns, tokenizer: Tokenizer) -> None:
        num_rows = len(prompt_ids) - 1
        self._ids: list[int] = prompt_ids.tolist()
        self._tokenizer = tokenizer
        self._logprobs: list[float] = _floats(columns.logprobs).tolist()
        self._ranks: list[int] = np.frombuffer(columns.ranks, dtype="<i4").tolist()
        shape = (num_rows, columns.num_top if num_rows else 0)
        self._top_ids: list[list[int]] = np.frombuffer(columns.top_ids, dtype="<i4").reshape(shape).tolist()
        self._top_logprobs: list[list[float]] = _floats(columns.top_logprobs).reshape(shape).tolist()
        assert len(self._logprobs) == len(self._ranks) == num_rows

    def echoed(self, num_top: int, *, as_ids: bool) -> Columns:
        """OpenAI's columns of the prompt."""
        names = [token_name(i, self._tokenizer, as_ids) for i in self._ids]
        offsets = []
        decoder, num_chars = codecs.getincrementaldecoder("utf-8")("replace"), 0
        for token_id in self._ids:
            raw = self._tokenizer.bytes_table[token_id]
            # The beginning of a character that this token does not go on with is a character (U+FFFD) in front of it.
            broken = bool(decoder.getstate()[0]) and raw[:1] not in _CONTINUATION
            offsets.append(num_chars + broken)
            num_chars += len(decoder.decode(raw))
        tops: list[dict[str, float] | None] = [None]
        for name, logprob, ids, logprobs in zip(
            names[1:], self._logprobs, self._top_ids, self._top_logprobs, strict=True
        ):
            pairs = zip(ids[:num_top], logprobs[:num_top], strict=True)
            tops.append({**{token_name(i, self._tokenizer, as_ids): value for i, value in pairs}, name: logprob})
        return {
            "tokens": names,
            "token_logprobs": [None, *self._logprobs],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def by_id(self, num_top: int) -> list[dict[str, dict[str, Any]] | None]:
        """vLLM's shape: for each token of the prompt the likeliest ones and itself, by id."""
        rows: list[dict[str, dict[str, Any]] | None] = [None]
        for n, token_id in enumerate(self._ids[1:]):
            row = {
                str(i): self._entry(i, logprob, rank)
                for rank, (i, logprob) in enumerate(
                    zip(self._top_ids[n][:num_top], self._top_logprobs[n][:num_top], strict=True), 1
                )
            }
            row.setdefault(str(token_id), self._entry(token_id, self._logprobs[n], self._ranks[n]))
            rows.append(row)
        return rows

    def _entry(self, token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": logprob, "rank": rank, "decoded_token": token_name(token_id, self._tokenizer, False)}


def answer_columns(rows: Sequence[TokenLogprob], *, as_ids: bool, behind: int = 0) -> Columns:
    """OpenAI's columns of an answer that stands `behind` so many characters of prompt. The sampled token is always
    among its `top_logprobs`."""
    return {
        "tokens": [_name(row, as_ids) for row in rows],
        "token_logprobs": [row.logprob for row in rows],
        "top_logprobs": [
            {**{_name(t, as_ids): t.logprob for t in row.top}, _name(row, as_ids): row.logprob} for row in rows
        ],
        "text_offset": [row.text_offset + behind for row in rows],
    }


def joined(first: Columns | None, second: Columns) -> Columns:
    return second if first is None else {name: first[name] + second[name] for name in second}


def token_name(token_id: int, tokenizer: Tokenizer, as_ids: bool) -> str:
    """The token's own text (U+FFFD where it holds part of a character), or `token_id:N`."""
    return f"token_id:{token_id}" if as_ids else tokenizer.bytes_table[token_id].decode("utf-8", "replace")


def _name(row: Any, as_ids: bool) -> str:
    name: str = f"token_id:{row.token_id}" if as_ids else row.token
    return name


def _floats(raw: bytes) -> np.ndarray:
    """Minus infinity becomes a number: JSON has no word for it."""
    floats: np.ndarray = np.maximum(np.frombuffer(raw, dtype="<f4"), LEAST_LOGPROB)
    return floats
