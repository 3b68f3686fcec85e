"""Texts and lists, given and to be given back: as they are, in upper case, reversed, sorted, counted."""

import random
import re
from collections.abc import Callable

from embedded.data.conversation import conversation, draw_thinking, one_of, said
from embedded.data.example import Example
from embedded.data.facts import draw_code, draw_name
from embedded.data.filler import NUM_SENTENCES, sentence, sentences
from embedded.data.words import ADJECTIVES, CITIES, FIRST_NAMES, NOUNS, VERBS

_MOST_TOKENS = 512
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")

_REPEATS = (
    "Repeat this text: {text}",
    "Repeat: {text}",
    "Say exactly this: {text}",
    "Copy this text word for word:\n{text}",
    "Repeat after me: {text}",
    "Write this text again:\n\n{text}",
    "{text}\n\nRepeat the text above.",
    "Echo: {text}",
)
_CHANGES: tuple[tuple[str, tuple[str, ...], Callable[[str], str]], ...] = (
    (
        "upper case",
        (
            "Write this in upper case: {text}",
            "Upper case: {text}",
            "{text}\n\nWrite the text above in capital letters.",
            "Convert to upper case: {text}",
        ),
        str.upper,
    ),
    (
        "lower case",
        (
            "Write this in lower case: {text}",
            "Lower case: {text}",
            "{text}\n\nWrite the text above in small letters.",
            "Convert to lower case: {text}",
        ),
        str.lower,
    ),
    (
        "the words reversed",
        (
            "Reverse the order of the words: {text}",
            "Say the words backwards: {text}",
            "Write these words from last to first: {text}",
        ),
        lambda text: " ".join(reversed(text.split())),
    ),
)


def repeat(rng: random.Random, num_tokens: int | None) -> Example:
    """A text or a list word for word."""
    if num_tokens is not None:
        text = " ".join(sentences(rng, min(num_tokens, _MOST_TOKENS))) or "Yes."
    elif rng.random() < 0.3:
        text = "\n".join(f"- {item}" for item in _items(rng, rng.randint(2, 8)))
    else:
        text = _text(rng)
    thinking = draw_thinking(rng, 0.3)
    answer = said(thinking, "I repeat the text.", text)
    return conversation(rng, "repeat", [(one_of(rng, _REPEATS, text=text), answer)], thinking=thinking)


def transform(rng: random.Random, num_tokens: int | None) -> Example:
    """A text in another case or order; a question on a list; the number of a sentence."""
    del num_tokens
    draw = rng.random()
    if draw < 0.4:
        asked, reasoning, content = _changed(rng)
    elif draw < 0.9:
        asked, reasoning, content = rng.choice(_LIST_TASKS)(rng)
    else:
        asked, reasoning, content = _extracted(rng)
    thinking = draw_thinking(rng, 0.4)
    return conversation(rng, "transform", [(asked, said(thinking, reasoning, content))], thinking=thinking)


