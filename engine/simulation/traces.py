"""Reads recorded traffic: lengths, times and block hashes. Tokens are made from the hashes, so equal blocks are equal.

Mooncake JSONL   {"timestamp": ms, "input_length", "output_length", "hash_ids": ids of 512-token blocks}
AIPerf JSONL     the same with "session_id": later turns have "delay" (ms after the turn before has ended), and their
                 lengths and ids count the new input only, unless "context_mode" says that rows hold whole prompts
agent sessions   one JSON object for each session (a file, a line, or a folder of files; the Weka form):
                 {"id", "block_size", "requests": [{"t": s, "type": "n" | "s", "in", "out", "hash_ids", "think_time"},
                 {"type": "subagent", "agent_id", "requests": [...]}, ...]}; ids count within their session
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.simulation.workload import SimRequest, Text, Trace, seed_of

MOONCAKE_BLOCK_TOKENS = 512
_ALIASES = {
    "input_length": "input_tokens",
    "output_length": "output_tokens",
    "timestamp": "created_time",
    "delay": "delay_ms",
}
_WHOLE_PROMPTS = ("message_array_with_responses", "message_array_without_responses")


class TraceError(ValueError):
    """A trace that cannot be read: names the place and what was expected."""


def read_trace(
    path: Path, *, block_tokens: int = MOONCAKE_BLOCK_TOKENS, max_requests: int | None = None, stagger: float = 0.0
) -> Trace:
    """Read a trace in any of the forms above.

    `block_tokens` is the block size of forms that do not state one. The first `max_requests` rows are read; None: all.
    Agent sessions start `stagger` seconds after one another, for their own clocks all start at 0.

    Raises:
        TraceError: not JSON, an unknown form, or a field that is missing or impossible.
        OSError: the file cannot be read.
    """
    reader = _Reader(block_tokens, stagger)
    for place, row in _rows(path):
        if max_requests is not None and len(reader.requests) >= max_requests:
            break
        if not isinstance(row, dict):
            raise TraceError(f"{place}: expected a JSON object, found {type(row).__name__}")
        try:
            reader.add(row)
        except TraceError as error:
            raise TraceError(f"{place}: {error}") from None
    if not reader.requests:
        raise TraceError(f"{path}: the trace holds no request")
    return Trace(name=path.stem, requests=tuple(reader.requests[:max_requests]))


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, JSON value) of every object in a folder, a JSON file or a JSONL file."""
    if path.is_dir():
        for file in sorted(p for p in path.iterdir() if p.suffix in (".json", ".jsonl")):
            yield from _rows(file)
        return
    if path.suffix == ".json":
        yield str(path), _parse(str(path), path.read_bytes())
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                place = f"{path}, line {number}"
                yield place, _parse(place, line)


