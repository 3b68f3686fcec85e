"""A tokenizer for all tests of the data: trained on few examples, which changes its merges and nothing else."""

from pathlib import Path

import pytest

from embedded.tokenizer import VOCAB_SIZE, save_embedded_tokenizer
from server.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_embedded_tokenizer(directory, examples=60)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_dir, VOCAB_SIZE)
