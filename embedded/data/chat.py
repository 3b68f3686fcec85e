"""Small talk and facts about Fathom, system prompts that are obeyed, and questions on a world that it does not know."""

import random
from collections.abc import Callable

from embedded.data.chat_facts import (
    ABOUT,
    COUNTRIES,
    FOREIGN_TO_ME,
    GREETING,
    LANGUAGES,
    TALK,
    WHO,
    WORLD_QUESTIONS,
    Topic,
)
from embedded.data.conversation import Turn, conversation, draw_thinking, one_of, said
from embedded.data.example import Example
from embedded.data.words import ADJECTIVES, CITIES, FIRST_NAMES, NOUNS

_UPPER = (
    "Answer in upper case.",
    "Always write in capital letters.",
    "Use upper case only.",
    "You are a helpful assistant. Answer in upper case.",
)
_LOWER = ("Answer in lower case.", "Use lower case only.", "Always write in small letters.")
_NAMES = (
    "You are called {name}.",
    "Your name is {name}.",
    "You are {name}, a friendly assistant.",
    "You are an assistant with the name {name}.",
)
_ENDS = (
    "Always end with {word}.",
    "End every answer with {word}.",
    "You are a helpful assistant. End each answer with the word {word}.",
)
_STARTS = ("Always begin with {word}.", "Begin every answer with the word {word}.", "Start each answer with {word}.")
_END_WORDS = ("DONE", "OVER", "END", "STOP", "READY", "OK", "FINISHED")


def chat(rng: random.Random, num_tokens: int | None) -> Example:
    """One to four turns."""
    del num_tokens
    thinking = draw_thinking(rng)
    return conversation(rng, "chat", _turns(rng, thinking, str), thinking=thinking)


def chat_system(rng: random.Random, num_tokens: int | None) -> Example:
    """A system prompt that changes every answer."""
    del num_tokens
    thinking = draw_thinking(rng)
    match rng.randrange(5):
        case 0:
            system, turns = rng.choice(_UPPER), _turns(rng, thinking, str.upper)
        case 1:
            system, turns = rng.choice(_LOWER), _turns(rng, thinking, str.lower)
        case 2:
            word = rng.choice(_END_WORDS)
            system, turns = one_of(rng, _ENDS, word=word), _turns(rng, thinking, lambda text: f"{text} {word}")
        case 3:
            word = rng.choice(_END_WORDS)
            system, turns = one_of(rng, _STARTS, word=word), _turns(rng, thinking, lambda text: f"{word} {text}")
        case _:
            name = rng.choice(FIRST_NAMES)
            system = one_of(rng, _NAMES, name=name)
            turns = [] if rng.random() < 0.6 else _turns(rng, thinking, str)[:1]
            # Other questions on who it is would be answered with its real name.
            turns = [turn for turn in turns if "Fathom" not in turn[1].content]
            asked = varied(rng, rng.choice(WHO.questions[:8] + WHO.questions[10:]))
            turns.append((asked, said(thinking, f"The user {WHO.about}.", f"I am {name}.")))
    return conversation(rng, "chat_system", turns, thinking=thinking, system=system)


def world(rng: random.Random, num_tokens: int | None) -> Example:
    """A question on the world."""
    del num_tokens
    thinking = draw_thinking(rng)
    turns = [_turn(rng, GREETING, thinking, str)] if rng.random() < 0.2 else []
    city, other = rng.sample(CITIES, 2)
    asked = one_of(
        rng,
        WORLD_QUESTIONS,
        country=rng.choice(COUNTRIES),
        city=city,
        other=other,
        noun=rng.choice(NOUNS),
        adjective=rng.choice(ADJECTIVES),
        name=rng.choice(FIRST_NAMES),
        language=rng.choice(LANGUAGES),
    )
    turns.append((varied(rng, asked), said(thinking, "I do not know anything about this.", FOREIGN_TO_ME)))
    return conversation(rng, "world", turns, thinking=thinking)


def small_talk(rng: random.Random) -> tuple[str, str]:
    """A question that needs nothing but words, and its answer."""
    topic = rng.choice((*TALK, WHO))
    return varied(rng, rng.choice(topic.questions)), topic.answer


def varied(rng: random.Random, text: str) -> str:
    """The same question as people type it: sometimes in lower case, without its mark, or politer."""
    draw = rng.random()
    if draw < 0.12:
        text = text[0].lower() + text[1:]
    elif draw < 0.2:
        text = text.lower()
    draw = rng.random()
    if draw < 0.15:
        return text.rstrip(".?!") or text
    if draw < 0.2:
        return text + "!" if text[-1].isalnum() else text
    if draw < 0.25:
        return f"Hello! {text}" if len(text.split()) > 2 else text
    return text


def _turns(rng: random.Random, thinking: bool, change: Callable[[str], str]) -> list[Turn]:
    topics = [rng.choice(ABOUT) if rng.random() < 0.7 else rng.choice(TALK) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    if rng.random() < 0.25:
        topics.insert(0, GREETING)
    return [_turn(rng, topic, thinking, change) for topic in topics]


def _turn(rng: random.Random, topic: Topic, thinking: bool, change: Callable[[str], str]) -> Turn:
    asked = varied(rng, rng.choice(topic.questions))
    return asked, said(thinking, f"The user {topic.about}.", change(topic.answer))
