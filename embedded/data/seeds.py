"""Where chance comes from: a generator for each name, the same on every machine."""

import random
import re

FIRST_EVALUATION_SEED = 1 << 31
"""Training takes seeds below, evaluations from here on: the two never meet."""

_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")


def generator(name: str) -> random.Random:
    """Chance for everything that is called `name`."""
    return random.Random(name)  # noqa: S311 - no secret


def check_training_seed(seed: int) -> None:
    """Raises ValueError for a seed that belongs to evaluations."""
    if not 0 <= seed < FIRST_EVALUATION_SEED:
        raise ValueError(f"a training seed is in [0, {FIRST_EVALUATION_SEED}); found {seed}")


def with_articles(text: str) -> str:
    """`a` before a vowel as `an`, for texts put together from words."""
    return _ARTICLE.sub(r"\1n ", text)
