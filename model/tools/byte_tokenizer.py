"""Tokenizers for small models: 256 byte symbols, merges and V4's special tokens, in the official file's structure.

    0 BOS   1 EOS   2 pad   3 .. 258 bytes   259 .. merges   special tokens, in the official order

Random models take no merges: a text's tokens are its UTF-8 bytes. Decoding gives every text back. Programs find special
ids by name; spellings and flags are those of the V4 tokenizer (chat-protocol, sections 1.1 and 5).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
_FIRST_BYTE_ID = 3

_MARKERS = (
    *(f"<｜fim▁{part}｜>" for part in ("hole", "begin", "end")),
    "<｜User｜>",
    "<｜Assistant｜>",
    "<|EOT|>",
    *(f"<｜tool▁{part}｜>" for part in ("calls▁begin", "calls▁end", "call▁begin", "call▁end")),
    *(f"<｜tool▁{part}｜>" for part in ("outputs▁begin", "outputs▁end", "output▁begin", "output▁end", "sep")),
    *(f"<｜{edge}▁of▁{part}｜>" for part in ("repo▁name", "file▁name", "file") for edge in ("begin", "end")),
    "<think>",
    "</think>",
    "｜DSML｜",
    "<｜begin▁sys｜>",
    "<｜end▁sys｜>",
    "<｜latest_reminder｜>",
    *(f"<｜{task}｜>" for task in ("action", "query", "authority", "domain", "task", "political", "entity", "title")),
    *(f"<｜{task}｜>" for task in ("safety", "answer", "search")),
    "<dsml:",
    "</dsml:",
    *(f"<｜{part}｜>" for part in ("search▁begin", "search▁end", "extracted_url", "read_url")),
)
"""Added tokens that are not `special`: they survive skip_special_tokens."""
_END_OF_QUERY = "<｜end_of_query｜>"

SPECIAL_TOKENS = (BOS, EOS, PAD, *_MARKERS, _END_OF_QUERY)
NUM_TOKENS = len(SPECIAL_TOKENS) + 256
"""Ids without merges; each merge is one more."""

OFFICIAL_DIGITS = r"\p{N}{1,3}"
# The official splits behind that of digits.
_SPLITS = (
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)


def byte_tokenizer() -> Tokenizer:
    """Build it; NUM_TOKENS ids, which a model's vocabulary must hold."""
    return small_tokenizer(())


def small_tokenizer(merges: Sequence[tuple[str, str]], *, digits: str = OFFICIAL_DIGITS) -> Tokenizer:
    """NUM_TOKENS + len(merges) ids. `merges` are pairs of byte-level pieces, the first ones first; `digits` is the
    pattern of what stays together of a number."""
    vocab = {BOS: 0, EOS: 1, PAD: 2}
    vocab |= {symbol: _FIRST_BYTE_ID + byte for byte, symbol in enumerate(_byte_symbols())}
    vocab |= {left + right: _FIRST_BYTE_ID + 256 + n for n, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizer(digits)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (BOS, EOS, PAD)])
    tokenizer.add_tokens([AddedToken(token, normalized=True, special=False) for token in _MARKERS])
    tokenizer.add_special_tokens([AddedToken(_END_OF_QUERY, normalized=False, special=True)])
    assert tokenizer.get_vocab_size() == NUM_TOKENS + len(merges)
    return tokenizer


def pre_tokenizer(digits: str = OFFICIAL_DIGITS) -> pre_tokenizers.PreTokenizer:
    """What cuts a text into the pieces in which merges happen, and spells their bytes."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (digits, *_SPLITS)]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def save_byte_tokenizer(model_dir: Path, *, model_max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `model_dir`."""
    save_tokenizer(byte_tokenizer(), model_dir, model_max_length=model_max_length)


def save_tokenizer(tokenizer: Tokenizer, model_dir: Path, *, model_max_length: int) -> None:
    """As `save_byte_tokenizer`, for any of the small tokenizers."""
    tokenizer.save(str(model_dir / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": _token_entry(BOS),
        "clean_up_tokenization_spaces": False,
        "eos_token": _token_entry(EOS),
        "model_max_length": model_max_length,
        "pad_token": _token_entry(EOS),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (model_dir / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _token_entry(content: str) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **flags}


def _byte_symbols() -> list[str]:
    """The byte-level alphabet in byte order: printable Latin-1 stands for itself, the others for U+0100 upwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]
