"""A prompt of a million tokens through HTTP, and two sessions in turns: `python -m tests.bench.bench_million`.

Writes tests/bench/results/million-cpu.json, a part at a time:

    million          one cold prompt, tokens/s and FLOP/s for each tenth of it, memory of all processes, a second turn
    two_in_memory    two sessions in turns, all pages on the device
    two_with_host    the same with device pages for one of them only

The model is `nano` with 4 index heads. Lengths are arguments, so that everything can be tried in a minute.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.long_server import (
    Answer,
    Memory,
    Progress,
    Watch,
    cache_flags,
    complete,
    go_first,
    long_layout,
    long_model,
    long_server,
    machine,
    prompt_ids,
    write_part,
)

OUT = Path(__file__).parent / "results" / "million-cpu.json"
ANSWER_TOKENS = 8
NEXT_TOKENS = 100
"""What the user says in a later turn."""
SPARE_TOKENS = 1024
NUM_BLOCKS = 10


def measure_million(
    home: Path,
    num_tokens: int = 1_000_000,
    max_model_len: int = 1 << 20,
    note: Callable[[Any], None] = lambda so_far: None,
) -> dict[str, Any]:
    """A cold prompt and a second turn; `note` hears every minute how far it is."""
    block = -(-num_tokens // NUM_BLOCKS)
    ids = prompt_ids(1, num_tokens)
    flags = cache_flags(device_tokens=max_model_len, host_bytes=256 << 20, max_model_len=max_model_len)
    with long_server(home, *flags) as live:
        before, memory, progress = machine(), Memory(live), Progress(live)

        def so_far() -> None:
            done = progress.moments[-1].tokens // block * block
            pace = progress.pace(long_model(), num_tokens=done, block=block)
            note({"machine": before, "most_resident_bytes": memory.most_bytes, "pace": pace})

        with Watch(memory.look, 1.0), Watch(progress.look, 2.0), Watch(so_far, 60.0):
            cold = complete(live, ids, max_tokens=ANSWER_TOKENS)
        with Watch(memory.look, 0.1):
            second = complete(live, next_turn(ids, cold, seed=2), max_tokens=ANSWER_TOKENS)
        return {
            "machine": before,
            "flags": " ".join(flags),
            "prompt_tokens": cold.prompt_tokens,
            "max_model_len": max_model_len,
            "ttft_seconds": round(cold.ttft_seconds, 3),
            "tokens_per_second": round(num_tokens / cold.ttft_seconds, 1),
            "most_resident_bytes": memory.most_bytes,
            "pace": progress.pace(long_model(), num_tokens=num_tokens, block=block),
            "second_turn": turn_of(cold, cold, second),
        }


def measure_two_sessions(home: Path, num_tokens: int, device_tokens: int, num_turns: int = 3) -> dict[str, Any]:
    """Two sessions that take turns; the device holds pages of `device_tokens` tokens, the host those of both."""
    session_tokens = num_tokens + SPARE_TOKENS
    # A quarter of it is for snapshots, of which a session has several.
    host_bytes = 2 * long_layout().bytes_for(2 * session_tokens) + (32 << 20)
    flags = cache_flags(device_tokens=device_tokens, host_bytes=host_bytes, max_model_len=session_tokens)
    with long_server(home, *flags) as live:
        before, memory = machine(), Memory(live)
        sessions = [prompt_ids(seed, num_tokens) for seed in (3, 4)]
        answers: list[list[Answer]] = [[], []]
        turns = []
        with Watch(memory.look, 1.0):
            for turn in range(num_turns):
                for n, given in enumerate(answers):
                    if given:
                        sessions[n] = next_turn(sessions[n], given[-1], seed=10 * turn + n)
                    answer = complete(live, sessions[n], max_tokens=ANSWER_TOKENS)
                    turns.append({"session": n, "turn": turn, "ttft_seconds": round(answer.ttft_seconds, 3)})
                    if given:
                        turns[-1].update(turn_of(given[0], given[-1], answer))
                    given.append(answer)
        return {
            "machine": before,
            "flags": " ".join(flags),
            "prompt_tokens": num_tokens,
            "device_tokens": device_tokens,
            "page_bytes": long_layout().bytes_per_page,
            "turns": turns,
            "moved_bytes": int(live.metric("fathom_moved_bytes_total")),
            "most_resident_bytes": memory.most_bytes,
        }


def next_turn(ids: list[int], answer: Answer, *, seed: int) -> list[int]:
    return ids + answer.token_ids + prompt_ids(seed, NEXT_TOKENS)


def turn_of(first: Answer, earlier: Answer, later: Answer) -> dict[str, Any]:
    """How a later turn went, beside the session's first; what could be cached is what the turn before had computed."""
    return {
        "ttft_seconds": round(later.ttft_seconds, 3),
        "share_of_first_ttft": round(later.ttft_seconds / first.ttft_seconds, 5),
        "cached_tokens": later.cached_tokens,
        "could_be_cached": earlier.computed_tokens,
        "miss_reason": later.miss_reason,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["million", "two_in_memory", "two_with_host"])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--session-tokens", type=int, default=300_000)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    go_first()
    session = args.session_tokens + SPARE_TOKENS
    parts = {
        "million": lambda home: measure_million(
            home,
            args.tokens,
            args.tokens + (1 << 20) - 1_000_000,
            lambda so_far: write_part(args.out, "million_unfinished", so_far),
        ),
        "two_in_memory": lambda home: measure_two_sessions(home, args.session_tokens, 2 * session),
        "two_with_host": lambda home: measure_two_sessions(home, args.session_tokens, session),
    }
    with tempfile.TemporaryDirectory() as home:
        for name in args.parts:
            result = parts[name](Path(home))
            write_part(args.out, name, result)
            write_part(args.out, f"{name}_unfinished", None)
            print(name, json.dumps(result, indent=1), flush=True)


if __name__ == "__main__":
    main()
