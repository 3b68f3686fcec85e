"""One request in its grammar: free before, bound behind, and back again exactly."""

import json
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLParserLimits

from engine.grammar.masks import MaskFiller
from engine.grammar.matcher import GrammarMatcher
from engine.grammar.tokens import GrammarTokens
from engine.messages import Grammar

MakeMatcher = Callable[..., GrammarMatcher]
EOS, FIRST_BYTE = 1, 3
OBJECT = json.dumps(
    {
        "grammars": [
            {
                "json_schema": {
                    "type": "object",
                    "properties": {"name": {"type": "string", "maxLength": 9}, "n": {"type": "integer"}},
                    "required": ["name"],
                }
            }
        ]
    }
)


def spell(text: str) -> list[int]:
    return [FIRST_BYTE + byte for byte in text.encode()]


def ids(row_W: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(row_W.view(np.uint8), bitorder="little")).tolist()


@pytest.fixture(scope="module")
def filler() -> MaskFiller:
    return MaskFiller(2)


def masks(filler: MaskFiller, *matchers: GrammarMatcher) -> tuple[list[list[int]], dict[int, str]]:
    rows = filler.fill([(str(n), m) for n, m in enumerate(matchers)]).wait()
    return [ids(row) for row in rows.mask_NW], rows.failed


def test_text_matches_ordinary_tokens_only(
    byte_tokens: GrammarTokens, make_matcher: MakeMatcher, filler: MaskFiller
) -> None:
    ((free,), failed) = masks(filler, make_matcher("start: /(?s:.*)/"))
    assert not failed
    # Bytes that begin no UTF-8 character are not text; nothing beyond the bytes and the end is allowed.
    assert set(free) <= {EOS, *range(FIRST_BYTE, FIRST_BYTE + 256)} and {EOS, *spell("a<\n")} <= set(free)
    assert ids(byte_tokens.plain_W) == list(range(FIRST_BYTE, FIRST_BYTE + 256))


def test_a_special_tokens_spelling_is_text(
    official_tokens: GrammarTokens, make_matcher: MakeMatcher, filler: MaskFiller
) -> None:
    matcher = make_matcher('start: "<｜User｜></think>"', tokens=official_tokens)
    seen = []
    while not matcher.is_done:
        ((row,), _) = masks(filler, matcher)
        seen += row
        assert len(row) == 1 and matcher.advance(row[0])
    assert seen[-1] == 1 and len(seen) > 3
    assert max(seen[:-1]) < 128000


def test_a_token_is_named_by_number(
    make_matcher: MakeMatcher, filler: MaskFiller, special_id: Callable[[str], int]
) -> None:
    dsml = special_id("｜DSML｜")
    matcher = make_matcher(f'start: "<" <[{dsml}]> "x"', markers=(dsml,))
    for token in (*spell("<"), dsml, *spell("x"), EOS):
        assert masks(filler, matcher)[0] == [[token]]
        assert matcher.advance(token)
    assert matcher.is_done


def test_a_marker_that_was_not_granted_never_comes(
    make_matcher: MakeMatcher, filler: MaskFiller, special_id: Callable[[str], int]
) -> None:
    dsml = special_id("｜DSML｜")
    matcher = make_matcher(f'start: <[{dsml}]> | "x"')
    assert masks(filler, matcher)[0] == [spell("x")]


def test_the_answer_is_free_before_its_token(
    make_matcher: MakeMatcher, filler: MaskFiller, special_id: Callable[[str], int]
) -> None:
    after = special_id("</think>")
    matcher = make_matcher('start: "ok"', after)
    for token in spell("any \x00 thing, ok"):
        ((row,), _) = masks(filler, matcher)
        assert row == [*range(FIRST_BYTE, FIRST_BYTE + 256), after]
        assert matcher.advance(token) and not matcher.is_done
    assert matcher.advance(after)
    assert masks(filler, matcher)[0] == [spell("o")]
    for token in (*spell("ok"), EOS):
        assert matcher.advance(token)
    assert matcher.is_done and matcher.error is None


def test_without_text_only_markers_are_excluded(
    make_matcher: MakeMatcher, filler: MaskFiller, special_id: Callable[[str], int]
) -> None:
    plain = make_matcher("")
    assert masks(filler, plain)[0] == [[EOS, *range(FIRST_BYTE, FIRST_BYTE + 256)]]
    assert plain.advance(FIRST_BYTE) and plain.advance(EOS) and not plain.is_done
    later = make_matcher("", special_id("</think>"))
    assert EOS not in masks(filler, later)[0][0]
    assert not later.advance(EOS)


def test_a_token_outside_is_an_error_that_names_no_text(make_matcher: MakeMatcher) -> None:
    matcher = make_matcher('start: "secret"')
    assert matcher.advance(spell("s")[0])
    assert not matcher.advance(spell("x")[0])
    assert matcher.error == "NotInGrammar" and not matcher.is_done


def test_a_matcher_out_of_fuel_fails_alone(
    official_tokens: GrammarTokens, make_matcher: MakeMatcher, filler: MaskFiller
) -> None:
    least = LLParserLimits(step_lexer_fuel=50, step_max_items=50, verbose_errors=False)
    greedy = LLMatcher(official_tokens.library, "start: /(?s:.*)z[^q]{20}/", log_level=0, limits=least)
    matcher = GrammarMatcher(official_tokens, Grammar(text="greedy"), greedy)
    calm = make_matcher('start: "fine"', tokens=official_tokens)
    rows, failed = masks(filler, matcher, calm)
    assert len(rows[1]) == 1 and set(failed) == {0}
    assert failed[0] == matcher.error == "InternalError"


def walk(matcher: GrammarMatcher, filler: MaskFiller, draw: random.Random, most: int) -> list[int]:
    """Random allowed tokens."""
    taken: list[int] = []
    while len(taken) < most and not matcher.is_done:
        ((row,), failed) = masks(filler, matcher)
        assert not failed and row, "a dead end"
        token = draw.choice(row)
        assert matcher.advance(token)
        taken.append(token)
    return taken


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 60), st.integers(1, 12), st.booleans())
def test_rolling_back_leaves_no_trace(
    make_matcher: MakeMatcher, filler: MaskFiller, special_id: Callable[[str], int],
    seed: int, kept: int, drafted: int, thinks: bool,
) -> None:  # fmt: skip
    after = special_id("</think>") if thinks else None
    draw = random.Random(seed)
    matcher, straight = make_matcher(OBJECT, after), make_matcher(OBJECT, after)
    before = walk(matcher, filler, draw, kept)
    for token in before:
        straight.advance(token)
    drafts = walk(matcher, filler, draw, drafted)
    matcher.rollback(len(drafts))
    assert masks(filler, matcher)[0] == masks(filler, straight)[0]
    for token in walk(straight, filler, draw, 8):
        assert matcher.advance(token)
    assert matcher.is_done == straight.is_done and masks(filler, matcher)[0] == masks(filler, straight)[0]


def test_masks_are_the_same_alone_and_together(make_matcher: MakeMatcher, filler: MaskFiller) -> None:
    matchers = [make_matcher(OBJECT) for _ in range(12)]
    for n, matcher in enumerate(matchers):
        walk(matcher, filler, random.Random(n), 3 * n)
    together = masks(filler, *matchers)[0]
    assert together == [masks(filler, matcher)[0][0] for matcher in matchers]
