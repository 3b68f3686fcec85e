"""Grammars as the checking process writes them, on the small tokenizer: byte b is token 3 + b."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llguidance import LLMatcher

from engine.grammar.tokens import GrammarTokens
from model.tools.byte_tokenizer import save_byte_tokenizer
from server.grammar.messages import GrammarJob
from server.grammar.worker import Checker
from server.text.tokenizer import Tokenizer

VOCAB_SIZE = 512


@pytest.fixture(scope="session")
def grammar_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("grammar-model")
    save_byte_tokenizer(directory, model_max_length=4096)
    return directory


@pytest.fixture(scope="session")
def tokenizer(grammar_model: Path) -> Tokenizer:
    return Tokenizer.load(grammar_model, VOCAB_SIZE)


@pytest.fixture(scope="session")
def tokens(grammar_model: Path) -> GrammarTokens:
    return GrammarTokens.load(grammar_model, vocab_size=VOCAB_SIZE, eos_token_id=1)


@pytest.fixture(scope="session")
def checker(tokens: GrammarTokens) -> Checker:
    return Checker(tokens)


@pytest.fixture(scope="session")
def marker(tokenizer: Tokenizer) -> int:
    found = tokenizer.special_id("｜DSML｜")
    assert found is not None
    return found


@pytest.fixture(scope="session")
def compiled(tokens: GrammarTokens, checker: Checker) -> Callable[..., LLMatcher]:
    """The matcher of a job, which must have a grammar; compiled once."""
    known: dict[bytes, LLMatcher] = {}

    def make(**job: Any) -> LLMatcher:
        key = msgspec.json.encode(job)
        if key not in known:
            known[key] = new(**job)
        return known[key]

    def new(**job: Any) -> LLMatcher:
        answer = checker.answer(GrammarJob(**{"format_param": "schema", **job}))
        assert answer.grammar is not None, answer.refusal
        matcher = tokens.matcher(answer.grammar.text)
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    return make


@pytest.fixture(scope="session")
def refused(checker: Checker) -> Callable[..., str]:
    """Why a job has no grammar."""

    def make(**job: Any) -> str:
        answer = checker.answer(GrammarJob(**{"format_param": "schema", **job}))
        assert answer.refusal is not None, answer.grammar
        return answer.refusal.message

    return make


@pytest.fixture(scope="session")
def accepts(tokenizer: Tokenizer) -> Callable[[LLMatcher, str], bool]:
    """Whether a text, its markers being tokens, is a whole answer of a matcher at its start."""

    def check(matcher: LLMatcher, text: str) -> bool:
        copy = matcher.deep_copy()
        return copy.consume_tokens(tokenizer.encode(text, special=True)) and copy.is_accepting()

    return check
