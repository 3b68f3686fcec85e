"""Sums and differences, written out digit by digit from the right, as on paper."""

import random

from embedded.data.conversation import conversation, draw_thinking, one_of, said
from embedded.data.example import Example
from embedded.data.words import FIRST_NAMES, THINGS

_QUESTIONS = (
    "What is {sum}?",
    "How much is {sum}?",
    "Compute {sum}.",
    "Calculate {sum}.",
    "{sum}",
    "{sum} = ?",
    "{sum} =",
    "Please compute {sum}",
    "Can you tell me what {sum} is?",
    "I need the result of {sum}.",
    "Solve {sum}.",
)
_BARE_QUESTIONS = (
    "What is {sum}? Answer with the number only.",
    "{sum}? Only the number, please.",
    "Give me only the number: {sum}",
)
_WORDS = {"+": ("plus", "and"), "-": ("minus", "less")}
_THREE_SHARE, _STORY_SHARE, _BARE_SHARE, _WORD_SHARE = 0.06, 0.1, 0.15, 0.1


def arithmetic(rng: random.Random, num_tokens: int | None) -> Example:
    """Two operands of up to three digits (sometimes three operands, or a story), with thinking."""
    del num_tokens
    draw = rng.random()
    if draw < _THREE_SHARE:
        return _three(rng)
    if draw < _THREE_SHARE + _STORY_SHARE:
        return _story(rng)
    first, sign, second = _operands(rng)
    asked, content = _asked(rng, first, sign, second)
    answer = said(True, column_work(first, sign, second), content)
    return conversation(rng, "arithmetic", [(asked, answer)], thinking=True, details={"operands": 2})


def arithmetic_direct(rng: random.Random, num_tokens: int | None) -> Example:
    """Operands of one digit, with or without thinking; larger ones without, where the work is part of the answer."""
    del num_tokens
    if rng.random() < 0.3:
        first, sign, second = _operands(rng)
        asked = one_of(rng, _QUESTIONS, sum=f"{first} {sign} {second}")
        content = f"{column_work(first, sign, second)}\nThe result is {_result(first, sign, second)}."
        answer = said(False, "-", content)
        return conversation(rng, "arithmetic_direct", [(asked, answer)], thinking=False)
    thinking = draw_thinking(rng, 0.2)
    first, sign, second = rng.randrange(10), rng.choice("+-"), rng.randrange(10)
    asked, content = _asked(rng, first, sign, second)
    answer = said(thinking, column_work(first, sign, second), content)
    return conversation(rng, "arithmetic_direct", [(asked, answer)], thinking=thinking)


def column_work(first: int, sign: str, second: int) -> str:
    """The written-out work; it ends with the equation.

    Both numbers get the same number of digits. A difference below zero is computed the other way round.
    """
    result = _result(first, sign, second)
    equation = f"{first} {sign} {second} = {result}"
    lines = []
    upper, lower = first, second
    if sign == "-" and first < second:
        upper, lower = second, first
        lines.append(f"{first} is less than {second}, so the result is negative.")
    width = max(len(str(upper)), len(str(lower)))
    top, bottom = str(upper).zfill(width), str(lower).zfill(width)
    lines.append(f"{top} {sign} {bottom}:")
    carry, written = 0, ""
    for a, b in zip(reversed(top), reversed(bottom), strict=True):
        if sign == "+":
            total = int(a) + int(b) + carry
            step = f"{a} + {b} + {carry} = {total}"
            digit, carry = total % 10, total // 10
        else:
            total = int(a) - int(b) - carry
            step = f"{a} - {b} - {carry} = {total}"
            digit, carry = total % 10, int(total < 0)
        written = f"{digit}{written}"
        lines.append(f"{step}, write {digit}, carry {carry}: {written}")
    if sign == "+" and carry:
        written = f"{carry}{written}"
        lines.append(f"carry {carry}: {written}")
    assert int(written) == abs(result)
    lines.append(f"So {equation}.")
    return "\n".join(lines)


def _operands(rng: random.Random) -> tuple[int, str, int]:
    def operand() -> int:
        return rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3, 3)))

    return operand(), rng.choice("+-"), operand()


def _result(first: int, sign: str, second: int) -> int:
    return first + second if sign == "+" else first - second


def _asked(rng: random.Random, first: int, sign: str, second: int) -> tuple[str, str]:
    """Question and content."""
    result = _result(first, sign, second)
    shown = f"{first} {sign} {second}"
    if rng.random() < _BARE_SHARE:
        return one_of(rng, _BARE_QUESTIONS, sum=shown), str(result)
    draw = rng.random()
    if draw < _WORD_SHARE:
        shown = f"{first} {rng.choice(_WORDS[sign])} {second}"
    elif draw < 2 * _WORD_SHARE:
        shown = f"{first}{sign}{second}"
    return one_of(rng, _QUESTIONS, sum=shown), f"The result is {result}."


def _three(rng: random.Random) -> Example:
    first, second, third = (rng.randrange(100) for _ in range(3))
    one, two = rng.choice("+-"), rng.choice("+-")
    between = _result(first, one, second)
    if between < 0:
        one, between = "+", first + second
    result = _result(between, two, third)
    work = f"{column_work(first, one, second)}\n{column_work(between, two, third)}"
    asked = one_of(rng, _QUESTIONS, sum=f"{first} {one} {second} {two} {third}")
    answer = said(True, work, f"The result is {result}.")
    return conversation(rng, "arithmetic", [(asked, answer)], thinking=True, details={"operands": 3})


def _story(rng: random.Random) -> Example:
    name, other = rng.sample(FIRST_NAMES, 2)
    thing = rng.choice(THINGS)
    first, second = rng.randrange(2, 1000), rng.randrange(2, 1000)
    gains = rng.random() < 0.5
    if not gains and first < second:
        first, second = second, first
    sign = "+" if gains else "-"
    result = _result(first, sign, second)
    what = f"items of type {thing}"
    told = (
        one_of(
            rng,
            (
                "{name} has {first} {what} and gets {second} more.",
                "{name} has {first} {what}. {other} gives {name} {second} more.",
            ),
            name=name,
            other=other,
            first=first,
            second=second,
            what=what,
        )
        if gains
        else one_of(
            rng,
            (
                "{name} has {first} {what} and loses {second} of them.",
                "{name} has {first} {what}. {name} gives {second} of them to {other}.",
            ),
            name=name,
            other=other,
            first=first,
            second=second,
            what=what,
        )
    )
    asked = f"{told} How many does {name} have now?"
    answer = said(True, column_work(first, sign, second), f"{name} has {result}.")
    return conversation(rng, "arithmetic", [(asked, answer)], thinking=True, details={"operands": 2, "story": True})
