"""The input of a custom tool, taken out of the arguments of the function that stands for it while they are made."""

import json
import re
from typing import Any

_OPENING = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_RUN = re.compile(r'[^"\\]*(?:\\(?:u[0-9a-fA-F]{4}|[^u])[^"\\]*)*')
_HIGH = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\Z")


class CustomInput:
    """Pieces of `{"input": "..."}` in, pieces of the text out."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._pending = ""
        """Characters that are read and not yet given out."""
        self._open = False
        self._over = False
        self._sent: list[str] = []

    def push(self, piece: str) -> str:
        """What is certain of the text after one more piece of the arguments."""
        self._pieces.append(piece)
        if self._over:
            return ""
        self._pending += piece
        if not self._open:
            opening = _OPENING.match(self._pending)
            if opening is None:
                return ""
            self._pending = self._pending[opening.end() :]
            self._open = True
        match = _RUN.match(self._pending)
        assert match is not None
        run, rest = match.group(), self._pending[match.end() :]
        if rest.startswith('"'):
            self._over = True
        else:
            half = _HIGH.search(run)
            if half is not None:
                # Half of a surrogate pair waits for the other half.
                run, rest = run[: half.start()], run[half.start() :] + rest
        self._pending = rest
        text: str = json.loads(f'"{run}"', strict=False)
        if text:
            self._sent.append(text)
        return text

    def finish(self) -> tuple[str, str]:
        """(the rest, the whole text). Arguments of another shape are the text themselves."""
        sent = "".join(self._sent)
        whole = _input_of("".join(self._pieces))
        if not whole.startswith(sent):
            whole = sent
        return whole[len(sent) :], whole


def _input_of(arguments: str) -> str:
    try:
        value: Any = json.loads(arguments)
    except ValueError:
        opening = _OPENING.match(arguments)
        if opening is None:
            return arguments
        match = _RUN.match(arguments, opening.end())
        assert match is not None
        return str(json.loads(f'"{match.group()}"', strict=False))
    found = value.get("input") if isinstance(value, dict) and len(value) == 1 else None
    return found if isinstance(found, str) else arguments
