"""Things with a value: keys, values, the lines and sentences that state them, and the questions that ask for them."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from embedded.data.conversation import said
from embedded.data.example import Answer
from embedded.data.words import ADJECTIVES, CITIES, FIRST_NAMES, LAST_NAMES, NOUNS

UNKNOWN = "I do not know: the text does not say."
"""The answer where a text does not hold what is asked for."""

_LETTERS = "ABCDEFGHKLMNPRSTUVWXYZ"
_ATTRIBUTES = ("code", "number", "value", "password", "label", "key", "mark", "token")
_MOST_NAMES = 400
_SIMILAR_SHARE = 0.3

SENTENCES = (
    "The {attribute} of {key} is {value}.",
    "The {attribute} for {key} is {value}.",
    "Remember: {key} has the {attribute} {value}.",
    "Note that {key} has the {attribute} {value}.",
    "Please keep in mind that the {attribute} of {key} is {value}.",
    "As for {key}, the {attribute} is {value}.",
    "It says {value} is the {attribute} of {key}.",
)
LINES = (
    "- {key}: {value}",
    "* {key}: {value}",
    "{key}: {value}",
    "{key} = {value}",
    "{key} -> {value}",
    "{key}, {value}",
    "| {key} | {value} |",
    "The {attribute} of {key} is {value}.",
    "{key} has {attribute} {value}.",
    "the {attribute} of {key}: {value}",
)
_BARE_QUESTIONS = (
    "What is the {attribute} of {key}?",
    "Which {attribute} does {key} have?",
    "Give me the {attribute} of {key}.",
    "What is the {attribute} for {key}?",
    "Find the {attribute} of {key}.",
    "Look up {key}. What is its {attribute}?",
    "I need the {attribute} of {key}.",
    "{key}: which {attribute}?",
    "Do you know the {attribute} of {key}?",
    "What {attribute} belongs to {key}?",
)
_SENTENCE_QUESTIONS = (
    "In one sentence: what is the {attribute} of {key}?",
    "Tell me in a sentence which {attribute} {key} has.",
    "Answer in a full sentence: what is the {attribute} of {key}?",
)


@dataclass(frozen=True, slots=True)
class Fact:
    key: str
    attribute: str
    value: str

    def stated(self, form: str) -> str:
        return form.format(key=self.key, attribute=self.attribute, value=self.value)


def draw_facts(rng: random.Random, count: int, absent: int = 0) -> tuple[list[Fact], list[Fact]]:
    """`count` facts with different keys and one attribute, and `absent` more of the same kind that are not stated."""
    attribute = rng.choice(_ATTRIBUTES)
    values = rng.choice(_VALUES)
    facts = [Fact(key, attribute, values(rng)) for key in _keys(rng, count + absent)]
    return facts[:count], facts[count:]


def as_json(facts: Sequence[Fact], indented: bool) -> str:
    """An object of all of them. Numbers that a JSON number would write in the same way are numbers."""
    return json.dumps({fact.key: _json_value(fact) for fact in facts}, indent=2 if indented else None)


def json_entry(fact: Fact) -> str:
    """As it stands in the object."""
    return f"{json.dumps(fact.key)}: {json.dumps(_json_value(fact))},"


def _json_value(fact: Fact) -> int | str:
    return int(fact.value) if fact.value.isdigit() and fact.value[0] != "0" else fact.value


def question(rng: random.Random, fact: Fact, *, thinking: bool) -> tuple[str, Answer]:
    """A question for a fact that the text states, and its answer: the value, or a sentence where one is asked for."""
    key = _with_article(rng, fact.key)
    whole = rng.random() < 0.2
    form = rng.choice(_SENTENCE_QUESTIONS if whole else _BARE_QUESTIONS)
    content = f"The {fact.attribute} of {fact.key} is {fact.value}." if whole else fact.value
    return (
        form.format(key=key, attribute=fact.attribute),
        said(thinking, f"I look for {fact.key}: {fact.value}.", content),
    )


def unanswerable(rng: random.Random, fact: Fact, *, thinking: bool) -> tuple[str, Answer]:
    """A question for a fact that the text does not state."""
    form = rng.choice((*_BARE_QUESTIONS, *_SENTENCE_QUESTIONS))
    asked = form.format(key=_with_article(rng, fact.key), attribute=fact.attribute)
    return asked, said(thinking, f"I look for {fact.key}: it is not there.", UNKNOWN)


def draw_code(rng: random.Random) -> str:
    """Such as KX-4417."""
    letters = "".join(rng.choice(_LETTERS) for _ in range(2))
    return f"{letters}-{rng.randrange(10**4):04d}"


def draw_name(rng: random.Random) -> str:
    """First and last name."""
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def _with_article(rng: random.Random, key: str) -> str:
    return f"the {key}" if key.islower() and rng.random() < 0.5 else key


def _keys(rng: random.Random, count: int) -> list[str]:
    kind = rng.choice(("pair", "pair", "triple", "name", "noun"))
    if (kind == "name" and count > _MOST_NAMES) or (kind == "noun" and count > len(NOUNS) // 2):
        kind = "pair"
    nouns: Sequence[str] = NOUNS
    if rng.random() < _SIMILAR_SHARE and count < len(ADJECTIVES):
        # Keys that share their noun: the adjective decides.
        nouns = rng.sample(NOUNS, 2 + count // 4)
        kind = "triple" if kind == "triple" else "pair"
    keys: dict[str, None] = {}
    while len(keys) < count:
        match kind:
            case "pair":
                key = f"{rng.choice(ADJECTIVES)} {rng.choice(nouns)}"
            case "triple":
                key = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(nouns)}"
            case "name":
                key = draw_name(rng)
            case _:
                key = rng.choice(NOUNS)
        keys[key] = None
    return list(keys)


def _number(rng: random.Random) -> str:
    digits = rng.randint(3, 6)
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _word(rng: random.Random) -> str:
    return rng.choice(NOUNS)


def _two_words(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def _city(rng: random.Random) -> str:
    return rng.choice(CITIES)


def _mixed(rng: random.Random) -> str:
    return rng.choice((_number, draw_code, _word))(rng)


_VALUES = (_number, _number, _number, draw_code, draw_code, _word, _two_words, _city, _mixed)
