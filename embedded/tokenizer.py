"""The embedded model's tokenizer: 2048 ids, trained on the generated texts. `python -m embedded.tokenizer OUT_DIR`.

Its structure is that of the small random models, with merges, and with digits that stand alone, because sums are
written out digit by digit. The same texts give the same file everywhere.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from embedded.data.render import prompt_of, texts_of
from embedded.data.tasks import TASKS, make
from model.tools.byte_tokenizer import (
    NUM_TOKENS,
    SPECIAL_TOKENS,
    byte_tokenizer,
    pre_tokenizer,
    save_tokenizer,
    small_tokenizer,
)
from server.text.tokenizer import Tokenizer

VOCAB_SIZE = 2048
MODEL_MAX_LENGTH = 1 << 20
_DIGITS = r"\p{N}"
_EXAMPLES = 600
"""Of each task."""
_SEED = 0
_SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))


def train_tokenizer(examples: int = _EXAMPLES) -> tokenizers.Tokenizer:
    """VOCAB_SIZE ids, from so many examples of each task."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizer(_DIGITS)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + VOCAB_SIZE - NUM_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(_texts(examples), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    assert len(merges) == VOCAB_SIZE - NUM_TOKENS
    return small_tokenizer([(left, right) for left, right in merges], digits=_DIGITS)


def save_embedded_tokenizer(out_dir: Path, examples: int = _EXAMPLES) -> None:
    """Train it and write `tokenizer.json` and `tokenizer_config.json`."""
    out_dir.mkdir(parents=True, exist_ok=True)
    save_tokenizer(train_tokenizer(examples), out_dir, model_max_length=MODEL_MAX_LENGTH)


def _texts(examples: int) -> Iterator[str]:
    """What stands between special tokens, of prompts and answers."""
    plain = Tokenizer(json.loads(byte_tokenizer().to_str()), NUM_TOKENS)
    for task in TASKS:
        for index in range(examples):
            example = make(task, _SEED, index)
            yield from filter(None, _SPECIAL.split(prompt_of(plain, example).text))
            yield from texts_of(example.answer)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m embedded.tokenizer", description="Train the tokenizer.")
    parser.add_argument("out_dir", type=Path, help="where tokenizer.json and tokenizer_config.json are written")
    arguments = parser.parse_args(argv)
    save_embedded_tokenizer(arguments.out_dir)
    print(f"{VOCAB_SIZE} ids in {arguments.out_dir}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
