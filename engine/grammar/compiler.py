"""Grammars to matchers, off the step loop: compiled once on worker threads, copied for every request after that."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llguidance import LLMatcher

from engine.grammar.matcher import GrammarMatcher
from engine.grammar.tokens import GrammarTokens
from engine.messages import Grammar

logger = logging.getLogger(__name__)

CACHE_BYTES = 256 << 20
COPY_BYTES = 128 << 10
"""What a request's own place in a grammar takes, about; the rest is shared."""
_BASE_BYTES = 256 << 10
_BYTES_PER_CHARACTER = 64
_NUM_THREADS = 2


class GrammarError(ValueError):
    """A grammar that this engine cannot follow; the text may be read by a client."""


class GrammarCompiler:
    """One for each engine. The vocabulary is read when the first grammar comes, or by `warm`."""

    def __init__(self, model_dir: str, *, vocab_size: int, eos_token_id: int, cache_bytes: int = CACHE_BYTES) -> None:
        self._model_dir = model_dir
        self._vocab_size = vocab_size
        self._eos_token_id = eos_token_id
        self._cache_bytes = cache_bytes
        self._tokens: GrammarTokens | None = None
        self._tokens_lock = threading.Lock()
        self._cache_lock = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._used_bytes = 0
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="grammar")

    @property
    def used_bytes(self) -> int:
        """Of the compiled grammars that are kept; an estimate, the library does not say."""
        return self._used_bytes

    def warm(self) -> None:
        """Read the vocabulary in the background, so that the first grammar need not wait for it."""
        if self._model_dir and (Path(self._model_dir) / "tokenizer.json").exists():
            self._threads.submit(self.tokens)

    def find(self, grammar: Grammar) -> GrammarMatcher | None:
        """A matcher at the start of a grammar that is compiled already."""
        if self._tokens is None:
            return None
        if not grammar.text:
            return GrammarMatcher(self._tokens, grammar, None)
        with self._cache_lock:
            compiled = self._compiled.get(grammar.text)
            if compiled is None:
                return None
            self._compiled.move_to_end(grammar.text)
            return GrammarMatcher(self._tokens, grammar, compiled.deep_copy())

    def start(self, grammar: Grammar, done: Callable[[GrammarMatcher | GrammarError], None]) -> None:
        """Compile on a worker thread and call `done` there."""

        def run() -> None:
            try:
                done(self.compile(grammar))
            except GrammarError as error:
                done(error)
            except Exception:
                logger.exception("a grammar could not be compiled")
                done(GrammarError("The engine could not compile the grammar of this request."))

        self._threads.submit(run)

    def compile(self, grammar: Grammar) -> GrammarMatcher:
        """Raises GrammarError."""
        tokens = self.tokens()
        named = grammar.markers if grammar.after is None else (grammar.after, *grammar.markers)
        if any(not 0 <= token_id < self._vocab_size for token_id in named):
            raise GrammarError("A token that the grammar names is not in the vocabulary.")
        known = self.find(grammar)
        if known is not None:
            return known
        compiled = tokens.matcher(grammar.text)
        if compiled.is_error():
            raise GrammarError("The engine cannot compile the grammar of this request.")
        with self._cache_lock:
            if grammar.text not in self._compiled:
                self._compiled[grammar.text] = compiled
                self._used_bytes += _size(grammar.text)
            while self._used_bytes > self._cache_bytes and len(self._compiled) > 1:
                text, _ = self._compiled.popitem(last=False)
                self._used_bytes -= _size(text)
        return GrammarMatcher(tokens, grammar, compiled.deep_copy())

    def tokens(self) -> GrammarTokens:
        """Raises GrammarError when the model has no tokenizer that can be read."""
        with self._tokens_lock:
            if self._tokens is None:
                try:
                    self._tokens = GrammarTokens.load(
                        Path(self._model_dir), vocab_size=self._vocab_size, eos_token_id=self._eos_token_id
                    )
                except (OSError, ValueError, KeyError) as error:
                    raise GrammarError("This model has no tokenizer that grammars can use.") from error
            return self._tokens

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _size(text: str) -> int:
    return _BASE_BYTES + _BYTES_PER_CHARACTER * len(text)