def _parse(place: str, raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError as error:
        raise TraceError(f"{place}: not JSON: {error}") from None


class _Reader:
    """Requests made so far, and where each session stands."""

    def __init__(self, block_tokens: int, stagger: float) -> None:
        self.requests: list[SimRequest] = []
        self._block_tokens = block_tokens
        self._stagger = stagger
        self._last: dict[str, SimRequest] = {}
        self._num_sessions = 0

    def add(self, row: dict[str, Any]) -> None:
        if isinstance(row.get("requests"), list):
            self._add_agent_session(row)
        elif "input_length" in row or "input_tokens" in row:
            self._add_row(row)
        else:
            raise TraceError(
                "expected input_length and output_length, or an agent session with requests; rows with texts or "
                f"messages must be counted first. Found {sorted(row)}"
            )

    def _add_row(self, row: dict[str, Any]) -> None:
        session = row.get("session_id")
        last = None if session is None else self._last.get(str(session))
        request_id = f"r{len(self.requests)}"
        new = blocks(
            _count(row, "input_length", least=1),
            _hash_ids(row),
            block_tokens=_count(row, "block_size", least=1, default=self._block_tokens),
            namespace="",
            own=request_id,
        )
        # Delays and clocks are milliseconds here.
        request = SimRequest(
            request_id=request_id,
            prompt=new if last is None or row.get("context_mode") in _WHOLE_PROMPTS else last.conversation + new,
            answer=_answer(request_id, _count(row, "output_length", least=0)),
            kind="single" if session is None else "first turn" if last is None else "later turn",
            arrival=_number(row, "timestamp", default=0.0) / 1e3,
            after=() if last is None else (last.request_id,),
            delay=_number(row, "delay", default=0.0) / 1e3,
            session=None if session is None else str(session),
            key=str(row.get("group_id", "")),
            priority=int(_number(row, "priority", default=0.0)),
        )
        if session is not None:
            self._last[str(session)] = request
        self.requests.append(request)

    def _add_agent_session(self, row: dict[str, Any]) -> None:
        session = str(row.get("id", f"session{self._num_sessions}"))
        block_tokens = _count(row, "block_size", least=1)
        start = self._num_sessions * self._stagger
        self._num_sessions += 1
        before: list[SimRequest] = []
        last_end = None
        for entry in row["requests"]:
            if not isinstance(entry, dict):
                raise TraceError(f"requests: expected objects, found {entry!r}")
            if entry.get("type") == "subagent":
                agent = self._add_subagent(session, entry, block_tokens, start, before[:1], last_end)
                # The parent goes on when the agent has come back; one that was only launched is not waited for.
                if agent is not None and entry.get("status") != "async_launched":
                    before.append(agent)
                    last_end = None
                continue
            request = self._agent_request(entry, session, block_tokens, start, before, last_end, kind="agent")
            last_end = _end(entry)
            before = [request]

    def _add_subagent(
        self,
        session: str,
        entry: dict[str, Any],
        block_tokens: int,
        start: float,
        parent: list[SimRequest],
        last_end: float | None,
    ) -> SimRequest | None:
        name = f"{session}/{entry.get('agent_id', len(self.requests))}"
        last: SimRequest | None = None
        for inner in entry.get("requests", ()):
            if not isinstance(inner, dict):
                raise TraceError(f"requests of a subagent: expected objects, found {inner!r}")
            before = parent if last is None else [last]
            # Inner clocks are relative in some corpora and absolute in others; only their differences are used.
            timed = inner if last is not None else {**inner, "t": _number(entry, "t", default=0.0)}
            last = self._agent_request(
                timed, name, block_tokens, start, before, last_end, kind="subagent", scope=session
            )
            last_end = _end(inner)
        return last

    def _agent_request(
        self,
        entry: dict[str, Any],
        session: str,
        block_tokens: int,
        start: float,
        before: list[SimRequest],
        last_end: float | None,
        *,
        kind: str,
        scope: str | None = None,
    ) -> SimRequest:
        request_id = f"r{len(self.requests)}"
        time = _number(entry, "t", default=0.0)
        delay = _number(entry, "think_time", default=-1.0)
        if delay < 0.0:
            delay = 0.0 if last_end is None else max(0.0, time - last_end)
        request = SimRequest(
            request_id=request_id,
            prompt=blocks(
                _count(entry, "in", least=1),
                _hash_ids(entry),
                block_tokens=block_tokens,
                namespace=scope or session,
                own=request_id,
            ),
            answer=_answer(request_id, _count(entry, "out", least=0)),
            kind=kind,
            arrival=start if before else start + time,
            after=tuple(r.request_id for r in before),
            delay=delay if before else 0.0,
            session=session,
            key=scope or session,
        )
        self.requests.append(request)
        return request


def blocks(num_tokens: int, hash_ids: list[int], *, block_tokens: int, namespace: str, own: str) -> Text:
    """A prompt of `num_tokens` tokens whose blocks have the ids `hash_ids` in `namespace`.

    The last block may be shorter than the others; tokens without an id are the request's `own`.
    """
    hash_ids = hash_ids[: -(-num_tokens // block_tokens)]
    seeds = [seed_of("block", namespace, i) for i in hash_ids]
    lengths = [block_tokens] * len(seeds)
    rest = num_tokens - block_tokens * len(seeds)
    if rest < 0:
        lengths[-1] += rest
    elif rest > 0:
        seeds.append(seed_of("own", namespace, own))
        lengths.append(rest)
    return Text(seeds, lengths)


def _answer(request_id: str, num_tokens: int) -> Text:
    # An engine always answers with a token at least.
    return Text([seed_of("answer", request_id)], [max(1, num_tokens)])


def _end(entry: dict[str, Any]) -> float:
    return _number(entry, "t", default=0.0) + max(0.0, _number(entry, "api_time", default=0.0))


def _value(row: dict[str, Any], name: str) -> Any:
    value = row.get(name)
    return row.get(_ALIASES[name]) if value is None and name in _ALIASES else value


def _number(row: dict[str, Any], name: str, *, default: float) -> float:
    value = _value(row, name)
    if value is None:
        return default
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TraceError(f"{name}: expected a number, found {value!r}") from None


def _count(row: dict[str, Any], name: str, *, least: int, default: int | None = None) -> int:
    value = _value(row, name)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise TraceError(f"{name}: expected a whole number from {least} on, found {value!r}")
    return value


def _hash_ids(row: dict[str, Any]) -> list[int]:
    value = row.get("hash_ids") or []
    if not isinstance(value, list) or not all(isinstance(i, int) for i in value):
        raise TraceError("hash_ids: expected a list of whole numbers")
    return value
