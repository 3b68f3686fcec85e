"""The process that writes and compiles grammars: it may take too long or too much, and is killed then.

standard input    a line of JSON: the vocabulary (`Setup`); then one line for each job (`GrammarJob`)
standard output   a line when it is ready; then one line for each job (`GrammarText` or `Refusal`)
"""

import ctypes
import os
import re
import resource
import signal
import sys
from pathlib import Path

import msgspec
import numpy as np

from engine.grammar.tokens import GrammarTokens
from server.grammar.messages import Answer, GrammarJob, Refusal, Setup
from server.grammar.writer import RefusedError, write_grammar

_MOST_MESSAGE = 400
_MOST_PART = 4096
_MOST_PARTS = 2048
_PR_SET_PDEATHSIG = 1


_PLAIN = {
    "oneOf constraints": "the keyword `oneOf` is not supported where two of its schemas may hold at once",
    "Resource '": "the keyword `$ref` points outside of the schema, which is not supported",
    "patternProperty regexes": "the keyword `patternProperties` is not supported where two patterns may match one name",
    "multipleOf": "the keyword `multipleOf` is not supported",
}
"""What the library says in words of its own."""
_UNIMPLEMENTED = re.compile(r'Unimplemented keys: \["([^"]+)"')


class Checker:
    """Compiles as the engine will, with the model's vocabulary."""

    def __init__(self, tokens: GrammarTokens) -> None:
        self._tokens = tokens
        self._parts: dict[str, str | None] = {}
        """Results of small grammars: tools have the same parts again and again."""

    def answer(self, job: GrammarJob) -> Answer:
        try:
            return Answer(grammar=write_grammar(job, self.compiles))
        except RefusedError as error:
            return Answer(refusal=error.refusal)
        except (RecursionError, MemoryError):
            message = "the grammar is nested too deeply or too large"
            return Answer(refusal=Refusal(message=message, param=job.format_param or "tools"))

    def compiles(self, text: str) -> str | None:
        """Why a grammar cannot be used; None: it compiles, and something can be said in it."""
        if len(text) > _MOST_PART:
            return self._compile(text)
        if text not in self._parts:
            if len(self._parts) >= _MOST_PARTS:
                self._parts.clear()
            self._parts[text] = self._compile(text)
        return self._parts[text]

    def _compile(self, text: str) -> str | None:
        matcher = self._tokens.matcher(text)
        if matcher.is_error():
            return _first_line(matcher.get_error())
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if matcher.is_error() or not mask.any():
            return "it cannot be satisfied, or is too complex (Unsatisfiable)"
        return None


def main() -> int:
    """Serve jobs until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    setup = msgspec.json.decode(source.readline(), type=Setup)
    tokens = GrammarTokens.load(Path(setup.model_dir), vocab_size=setup.vocab_size, eos_token_id=setup.eos_token_id)
    checker = Checker(tokens)
    _bound_memory(setup.memory_bytes)
    sink.write(b"{}\n")
    sink.flush()
    decoder = msgspec.json.Decoder(GrammarJob)
    for line in source:
        sink.write(msgspec.json.encode(checker.answer(decoder.decode(line))) + b"\n")
        sink.flush()
    return 0


def _bound_memory(more_bytes: int) -> None:
    if sys.platform != "linux":
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + more_bytes, used + more_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _first_line(message: str) -> str:
    """The library's message without its excerpt of the grammar."""
    lines = [line for line in message.splitlines() if line.strip() and not line.lstrip()[:1].isdigit()]
    text = (lines or [message])[0]
    cause = next((line for line in lines if line.startswith("error: ")), "")
    if cause and text.endswith("parse error:"):
        text = f"{text} {cause.removeprefix('error: ')}"
    head, _, rest = text.partition(": failed to compile JSON schema: ")
    if not rest and head.startswith("at "):
        rest = head.partition(": ")[2]
    reason = rest or head
    if (unknown := _UNIMPLEMENTED.search(reason)) is not None:
        return f"the keyword `{unknown[1]}` is not supported"
    for words, plain in _PLAIN.items():
        if words in reason:
            return f"{plain} ({reason[:_MOST_MESSAGE]})" if plain.endswith("supported") else plain
    return reason[:_MOST_MESSAGE]


if __name__ == "__main__":
    sys.exit(main())
