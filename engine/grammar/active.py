"""The matchers of the requests that an engine has, queued and running. A preemption does not touch them: a matcher
stands behind the tokens known, and those stay."""

from collections.abc import Sequence

from engine.grammar.masks import MaskFiller, TokenMasks
from engine.grammar.matcher import GrammarMatcher


class ActiveGrammars:
    """Kept by the scheduler, by request id; requests without a grammar are not in it."""

    def __init__(self) -> None:
        self._matchers: dict[str, GrammarMatcher] = {}
        self._filler: MaskFiller | None = None

    def __len__(self) -> int:
        return len(self._matchers)

    @property
    def request_ids(self) -> frozenset[str]:
        return frozenset(self._matchers)

    def add(self, request_id: str, matcher: GrammarMatcher) -> None:
        """From now on the request's tokens follow `matcher`, which stands at its first token."""
        self._matchers[request_id] = matcher

    def remove(self, request_id: str) -> None:
        """The request has ended; ids that are not known are ignored."""
        self._matchers.pop(request_id, None)

    def fill(self, request_ids: Sequence[str]) -> TokenMasks | None:
        """Begin to fill the masks of those that have a grammar, for the token after the last one known."""
        if not self._matchers:
            return None
        wanted = [(i, self._matchers[i]) for i in request_ids if i in self._matchers]
        if not wanted:
            return None
        if self._filler is None:
            self._filler = MaskFiller()
        return self._filler.fill(wanted)

    def advance(self, request_id: str, token_id: int) -> bool:
        """Take a sampled token; False when it cannot stand there."""
        matcher = self._matchers.get(request_id)
        return matcher is None or matcher.advance(token_id)

    def has_ended(self, request_id: str) -> bool:
        """Nothing can follow in the request's grammar."""
        matcher = self._matchers.get(request_id)
        return matcher is not None and matcher.is_done

    def complaint(self, request_id: str) -> str | None:
        """One sentence for the client when the request's grammar cannot go on."""
        matcher = self._matchers.get(request_id)
        if matcher is None or matcher.error is None:
            return None
        return f"The answer could not be kept in its grammar ({matcher.error})."

    def close(self) -> None:
        if self._filler is not None:
            self._filler.close()
