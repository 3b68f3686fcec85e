"""Exact replay: the sampled tokens of an assistant's turn, for the next prompt of its conversation.

A client sends back texts, and texts do not say how they were sampled: `1.50` comes back as `1.5`, blanks between tags
are gone, a word may split into other tokens. So the ids are kept here for a while, and where a turn of the history is
what was sent out, they stand in the prompt instead of its rendering: the prefix cache then has the whole turn.

A turn with calls is found by the id of its first call; any other turn by all tokens in front of it, so that it can only
meet the conversation it comes from. Either way it must have the same content, calls (arguments compared as JSON) and,
if any is sent, reasoning, and begin as the renderer would have it begin: with `<think>` or with `</think>`.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from server.generation import GenerationEvent
from server.text.calls import DSML
from server.text.prompt import EOS, Prompt
from server.text.tokenizer import Tokenizer

_ENTRY_BYTES = 500
"""About what an entry costs beside its ids."""
_STRUCTURE = ("<think>", "</think>", DSML, EOS)


@dataclass(frozen=True, slots=True)
class _Turn:
    token_ids: np.ndarray
    """int32: from behind `<｜Assistant｜>` to EOS."""
    reasoning: bytes
    content: bytes
    calls: tuple[tuple[str, str, str], ...]
    """(id, name, arguments in one spelling)."""

    @property
    def num_bytes(self) -> int:
        return self.token_ids.nbytes + sum(len(part) for call in self.calls for part in call) + _ENTRY_BYTES


class TurnMemory:
    """Turns of all conversations; the least recently used are forgotten first. Safe in threads, where prompts are
    rendered."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._num_bytes = 0
        self._turns: OrderedDict[tuple[str, str | bytes], _Turn] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._turns)

    def get(self, scope: str, key: str | bytes) -> _Turn | None:
        with self._lock:
            turn = self._turns.get((scope, key))
            if turn is not None:
                self._turns.move_to_end((scope, key))
            return turn

    def put(self, scope: str, key: str | bytes, turn: _Turn) -> None:
        with self._lock:
            old = self._turns.pop((scope, key), None)
            self._turns[scope, key] = turn
            self._num_bytes += turn.num_bytes - (old.num_bytes if old is not None else 0)
            while self._num_bytes > self._most_bytes:
                _, dropped = self._turns.popitem(last=False)
                self._num_bytes -= dropped.num_bytes


class Turns:
    """One client's part of the memory: nobody else's turns are found in it, and nobody else finds its own."""

    def __init__(self, memory: TurnMemory, scope: str) -> None:
        self._memory = memory
        self._scope = scope

    def find(self, message: Mapping[str, Any], opening: int, prefix: bytes) -> np.ndarray | None:
        """int32 ids of the turn that an assistant's message (as rendered, content a string) was, EOS included.

        `opening` is the id that its rendering begins with; `prefix` the digest of all tokens before.
        """
        calls = message.get("tool_calls")
        turn = self._memory.get(self._scope, calls[0]["id"] if calls else prefix)
        if turn is None or turn.token_ids[0] != opening or turn.calls != _calls_of(message):
            return None
        reasoning = message.get("reasoning_content")
        if reasoning is not None and _digest(reasoning) != turn.reasoning:
            return None
        return turn.token_ids if _digest(message.get("content") or "") == turn.content else None

    def recorder(self, prompt: Prompt, tokenizer: Tokenizer, *, tools: bool) -> "TurnRecorder | None":
        """What is to hear the events of an answer to `prompt`; None when its turn can never be met again.

        Without tools the rendering forgets that a turn was thought about, and a message that the client began is not
        the one it will send.
        """
        if prompt.continues or (prompt.thinking and not tools):
            return None
        return TurnRecorder(self._memory, self._scope, prompt, tokenizer)


class TurnRecorder:
    """One answer. It is remembered if it ends by itself."""

    __slots__ = ("_arguments", "_calls", "_content", "_ids", "_memory", "_prompt", "_reasoning", "_scope", "_tokenizer")

    def __init__(self, memory: TurnMemory, scope: str, prompt: Prompt, tokenizer: Tokenizer) -> None:
        self._memory = memory
        self._scope = scope
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[tuple[str, str]] = []
        self._arguments: list[list[str]] = []

    def add(self, event: GenerationEvent) -> None:
        self._ids.extend(event.token_ids)
        if event.reasoning:
            self._reasoning.append(event.reasoning)
        if event.content:
            self._content.append(event.content)
        for call in event.calls:
            if call.call_id is not None:
                self._calls.append((call.call_id, call.name or ""))
                self._arguments.append([])
            else:
                self._arguments[call.index].append(call.arguments)
        if event.finish_reason in ("stop", "tool_calls") and event.stop_reason is None:
            self._remember()

    def _remember(self) -> None:
        prompt_ids = self._prompt.token_ids
        start = self._prompt.turn_start + 1
        tokenizer = self._tokenizer
        structure = {tokenizer.special_id(name) for name in _STRUCTURE}
        # A special token in the middle of a text was a text for the client, and comes back as one.
        if self._ids[-1:] != [tokenizer.required_id(EOS)] or tokenizer.added_ids & set(self._ids) - structure:
            return
        arguments = ["".join(pieces) for pieces in self._arguments]
        turn = _Turn(
            np.concatenate([prompt_ids[start:], np.asarray(self._ids, dtype=np.int32)]),
            _digest("".join(self._reasoning)),
            _digest("".join(self._content)),
            tuple((*call, _one_spelling(text)) for call, text in zip(self._calls, arguments, strict=True)),
        )
        key = self._calls[0][0] if self._calls else prefix_digest(prompt_ids[:start])
        self._memory.put(self._scope, key, turn)


def prefix_digest(token_ids: np.ndarray) -> bytes:
    return hashlib.blake2b(token_ids.astype("<i4").tobytes(), digest_size=16).digest()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _calls_of(message: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (call["id"], call["function"]["name"], _one_spelling(call["function"]["arguments"]))
        for call in message.get("tool_calls") or ()
    )


def _one_spelling(arguments: str) -> str:
    """The same text for the same JSON value. JavaScript knows no difference between 1.0 and 1."""
    try:
        return json.dumps(json.loads(arguments, parse_float=_number), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() else value
