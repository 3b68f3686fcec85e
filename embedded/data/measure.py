"""How long a text will be in tokens, without a tokenizer: the tokenizer is trained on what is made with this."""

PROSE_CHARACTERS = 3.6
"""Of filler prose, for each token of the embedded tokenizer. A test holds it to the trained one."""

_DIGITS = str.maketrans("", "", "0123456789")


def num_tokens_of(text: str, characters: float = PROSE_CHARACTERS) -> float:
    """About how many tokens a text has; digits stand alone."""
    rest = len(text.translate(_DIGITS))
    return len(text) - rest + rest / characters
