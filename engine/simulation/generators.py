"""Made-up traffic, from a seed: the same arguments give the same trace everywhere.

Lengths are log-normal around a mean (sigma 0.6), arrivals Poisson. Shapes after kv-and-scheduling 1.3 and 7.3.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from engine.simulation.workload import SimRequest, Text, Trace, merge, seed_of

_SIGMA = 0.6


def chat_and_long(
    *,
    seconds: float,
    chat_rate: float = 1.6,
    chat_tokens: int = 5000,
    chat_answer: int = 300,
    context_tokens: int = 0,
    long_every: float = 300.0,
    long_tokens: int = 1_000_000,
    long_answer: int = 500,
    num_keys: int = 8,
    seed: int = 0,
) -> Trace:
    """Agent-like short requests with `chat_tokens` uncached tokens on average, and a cold long prompt now and then.

    With `context_tokens` the short requests of a key begin with that many common tokens, which a cache can skip. The
    first long prompt comes after half of `long_every`.
    """
    rng = np.random.default_rng(seed)
    requests: list[SimRequest] = []
    for i, at in enumerate(_arrivals(rng, chat_rate, seconds)):
        chat = _single(f"chat{i}", "chat", at, _length(rng, chat_tokens), _length(rng, chat_answer), seed, i % num_keys)
        if context_tokens:
            common = Text([seed_of(seed, "context", i % num_keys)], [context_tokens])
            chat = replace(chat, prompt=common + chat.prompt)
        requests.append(chat)
    requests += [
        _single(f"long{i}", "long", float(at), long_tokens, long_answer, seed, num_keys)
        for i, at in enumerate(np.arange(long_every / 2, seconds, long_every))
    ]
    return Trace(name="chat and long", requests=tuple(requests))


def agent_sessions(
    *,
    seconds: float,
    session_rate: float = 0.08,
    turns: int = 20,
    system_tokens: int = 12_000,
    first_tokens: int = 20_000,
    new_tokens: int = 5000,
    answer: int = 400,
    think_seconds: float = 8.0,
    most_tokens: int = 500_000,
    seed: int = 0,
) -> Trace:
    """Coding agents: sessions that begin with one common system prompt and grow turn by turn, each turn after a pause
    (exponential, `think_seconds` on average) until `turns` or `most_tokens` are reached.
    """
    rng = np.random.default_rng(seed)
    system = Text([seed_of(seed, "system")], [system_tokens])
    requests: list[SimRequest] = []
    for i, at in enumerate(_arrivals(rng, session_rate, seconds)):
        start = system + Text([seed_of(seed, "agent", i)], [_length(rng, first_tokens)])
        requests += _session(
            f"agent{i}",
            "agent",
            float(at),
            start,
            turns=turns,
            new_tokens=lambda: _length(rng, new_tokens),
            answer=lambda: _length(rng, answer),
            pause=lambda: float(rng.exponential(think_seconds)),
            most_tokens=most_tokens,
            seed=seed,
        )
    return Trace(name="agent sessions", requests=tuple(requests))


def agents_and_long(*, seconds: float, long_every: float = 300.0, seed: int = 0) -> Trace:
    """Agent sessions beside a cold 1M prompt every `long_every` seconds."""
    longs = chat_and_long(seconds=seconds, chat_rate=0.0, long_every=long_every, seed=seed)
    return merge("agents and long", agent_sessions(seconds=seconds, seed=seed), longs)


def interleaved_sessions(
    *,
    num_sessions: int,
    turns: int = 4,
    context_tokens: int = 1_000_000,
    new_tokens: int = 2000,
    answer: int = 300,
    pause_seconds: float = 30.0,
    seed: int = 0,
) -> Trace:
    """`num_sessions` long sessions that start together and take turns."""
    requests: list[SimRequest] = []
    for i in range(num_sessions):
        requests += _session(
            f"session{i}",
            "session",
            float(i),
            Text([seed_of(seed, "context", i)], [context_tokens]),
            turns=turns,
            new_tokens=lambda: new_tokens,
            answer=lambda: answer,
            pause=lambda: pause_seconds,
            most_tokens=context_tokens + turns * (new_tokens + answer),
            seed=seed,
        )
    return Trace(name="interleaved sessions", requests=tuple(requests))


def fan_out(
    *,
    num_requests: int,
    system_tokens: int = 30_000,
    question_tokens: int = 400,
    answer: int = 200,
    rate: float = 20.0,
    seed: int = 0,
) -> Trace:
    """Many short questions behind one system prompt, faster than the first of them can be computed."""
    rng = np.random.default_rng(seed)
    system = Text([seed_of(seed, "system")], [system_tokens])
    requests: list[SimRequest] = []
    at = 0.0
    for i in range(num_requests):
        own = _single(f"fan{i}", "fan-out", at, _length(rng, question_tokens), _length(rng, answer), seed, i % 4)
        requests.append(replace(own, prompt=system + own.prompt))
        at += float(rng.exponential(1.0 / rate))
    return Trace(name="fan-out", requests=tuple(requests))


def cancel_storm(
    *,
    num_requests: int,
    rate: float = 10.0,
    prompt_tokens: int = 20_000,
    answer: int = 500,
    cancelled: float = 0.7,
    patience_seconds: float = 2.0,
    seed: int = 0,
) -> Trace:
    """Clients that go away: a share `cancelled` of the requests is aborted after an exponential time, in all states."""
    rng = np.random.default_rng(seed)
    requests: list[SimRequest] = []
    at = 0.0
    for i in range(num_requests):
        patience = float(rng.exponential(patience_seconds)) if rng.random() < cancelled else None
        own = _single(f"storm{i}", "storm", at, _length(rng, prompt_tokens), _length(rng, answer), seed, i % 4)
        requests.append(replace(own, cancel_after=patience))
        at += float(rng.exponential(1.0 / rate))
    return Trace(name="cancel storm", requests=tuple(requests))


GENERATORS: dict[str, Callable[..., Trace]] = {
    "chat-and-long": chat_and_long,
    "agent-sessions": agent_sessions,
    "agents-and-long": agents_and_long,
    "interleaved-sessions": interleaved_sessions,
    "fan-out": fan_out,
    "cancel-storm": cancel_storm,
}


def _session(
    name: str,
    kind: str,
    at: float,
    prompt: Text,
    *,
    turns: int,
    new_tokens: Callable[[], int],
    answer: Callable[[], int],
    pause: Callable[[], float],
    most_tokens: int,
    seed: int,
) -> list[SimRequest]:
    requests: list[SimRequest] = []
    for turn in range(turns):
        request = SimRequest(
            request_id=f"{name}.{turn}",
            prompt=prompt,
            answer=Text([seed_of(seed, name, "answer", turn)], [answer()]),
            kind=f"{kind} first" if turn == 0 else kind,
            arrival=at if turn == 0 else 0.0,
            after=(requests[-1].request_id,) if requests else (),
            delay=pause() if requests else 0.0,
            session=name,
            key=name,
        )
        requests.append(request)
        prompt = request.conversation + Text([seed_of(seed, name, "turn", turn + 1)], [new_tokens()])
        if prompt.num_tokens > most_tokens:
            break
    return requests


def _single(name: str, kind: str, at: float, prompt: int, answer: int, seed: int, key: int) -> SimRequest:
    return SimRequest(
        request_id=name,
        prompt=Text([seed_of(seed, name)], [prompt]),
        answer=Text([seed_of(seed, name, "answer")], [answer]),
        kind=kind,
        arrival=float(at),
        key=f"key{key}",
    )


def _arrivals(rng: np.random.Generator, rate: float, seconds: float) -> np.ndarray:
    """float64: Poisson arrivals in 0 .. seconds."""
    if rate <= 0.0:
        return np.empty(0)
    gaps = rng.exponential(1.0 / rate, size=max(16, int(2 * rate * seconds) + 100))
    times = np.cumsum(gaps)
    return times[times < seconds]


def _length(rng: np.random.Generator, mean: int) -> int:
    """A log-normal length with the given mean, at least 1."""
    return max(1, int(rng.lognormal(np.log(mean) - _SIGMA**2 / 2, _SIGMA)))