def _text(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.5:
        return " ".join(sentence(rng.randrange(NUM_SENTENCES)) for _ in range(rng.choice((1, 1, 1, 2, 3))))
    if draw < 0.8:
        return " ".join(_items(rng, rng.randint(1, 8)))
    if draw < 0.9:
        return " ".join(draw_code(rng) for _ in range(rng.randint(1, 4)))
    return " ".join(str(rng.randrange(10 ** rng.randint(1, 6))) for _ in range(rng.randint(1, 5)))


def _changed(rng: random.Random) -> tuple[str, str, str]:
    name, forms, change = rng.choice(_CHANGES)
    text = " ".join(_items(rng, rng.randint(1, 7))) if rng.random() < 0.6 else sentence(rng.randrange(NUM_SENTENCES))
    if "reversed" in name:
        text = " ".join(_items(rng, rng.randint(2, 6)))
    return one_of(rng, forms, text=text), f"I write {name}.", change(text)


def _items(rng: random.Random, count: int) -> list[str]:
    """Different single words."""
    pool = rng.choice((NOUNS, NOUNS, ADJECTIVES, FIRST_NAMES, VERBS))
    return rng.sample(pool, count)


def _given(rng: random.Random, items: list[str]) -> str:
    match rng.randrange(3):
        case 0:
            return ", ".join(items)
        case 1:
            return "\n".join(f"- {item}" for item in items)
        case _:
            return " ".join(items)


def _framed(rng: random.Random, items: list[str], wish: str) -> str:
    given = _given(rng, items)
    return rng.choice((f"{given}\n\n{wish}", f"{wish}\n\n{given}", f"{wish} {', '.join(items)}"))


def _counted(rng: random.Random) -> tuple[str, str, str]:
    items = _items(rng, rng.randint(1, 9))
    wish = rng.choice(("How many words are there?", "Count the words.", "How many items does the list have?"))
    counting = " ".join(f"{n} {item}" for n, item in enumerate(items, 1))
    return _framed(rng, items, wish), f"I count: {counting}.", str(len(items))


def _picked(rng: random.Random) -> tuple[str, str, str]:
    items = _items(rng, rng.randint(2, 8))
    number = rng.randrange(len(items))
    ordinal = "last" if number == len(items) - 1 and rng.random() < 0.7 else _ORDINALS[number]
    forms = ("What is the {n} word?", "Which is the {n} word?", "Give me the {n} word.", "Say only the {n} word.")
    counting = " ".join(f"{n} {item}" for n, item in enumerate(items, 1))
    return _framed(rng, items, one_of(rng, forms, n=ordinal)), f"I count: {counting}.", items[number]


def _joined(rng: random.Random) -> tuple[str, str, str]:
    items = _items(rng, rng.randint(2, 7))
    wish = rng.choice(("Join the words with commas.", "Write the words in one line with commas."))
    given = rng.choice(("\n".join(items), " ".join(items), "\n".join(f"- {item}" for item in items)))
    return f"{wish}\n\n{given}", "I join the words with commas.", ", ".join(items)


def _itemized(rng: random.Random) -> tuple[str, str, str]:
    items = _items(rng, rng.randint(2, 7))
    wish = rng.choice(("Make a list with one word on each line.", "Write each word on its own line, with a dash."))
    return _framed(rng, items, wish), "I make a list.", "\n".join(f"- {item}" for item in items)


def _sorted(rng: random.Random) -> tuple[str, str, str]:
    numbers = rng.random() < 0.4
    count = rng.randint(3, 6)
    if numbers:
        values = rng.sample(range(100), count)
        items, ordered = [str(value) for value in values], [str(value) for value in sorted(values)]
        wish = rng.choice(("Sort these numbers.", "Put the numbers in order, smallest first."))
    else:
        items = _items(rng, count)
        ordered = sorted(items)
        wish = rng.choice(("Sort these words.", "Put the words in alphabetical order.", "Sort the words from A to Z."))
    return _framed(rng, items, wish), f"I sort {len(items)} items.", ", ".join(ordered)


_LIST_TASKS = (_counted, _picked, _picked, _joined, _itemized, _sorted)


def _extracted(rng: random.Random) -> tuple[str, str, str]:
    if rng.random() < 0.5:
        text = sentence(rng.randrange(NUM_SENTENCES))
        while len(re.findall(r"\d+", text)) != 1:
            text = sentence(rng.randrange(NUM_SENTENCES))
        (number,) = re.findall(r"\d+", text)
        wish = rng.choice(("Which number is in the sentence?", "Extract the number.", "Give me only the number."))
        return f"{text}\n\n{wish}", f"I see the number {number}.", number
    name, place = draw_name(rng), rng.choice(CITIES)
    text = rng.choice(
        (f"{name} lives in {place}.", f"Yesterday {name} came to {place}.", f"{place} is where {name} works.")
    )
    if rng.random() < 0.5:
        return f"{text}\n\nWhich city is in the sentence?", f"I see the city {place}.", place
    return f"{text}\n\nWhich person is in the sentence?", f"I see the person {name}.", name
