"""The model's byte-level BPE tokenizer: text to ids without special ids by accident, ids to bytes without loss.

Two readings of the same `tokenizer.json` are kept. The plain one has no added vocabulary, so that text which merely
spells `<｜User｜>` becomes ordinary tokens; the full one matches the added vocabulary, for callers who ask for it.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from engine.vocabulary import piece_bytes

REQUIRED_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
)
"""What every V4 prompt and answer needs; ids are always found by these names."""


class TokenizerError(ValueError):
    """A tokenizer file that cannot serve this model: says file, field, what was expected and what was found."""


class Tokenizer:
    """Made by `load`. `vocab_size` is the width of the model's logits, so ids without a token may exist below it."""

    def __init__(self, definition: dict[str, Any], vocab_size: int, source: str = "tokenizer.json") -> None:
        """`definition` is the parsed `tokenizer.json`; raises TokenizerError when it does not fit `vocab_size`."""
        added, vocab = _added_tokens(definition, source), _vocabulary(definition, source)
        self._full = _build({**definition, "post_processor": None, "truncation": None, "padding": None}, source)
        self._plain = _build(
            {**definition, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}, source
        )
        names = {**{piece: (token_id, False) for piece, token_id in vocab.items()}, **added}
        highest = max(token_id for token_id, _ in names.values())
        if highest >= vocab_size:
            raise TokenizerError(
                f"{source}: expected token ids below the model's vocab_size {vocab_size}, found {highest}"
            )
        self.vocab_size = vocab_size
        self._special_ids = {name: token_id for name, (token_id, _) in added.items()}
        for name, token_id in self._special_ids.items():
            # The library counts on from the vocabulary's size when a token is not part of it, whatever the file says.
            if (found := self._full.token_to_id(name)) != token_id:
                raise TokenizerError(f"{source}: added_tokens: {name} says id {token_id} but is read as {found}")
        missing = [name for name in REQUIRED_TOKENS if name not in self._special_ids]
        if missing:
            raise TokenizerError(f"{source}: added_tokens: expected {', '.join(missing)}, found no such token")
        self.added_ids = frozenset(self._special_ids.values())
        """Ids of the added vocabulary."""
        self.hidden_ids = frozenset(token_id for token_id, special in added.values() if special)
        """Ids that text for a reader leaves out: the file's `special` tokens (BOS, EOS, padding, place holders)."""
        table = [b""] * vocab_size
        for piece, token_id in vocab.items():
            table[token_id] = piece_bytes(piece)
        for name, token_id in self._special_ids.items():
            table[token_id] = name.encode()
        self.bytes_table: Sequence[bytes] = table
        """`token_bytes` of every id, for loops that cannot afford a call; length vocab_size."""

    @classmethod
    def load(cls, model_dir: Path, vocab_size: int) -> "Tokenizer":
        """The tokenizer of a model directory. Raises TokenizerError naming file and field."""
        path = Path(model_dir) / "tokenizer.json"
        try:
            definition = json.loads(path.read_bytes())
        except OSError as error:
            raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise TokenizerError(f"{path}: expected JSON: {error}") from error
        if not isinstance(definition, dict):
            raise TokenizerError(f"{path}: expected a JSON object, found {type(definition).__name__}")
        return cls(definition, vocab_size, str(path))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`; nothing is added in front or behind.

        special=False treats the whole text as plain text; special=True matches the added vocabulary in it. Raises
        UnicodeEncodeError (a ValueError) on lone surrogates. Large texts release the interpreter lock.
        """
        tokenizer = self._full if special else self._plain
        return list(tokenizer.encode_batch_fast([_checked(text)], add_special_tokens=False)[0].ids)

    def encode_plain_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text as plain text, in one call."""
        encodings = self._plain.encode_batch_fast([_checked(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `token_ids`; bytes that are not UTF-8 become U+FFFD. Raises ValueError on an id out of range."""
        table, hidden = self.bytes_table, self.hidden_ids if skip_special else frozenset()
        pieces = []
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"token id {token_id} is not in [0, {self.vocab_size})")
            if token_id not in hidden:
                pieces.append(table[token_id])
        return b"".join(pieces).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one id stands for; empty for an id without a token. Raises ValueError on an id out of range."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is not in [0, {self.vocab_size})")
        return self.bytes_table[token_id]

    def special_id(self, name: str) -> int | None:
        """The id of a token of the added vocabulary, by its exact spelling."""
        return self._special_ids.get(name)

    def required_id(self, name: str) -> int:
        """As `special_id`, for the names of REQUIRED_TOKENS."""
        return self._special_ids[name]


def _checked(text: str) -> str:
    if not text.isascii():
        text.encode()
    return text


def _build(definition: dict[str, Any], source: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{source}: not a tokenizer that the tokenizers library can read: {error}") from error


def _added_tokens(definition: dict[str, Any], source: str) -> dict[str, tuple[int, bool]]:
    """Spelling to (id, special)."""
    added = {}
    entries = definition.get("added_tokens")
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not _is_id(entry.get("id")):
            raise TokenizerError(f"{source}: added_tokens: expected objects with id and content, found {entry!r:.80}")
        added[entry["content"]] = (entry["id"], entry.get("special") is True)
    return added


def _vocabulary(definition: dict[str, Any], source: str) -> dict[str, int]:
    model = definition.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        found = model.get("type") if isinstance(model, dict) else model
        raise TokenizerError(f"{source}: model.type: expected BPE, found {found!r:.80}")
    decoder = definition.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        # Any other decoder gives tokens other bytes than the table below.
        found = decoder.get("type") if isinstance(decoder, dict) else decoder
        raise TokenizerError(f"{source}: decoder.type: expected ByteLevel, found {found!r:.80}")
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab or not all(_is_id(token_id) for token_id in vocab.values()):
        raise TokenizerError(f"{source}: model.vocab: expected an object of token ids")
    return vocab


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
