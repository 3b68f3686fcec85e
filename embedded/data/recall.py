"""Values by key, from lists and from haystacks; and what to say when they are not there."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from embedded.data.conversation import Turn, conversation, draw_thinking
from embedded.data.example import Example
from embedded.data.facts import LINES, SENTENCES, Fact, as_json, draw_facts, json_entry, question, unanswerable
from embedded.data.filler import sentences
from embedded.data.measure import num_tokens_of
from embedded.data.seeds import generator

SHORTEST, LONGEST = 96, 131072
"""Bounds of `num_tokens`."""
_DEFAULT_TOKENS = (128, 600)
_FRAME_TOKENS, _TURN_TOKENS = 32, 27
"""The template, the question and what introduces the text; a turn more."""
_LEAST_TOKENS, _TOKENS_FOR_A_TURN = 48, 96
_MOST_TURNS, _MOST_NEEDLES = 24, 32
"""Many questions on one long text: each costs a few tokens and teaches as much as the first."""
_IN_SYSTEM_SHARE = 0.1
_PARAGRAPH = 8

_LIST_INTRODUCTIONS = (
    "Here is a list:",
    "This is my list:",
    "Read this list:",
    "Remember these:",
    "The list:",
    "Below are some entries.",
    "I have this data:",
    "Look at these lines:",
)
_TEXT_INTRODUCTIONS = (
    "Read this text:",
    "Here is a text:",
    "Read the text and answer the question.",
    "These are my notes:",
    "The text:",
    "Look at this document:",
    "I found this:",
)


@dataclass(frozen=True, slots=True)
class Text:
    """A text and the facts it holds, each with its depth from 0 (the beginning) to 1."""

    body: str
    facts: Sequence[tuple[float, Fact]]
    absent: Sequence[Fact]


def recall_list(rng: random.Random, num_tokens: int | None) -> Example:
    """One question on a list."""
    wanted = _wanted(rng, num_tokens)
    return _asked(rng, "recall_list", _list(rng, wanted), 1, wanted)


def recall_list_turns(rng: random.Random, num_tokens: int | None) -> Example:
    """Several questions on a list, one after the other."""
    wanted = _wanted(rng, num_tokens)
    num_turns = _num_turns(rng, wanted)
    return _asked(rng, "recall_list_turns", _list(rng, wanted, num_turns), num_turns, wanted)


def recall_haystack(rng: random.Random, num_tokens: int | None) -> Example:
    """One question on prose with facts in it."""
    wanted = _wanted(rng, num_tokens)
    return _asked(rng, "recall_haystack", _haystack(rng, wanted), 1, wanted)


def recall_haystack_turns(rng: random.Random, num_tokens: int | None) -> Example:
    """Several questions on prose with facts in it."""
    wanted = _wanted(rng, num_tokens)
    num_turns = _num_turns(rng, wanted)
    return _asked(rng, "recall_haystack_turns", _haystack(rng, wanted, num_turns), num_turns, wanted)


def unknown(rng: random.Random, num_tokens: int | None) -> Example:
    """A question for what the text does not state; sometimes after one for what it does."""
    wanted = _wanted(rng, num_tokens)
    text = (_list if rng.random() < 0.5 else _haystack)(rng, wanted)
    thinking = draw_thinking(rng)
    turns = []
    if rng.random() < 0.3:
        turns.append(question(rng, rng.choice(text.facts)[1], thinking=thinking))
    turns.append(unanswerable(rng, text.absent[0], thinking=thinking))
    return _conversation(rng, "unknown", text, turns, thinking, {"tokens": wanted})


def haystack_questions(seed: int, index: int, *, num_tokens: int, num_questions: int) -> tuple[Example, ...]:
    """Questions on one haystack, for an evaluation that wants to read it once: depths evenly spread from 0 to 1, one
    question each, everything in front of the question the same."""
    rng = generator(f"haystack_questions:{seed}:{index}")
    text = _haystack(rng, _wanted(rng, num_tokens), num_needles=num_questions)
    thinking = draw_thinking(rng)
    style = str(rng.random())
    examples = []
    for n, (depth, fact) in enumerate(text.facts):
        asked = generator(f"haystack_questions:{seed}:{index}:{n}")
        turn = question(asked, fact, thinking=thinking)
        details = {"depth": depth, "tokens": num_tokens, "haystack": index}
        again = generator(style)
        examples.append(_conversation(again, "recall_haystack", text, [turn], thinking, details))
    return tuple(examples)


def _asked(rng: random.Random, task: str, text: Text, num_turns: int, wanted: int) -> Example:
    thinking = draw_thinking(rng)
    asked = rng.sample(text.facts, min(num_turns, len(text.facts)))
    turns = [question(rng, fact, thinking=thinking) for _, fact in asked]
    if len(turns) > 1 and rng.random() < 0.3:
        # Not as the last one: what this task asks for is there.
        turns.insert(rng.randrange(len(turns)), unanswerable(rng, text.absent[0], thinking=thinking))
    return _conversation(rng, task, text, turns, thinking, {"depth": asked[-1][0], "tokens": wanted})


def _conversation(
    rng: random.Random, task: str, text: Text, turns: list[Turn], thinking: bool, details: dict[str, float | int]
) -> Example:
    first, answer = turns[0]
    if rng.random() < _IN_SYSTEM_SHARE:
        return conversation(rng, task, turns, thinking=thinking, system=text.body, details=details)
    opening = f"{text.body}\n\n{first}" if rng.random() < 0.9 else f"{text.body}\n\nQuestion: {first}"
    return conversation(rng, task, [(opening, answer), *turns[1:]], thinking=thinking, details=details)


def _wanted(rng: random.Random, num_tokens: int | None) -> int:
    """Tokens for the messages."""
    wanted = rng.randint(*_DEFAULT_TOKENS) if num_tokens is None else num_tokens
    if not SHORTEST <= wanted <= LONGEST:
        raise ValueError(f"num_tokens must be from {SHORTEST} to {LONGEST}; found {num_tokens}")
    return wanted


def _num_turns(rng: random.Random, wanted: int) -> int:
    return rng.randint(2, max(2, min(_MOST_TURNS, wanted // _TOKENS_FOR_A_TURN)))


def _room(wanted: int, num_turns: int) -> int:
    """Tokens for the text."""
    return max(_LEAST_TOKENS, wanted - _FRAME_TOKENS - (num_turns - 1) * _TURN_TOKENS)


def _list(rng: random.Random, wanted: int, num_turns: int = 1) -> Text:
    room = _room(wanted, num_turns)
    form = rng.choice((*LINES, "json", "json"))
    indented = rng.random() < 0.5
    numbered = form in LINES[2:4] and rng.random() < 0.2
    # More than will fit: how many do is known when they are written.
    facts, absent = draw_facts(rng, max(4, room // 6), absent=1)
    lines, used = [], 0.0
    for n, fact in enumerate(facts):
        line = json_entry(fact) if form == "json" else fact.stated(form)
        line = f"{n + 1}. {line}" if numbered else line
        # An object's indent is a token; in one line its entries have no newline.
        tokens = num_tokens_of(line if form == "json" and not indented else f"{line}\n") + (form == "json" and indented)
        if used + tokens / 2 > room and n >= 2:
            break
        used += tokens
        lines.append(line)
    facts = facts[: len(lines)]
    body = as_json(facts, indented) if form == "json" else "\n".join(lines)
    if form.startswith("|"):
        body = f"| name | {facts[0].attribute} |\n|---|---|\n{body}"
    last = max(1, len(facts) - 1)
    placed = [(n / last, fact) for n, fact in enumerate(facts)]
    introduction = "" if rng.random() < 0.15 else rng.choice(_LIST_INTRODUCTIONS) + "\n"
    return Text(introduction + body, placed, absent)


def _haystack(rng: random.Random, wanted: int, num_turns: int = 1, num_needles: int | None = None) -> Text:
    room = _room(wanted, num_turns)
    most = max(num_turns, min(_MOST_NEEDLES, room // 48))
    facts, absent = draw_facts(rng, num_needles or rng.randint(num_turns, most), absent=1)
    one_form = rng.random() < 0.5
    form = rng.choice(SENTENCES)
    needles = [fact.stated(form if one_form else rng.choice(SENTENCES)) for fact in facts]
    needles = [needle[0].upper() + needle[1:] for needle in needles]
    introduction = "" if rng.random() < 0.15 else rng.choice(_TEXT_INTRODUCTIONS) + "\n"
    left = room - sum(num_tokens_of(needle) for needle in needles)
    hay = sentences(rng, left)
    if num_needles is None:
        depths = sorted(rng.random() for _ in facts)
    else:
        depths = [n / max(1, num_needles - 1) for n in range(num_needles)]
    pieces: list[str] = []
    taken = 0
    for depth, needle in zip(depths, needles, strict=True):
        place = round(depth * len(hay))
        pieces += [*hay[taken:place], needle]
        taken = place
    pieces += hay[taken:]
    paragraphs = rng.random() < 0.5
    if paragraphs:
        groups = [" ".join(pieces[n : n + _PARAGRAPH]) for n in range(0, len(pieces), _PARAGRAPH)]
        body = "\n\n".join(groups)
    else:
        body = " ".join(pieces)
    return Text(introduction + body, list(zip(depths, facts, strict=True)), absent)
