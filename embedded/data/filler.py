"""Prose that means little: the hay around needles. Sentences come from one numbered pool, and each is made once."""

import functools
import random

from embedded.data.measure import num_tokens_of
from embedded.data.seeds import generator, with_articles
from embedded.data.words import ADJECTIVES, CITIES, FIRST_NAMES, FOREIGN, NOUNS, PLACES, TIMES, UNITS, VERBS

NUM_SENTENCES = 1 << 15

_TEMPLATES = (
    "The {a} {n} stood {p}.",
    "{f} saw a {a} {n} {p}.",
    "{f} and {g} walked to the {n} {t}.",
    "There was a {n} {p}, and it looked {a}.",
    "In {c} the {n} is {a} {t}.",
    "The {n} and the {m} were {a}.",
    "Nobody in {c} knew about the {a} {n}.",
    "{f} bought a {n} for {d} euros.",
    "It took {d} {u} to reach the {n}.",
    "A {a} {n} costs more than a {b} {m}.",
    "{f} likes the {n}, but {g} likes the {m}.",
    "The way from {c} to {k} is {d} kilometers long.",
    "We found the {n} {p} {t}.",
    "They wanted to {v} the {n} and to {w} the {m}.",
    "{f} had to {v} a {a} {n} {t}.",
    "The {n} of {f} was {a} and {b}.",
    "Please {v} the {n} before you {w} the {m}.",
    "The {a} {n} came back {t}.",
    "Every {n} in {c} has a {m}.",
    "{f} wrote a long letter about the {n}.",
    "The old {n} was sold to {f} from {c}.",
    "A {n} and {d} other things lay {p}.",
    "{f} works in {c} as a {n}.",
    "Most people {v} the {n} {t}.",
    "The {n} is {a}, the {m} is {b}.",
    "After {d} {u} the {n} was {a} again.",
    "{f} told {g} about a {a} {n} in {c}.",
    "It was a {a} day, and the {n} was {b}.",
    "The {m} belongs next to the {n}, said {f}.",
    "Once a {a} {n} lived {p}.",
    "When the {n} is {a}, {f} stays in {c}.",
    "Without a {n} you cannot {v} the {m}.",
    "The children played with a {n} {p}.",
    "Each {n} needs a {a} {m} {t}.",
    "{f} never saw the {n} that {g} had lost.",
    "The meeting about the {n} was in {c} {t}.",
    "Some say the {n} is {a}; others say it is {b}.",
    "Last of all came the {a} {n} from {c}.",
    "{g} asked whether the {n} was {a}.",
    "The {n} moved slowly {p}, then it stopped.",
)


@functools.lru_cache(maxsize=NUM_SENTENCES)
def sentence(number: int) -> str:
    """Sentence `number` of NUM_SENTENCES; it ends with its full stop or its kind."""
    assert 0 <= number < NUM_SENTENCES
    rng = generator(f"filler:{number}")
    if rng.random() < 0.01:
        return rng.choice(FOREIGN)
    first, second = rng.sample(FIRST_NAMES, 2)
    start, end = rng.sample(CITIES, 2)
    noun, other = rng.sample(NOUNS, 2)
    adjective, another = rng.sample(ADJECTIVES, 2)
    verb, deed = rng.sample(VERBS, 2)
    text = rng.choice(_TEMPLATES).format(
        n=noun,
        m=other,
        a=adjective,
        b=another,
        f=first,
        g=second,
        c=start,
        k=end,
        v=verb,
        w=deed,
        p=rng.choice(PLACES),
        t=rng.choice(TIMES),
        d=rng.randrange(2, 100),
        u=rng.choice(UNITS),
    )
    return with_articles(text)


@functools.lru_cache(maxsize=NUM_SENTENCES)
def sentence_tokens(number: int) -> float:
    """About how many tokens a sentence has."""
    return num_tokens_of(sentence(number))


def sentences(rng: random.Random, num_tokens: float) -> list[str]:
    """Sentences of about so many tokens in all: the last one is taken if more than half of it fits."""
    chosen: list[str] = []
    room = num_tokens
    while True:
        number = int(rng.random() * NUM_SENTENCES)
        tokens = sentence_tokens(number)
        if room < tokens / 2:
            return chosen
        room -= tokens
        chosen.append(sentence(number))
