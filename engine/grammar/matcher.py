"""Where one request stands in its grammar. Tokens before `Grammar.after` are free, those behind it follow the text."""

import numpy as np
from llguidance import LLMatcher

from engine.grammar.tokens import GrammarTokens
from engine.messages import Grammar


class GrammarMatcher:
    """Follows the tokens of one answer. Not safe for two threads: while a mask is filled nothing else may touch it.

    free      (with `after`) any ordinary token, or `after`; neither the end nor a marker can be sampled
    matching  what the grammar allows; the end of sequence token exactly where it may stop
    plain     (no text) any ordinary token, or the end
    """

    def __init__(self, tokens: GrammarTokens, grammar: Grammar, compiled: LLMatcher | None) -> None:
        """`compiled` is the grammar's own matcher at its start, None when the grammar has no text."""
        self._tokens = tokens
        self._grammar = grammar
        self._matcher = compiled
        self._num_free = 0
        """Tokens up to and with `after`."""
        self._num_matched = 0
        self._end: int | None = None
        """`_num_matched` behind the end of sequence token."""
        self._is_free = grammar.after is not None
        self._failed = False

    @property
    def num_words(self) -> int:
        return self._tokens.num_words

    @property
    def library(self) -> LLMatcher | None:
        """What fills the mask of the next token; None where `fixed_row` has it."""
        return None if self._is_free else self._matcher

    @property
    def fixed_row(self) -> np.ndarray:
        """int32 [words]: the mask of a token that the text says nothing about."""
        if self._is_free:
            assert self._grammar.after is not None
            return self._tokens.row(self._grammar.after)
        return self._tokens.row(self._tokens.eos_token_id)

    @property
    def widest_row(self) -> np.ndarray:
        """int32 [words]: tokens that the text may use at all."""
        return self._tokens.row(self._tokens.eos_token_id, *self._grammar.markers)

    @property
    def is_done(self) -> bool:
        """The grammar has ended, with the end of sequence token."""
        return self._num_matched == self._end

    @property
    def error(self) -> str | None:
        """Why no token can follow; a reason of the library's list, without text of grammar or answer."""
        if self._failed:
            return "NotInGrammar"
        matcher = self.library
        return matcher.stop_reason() if matcher is not None and matcher.is_error() else None

    def advance(self, token_id: int) -> bool:
        """Take the next token of the answer; False when it cannot stand there, which no masked sampler picks."""
        if self._is_free:
            self._num_free += 1
            self._is_free = token_id != self._grammar.after
            self._failed |= token_id == self._tokens.eos_token_id
        elif self._matcher is not None:
            # Asked first: a token that is refused would leave the matcher in an error state, past rolling back.
            ends = token_id == self._tokens.eos_token_id
            fits = self._matcher.is_accepting() if ends else self._matcher.validate_tokens([token_id]) == 1
            if fits and self._end is None and self._matcher.consume_token(token_id):
                self._num_matched += 1
                if ends:
                    self._end = self._num_matched
            else:
                self._failed = True
        else:
            self._num_matched += 1
        return not self._failed

    def rollback(self, num_tokens: int) -> None:
        """Forget the last tokens, drafts that were not accepted among them."""
        assert num_tokens <= self._num_free + self._num_matched, "more tokens than there were"
        matched = min(num_tokens, self._num_matched)
        if matched and self._matcher is not None:
            assert self._matcher.rollback(matched), "the library refuses to roll back"
        self._num_matched -= matched
        if self._end is not None and self._num_matched < self._end:
            self._end = None
        self._num_free -= num_tokens - matched
        if num_tokens > matched:
            self._is_free = True
