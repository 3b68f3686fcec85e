"""Ids to text as they come: never half a character, and the pieces always add up to the whole."""

import codecs
from collections.abc import Iterable

from server.text.tokenizer import Tokenizer


class Detokenizer:
    """One stream. The pieces of `push` and the last one of `flush` join to `Tokenizer.decode` of all ids."""

    __slots__ = ("_decoder", "_hidden", "_table")

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._table = tokenizer.bytes_table
        self._hidden = tokenizer.hidden_ids if skip_special else frozenset()
        # Keeps at most three bytes of an unfinished character between calls.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is certain now; may be empty. Ids are in [0, vocab_size)."""
        table, hidden = self._table, self._hidden
        return self._decoder.decode(b"".join([table[i] for i in token_ids if i not in hidden]))

    def flush(self) -> str:
        """An unfinished character becomes U+FFFD; the stream starts afresh after it."""
        text = self._decoder.decode(b"", True)
        self._decoder.reset()
        return text
