"""Stop strings in a stream: found across every cut, in linear time, and never delivered."""

from collections.abc import Sequence


class StopMatcher:
    """Watches one text. The stop string that is complete first wins; of those that end together, the longest.

    Text is held back only while it could be the beginning of a stop string.
    """

    __slots__ = ("_held", "_patterns", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are not empty strings."""
        assert all(stops)
        self.matched: str | None = None
        """The stop string that ended the text."""
        self._patterns = [_Pattern(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._held = ""

    @property
    def num_held(self) -> int:
        """Characters held back."""
        return len(self._held)

    def push(self, text: str) -> str:
        """What may be delivered now. Once `matched` is set this was the last of it, and the stop string is left out."""
        assert self.matched is None
        end, longest = len(text), 0
        for pattern in self._patterns:
            stop = pattern.advance(text, end)
            if stop is not None:
                # Patterns are tried from long to short: a later one must end strictly earlier to win.
                self.matched, end = pattern.text, stop - 1
            longest = max(longest, pattern.state)
        whole = self._held + text
        if self.matched is not None:
            cut = len(self._held) + end + 1 - len(self.matched)
            self._held = ""
            return whole[:cut]
        cut = len(whole) - longest
        self._held = whole[cut:]
        return whole[:cut]

    def flush(self) -> str:
        """What was held back, when no text follows."""
        held, self._held = self._held, ""
        return held


class _Pattern:
    """Knuth-Morris-Pratt for one stop string: how many of its characters the text so far ends with."""

    __slots__ = ("_borders", "state", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.state = 0
        # borders[n]: length of the longest proper prefix of text[:n + 1] that is also its suffix.
        self._borders = [0] * len(text)
        length = 0
        for n in range(1, len(text)):
            while length and text[n] != text[length]:
                length = self._borders[length - 1]
            length += text[n] == text[length]
            self._borders[n] = length

    def advance(self, text: str, end: int) -> int | None:
        """Read text[:end]; the index just behind the first match, if there is one."""
        pattern, borders, state = self.text, self._borders, self.state
        n = 0
        while n < end:
            if not state:
                n = text.find(pattern[0], n, end)
                if n < 0:
                    break
                state = 1
            else:
                character = text[n]
                while state and pattern[state] != character:
                    state = borders[state - 1]
                state += pattern[state] == character
            n += 1
            if state == len(pattern):
                return n
        self.state = state
        return None
