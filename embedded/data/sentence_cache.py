"""The same tokenizer, faster on filler: sentences of the pool are encoded once.

A text may be cut in front of a capital letter behind a full stop and a space, or behind a newline, because no token of
the V4 pre-tokenization crosses these places; what is cut encodes piece by piece to the ids of the whole.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedded.data.filler import NUM_SENTENCES, sentence
from server.text.tokenizer import Tokenizer

_CUT = re.compile(r"(?<=[.!?])(?= [A-Z])|(?<=\n)(?=[A-Z])")
_SHORT = 256
"""Characters of texts that are encoded as they are."""


class SentenceCache(Tokenizer):
    """Seconds to make; encodes as its base class does."""

    def __init__(self, definition: dict[str, Any], vocab_size: int, source: str = "tokenizer.json") -> None:
        super().__init__(definition, vocab_size, source)
        texts = [f" {sentence(number)}" for number in range(NUM_SENTENCES)]
        shared = list(range(vocab_size))
        self._known = {
            text: [shared[token_id] for token_id in ids]
            for text, ids in zip(texts, super().encode_plain_batch(texts), strict=True)
        }

    @classmethod
    def of(cls, model_dir: Path, vocab_size: int) -> "SentenceCache":
        """Of a directory with `tokenizer.json`. Raises TokenizerError, OSError or ValueError."""
        path = Path(model_dir) / "tokenizer.json"
        return cls(json.loads(path.read_bytes()), vocab_size, str(path))

    def encode_plain_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As the base class."""
        cut = [[text] if len(text) < _SHORT else _CUT.split(text) for text in texts]
        known = self._known
        missing = [piece for pieces in cut for piece in pieces if piece not in known]
        encoded = iter(super().encode_plain_batch(missing))
        batch = []
        for pieces in cut:
            ids: list[int] = []
            for piece in pieces:
                found = known.get(piece)
                ids += next(encoded) if found is None else found
            batch.append(ids)
        return batch
