"""The model's vocabulary as the grammar library sees it: made once from `tokenizer.json`, shared by every matcher."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from engine.vocabulary import piece_bytes

LIMITS = LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=2_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=250_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
"""Bounds of one matcher: a mask ends within tens of milliseconds of CPU time, compiling within some hundred; what needs
more is an error of its request. Errors hold no text of the answer."""

_MOST_ROWS = 64


class GrammarTokens:
    """Which bytes each token id stands for, and which ids a grammar may only name, never match as text.

    Text matches ordinary tokens alone: an id of the added vocabulary stands where a grammar says so by number, and ids
    that have no token never stand anywhere.
    """

    def __init__(self, definition: dict[str, Any], *, vocab_size: int, eos_token_id: int) -> None:
        """`definition` is the parsed `tokenizer.json`; `vocab_size` the width of the logits."""
        table = [b""] * vocab_size
        for piece, token_id in definition["model"]["vocab"].items():
            table[token_id] = piece_bytes(piece)
        added = {entry["id"]: entry["content"] for entry in definition["added_tokens"]}
        for token_id, name in added.items():
            table[token_id] = name.encode()
        marked = {*added, *(token_id for token_id, text in enumerate(table) if not text)}
        for token_id in marked - added.keys():
            # The library takes tokens of no bytes for a beginning of every marker.
            table[token_id] = b"<no token %d>" % token_id
        self.vocab_size = vocab_size
        self.eos_token_id = eos_token_id
        self.num_words = (vocab_size + 31) // 32
        """int32 words of a mask: bit b of word w is token 32 w + b."""
        self.plain_W = _bits(set(range(vocab_size)) - marked, self.num_words)
        """int32 [words]: every ordinary token."""
        self._rows_W: dict[tuple[int, ...], np.ndarray] = {}
        plain = {**definition, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        vocabulary = _Vocabulary(table, sorted(marked), eos_token_id, tokenizers.Tokenizer.from_str(json.dumps(plain)))
        self.library = LLTokenizer(TokenizerWrapper(vocabulary), n_vocab=vocab_size, eos_token=eos_token_id)

    @classmethod
    def load(cls, model_dir: Path, *, vocab_size: int, eos_token_id: int) -> "GrammarTokens":
        """Raises OSError or ValueError when there is no readable `tokenizer.json`."""
        definition = json.loads((model_dir / "tokenizer.json").read_bytes())
        return cls(definition, vocab_size=vocab_size, eos_token_id=eos_token_id)

    def matcher(self, text: str) -> LLMatcher:
        """Compile a grammar; the result may be in an error state."""
        return LLMatcher(self.library, text, log_level=0, limits=LIMITS)

    def row(self, *more: int) -> np.ndarray:
        """int32 [words]: the ordinary tokens and some more ids; not to be written to."""
        row_W = self._rows_W.get(more)
        if row_W is None:
            if len(self._rows_W) >= _MOST_ROWS:
                self._rows_W.clear()
            row_W = self._rows_W[more] = self.plain_W | _bits(set(more), self.num_words)
        return row_W


class _Vocabulary:
    """What the library asks of a tokenizer. It encodes text that a grammar leaves no choice about, so that forced text
    has the tokens that the prompt would have."""

    def __init__(self, tokens: list[bytes], special: list[int], eos: int, plain: tokenizers.Tokenizer) -> None:
        self.eos_token_id = eos
        self.bos_token_id = None
        self.tokens = tokens
        self.special_token_ids = special
        self._plain = plain

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids


def _bits(token_ids: set[int], num_words: int) -> np.ndarray:
    flags = np.zeros(32 * num_words, dtype=np.uint8)
    flags[list(token_ids)] = 1
    return np.packbits(flags, bitorder="little").view("<i4").astype(np.int32)
