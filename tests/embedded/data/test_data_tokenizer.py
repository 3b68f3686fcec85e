"""The trained tokenizer: its size, its ids, its structure."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedded.data.stream import PAD_ID
from embedded.data.words import COMMON, FOREIGN
from embedded.tokenizer import VOCAB_SIZE, main, save_embedded_tokenizer
from model.tools.byte_tokenizer import NUM_TOKENS, SPECIAL_TOKENS, byte_tokenizer
from server.text.tokenizer import Tokenizer


def test_every_id_below_2048_is_a_token_and_none_above(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    definition = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    ids = set(definition["model"]["vocab"].values()) | {entry["id"] for entry in definition["added_tokens"]}
    assert ids == set(range(VOCAB_SIZE))
    assert VOCAB_SIZE == 2048
    assert all(tokenizer.bytes_table)
    assert len(set(tokenizer.bytes_table)) == VOCAB_SIZE
    with pytest.raises(ValueError, match="below the model's vocab_size 2047"):
        Tokenizer.load(tokenizer_dir, VOCAB_SIZE - 1)


def test_special_tokens_are_those_of_the_byte_tokenizer(tokenizer: Tokenizer) -> None:
    plain = Tokenizer(json.loads(byte_tokenizer().to_str()), NUM_TOKENS)
    moved = VOCAB_SIZE - NUM_TOKENS
    for name in SPECIAL_TOKENS:
        before = plain.required_id(name)
        assert tokenizer.special_id(name) == (before if before < 3 else before + moved)
        assert (tokenizer.required_id(name) in tokenizer.hidden_ids) == (before in plain.hidden_ids)
    assert tokenizer.special_id("<｜▁pad▁｜>") == PAD_ID == 2


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_byte_is_a_token(tokenizer: Tokenizer) -> None:
    singles = {tokenizer.token_bytes(token_id) for token_id in range(3, 259)}
    assert singles == {bytes([byte]) for byte in range(256)}
    for text in FOREIGN:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_stand_alone_and_common_words_are_whole(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode([token_id]) for token_id in tokenizer.encode("a 4417+85")] == [*"a 4417+85"]
    for token_id in range(259, VOCAB_SIZE):
        piece = tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        assert not any(c.isdigit() for c in piece), piece
    whole = [word for word in COMMON if word.islower() and len(tokenizer.encode(f" {word}")) == 1]
    assert len(whole) > 0.8 * sum(word.islower() for word in COMMON)


def test_the_same_texts_give_the_same_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_embedded_tokenizer(tmp_path / name, examples=12)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    config = json.loads((tmp_path / "one" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["eos_token"]["content"] == "<｜end▁of▁sentence｜>"


def test_the_command_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "out_dir" in capsys.readouterr().err
