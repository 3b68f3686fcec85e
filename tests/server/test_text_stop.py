"""Stop strings: any cut of the text gives the same answer, at a cost that does not explode."""

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.stop import StopMatcher


def stream(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    out = ""
    for piece in pieces:
        out += matcher.push(piece)
        if matcher.matched is not None:
            return out, matcher.matched
    return out + matcher.flush(), None


def expected(stops: list[str], text: str) -> tuple[str, str | None]:
    """By definition: look at every end, and among the stops that end there take the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


SMALL = st.text("ab", min_size=1, max_size=6)


@given(st.lists(SMALL, min_size=1, max_size=5), st.lists(st.text("ab", max_size=5) | st.text("abc", max_size=9)))
@settings(max_examples=1000, deadline=None)
def test_any_cut_equals_the_definition(stops: list[str], pieces: list[str]) -> None:
    assert stream(stops, pieces) == expected(stops, "".join(pieces))


def test_every_split_of_a_stop_string() -> None:
    text = "before <|stop|> behind"
    for a in range(len(text) + 1):
        for b in range(a, len(text) + 1):
            assert stream(["<|stop|>"], [text[:a], text[a:b], text[b:]]) == ("before ", "<|stop|>")


def test_the_first_complete_stop_wins_then_the_longest() -> None:
    assert stream(["abd", "bca"], ["abcabd"]) == ("a", "bca")
    assert stream(["d", "cd", "bcd"], ["abcd"]) == ("a", "bcd")
    assert stream(["xyz", "y"], list("wxyz")) == ("wx", "y")


def test_only_what_could_become_a_stop_is_held() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("text\n") == "text"
    assert matcher.num_held == 1
    assert matcher.push("\n") == ""
    assert matcher.push("\n") == "\n"
    assert matcher.push("Us") == ""
    assert matcher.push("x") == "\n\nUsx"
    assert matcher.flush() == ""


def test_time_is_linear_in_stops_and_text() -> None:
    stops = ["a" * (1023 - n) + "b" for n in range(16)]

    def seconds(count: int) -> float:
        start = time.process_time()
        out = stream(stops, ["aaa"] * count)
        assert out == ("aaa" * count, None)
        return time.process_time() - start

    small, large = (min(seconds(n) for _ in range(4)) for n in (1000, 4000))
    assert large < 8 * small + 0.05
