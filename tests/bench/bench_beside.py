"""Short chats beside a long prompt: `python -m tests.bench.bench_beside`.

Writes tests/bench/results/beside-cpu.json. One run, on one server:

    idle      a chat every second on an idle server
    alone     a cold long prompt
    beside    another one, with a chat every second until its first token

Reported are the medians of the runs over their limits. TTFT and ITL are the client's. The model is `nano` with 4 index
heads; `--tokens` makes it short.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from engine.config import CPU_STEP_SECONDS
from tests.bench.long_server import (
    Answer,
    cache_flags,
    chat,
    complete,
    engine_cpu_seconds,
    go_first,
    long_server,
    machine,
    medians,
    percentile,
    prompt_ids,
    write_part,
)
from tests.e2e.conftest import LiveServer

OUT = Path(__file__).parent / "results" / "beside-cpu.json"
CHAT_TOKENS = 16
CHAT_SECONDS = 1.0
SPARE_TOKENS = 8192
IDLE_CHATS = 60


class Chats:
    """Sends a chat every second, whether the ones before have been answered or not, until it is left."""

    def __init__(self, live: LiveServer, name: str) -> None:
        self.answers: list[Answer] = []
        self.errors: list[str] = []
        self._live = live
        self._name = name
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._clock = threading.Thread(target=self._send, daemon=True)

    def __enter__(self) -> "Chats":
        self._clock.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._clock.join()
        for thread in self._threads:
            thread.join()
        assert not self.errors, self.errors[0]

    def _send(self) -> None:
        due = time.monotonic()
        while not self._over.is_set():
            text = f"{self._name}: question {len(self._threads)}, what is it this time?"
            self._threads.append(threading.Thread(target=self._ask, args=(text,), daemon=True))
            self._threads[-1].start()
            due += CHAT_SECONDS
            self._over.wait(max(0.0, due - time.monotonic()))

    def _ask(self, text: str) -> None:
        try:
            self.answers.append(chat(self._live, text, max_tokens=CHAT_TOKENS))
        except Exception as error:
            self.errors.append(f"{type(error).__name__}: {error}")

    def summary(self) -> dict[str, float]:
        ttft = [answer.ttft_seconds for answer in self.answers]
        itl = [gap for answer in self.answers for gap in answer.gaps]
        return {
            "chats": len(self.answers),
            **{f"ttft_p{round(100 * q)}_seconds": round(percentile(ttft, q), 4) for q in (0.5, 0.9, 0.99)},
            **{f"itl_p{round(100 * q)}_seconds": round(percentile(itl, q), 4) for q in (0.5, 0.9, 0.99)},
        }


def measure(home: Path, num_tokens: int, *, run: int = 0, idle_chats: int = IDLE_CHATS) -> dict[str, Any]:
    """One run: what idle, alone and beside took, and the three figures that have limits."""
    max_model_len = num_tokens + SPARE_TOKENS
    flags = [
        *cache_flags(device_tokens=3 * max_model_len, host_bytes=256 << 20, max_model_len=max_model_len, num_seqs=32),
        *("--step-seconds", str(CPU_STEP_SECONDS)),
        # The prompt is long whatever its length in this run.
        *("--long-prompt-tokens", str(min(262_144, num_tokens))),
    ]
    with long_server(home, *flags) as live:
        before = machine()
        complete(live, prompt_ids(100 + run, 3000), max_tokens=16)
        with Chats(live, f"idle {run}") as idle:
            time.sleep(idle_chats * CHAT_SECONDS)
        cpu = [engine_cpu_seconds(live)]
        alone = complete(live, prompt_ids(200 + run, num_tokens), max_tokens=1)
        cpu.append(engine_cpu_seconds(live))
        between = machine()
        with Chats(live, f"beside {run}") as beside:
            long = complete(live, prompt_ids(300 + run, num_tokens), max_tokens=1)
        cpu.append(engine_cpu_seconds(live))
        on_idle, with_long = idle.summary(), beside.summary()
        return {
            "machine": before,
            "load_average_between": between["load_average"],
            "load_average_after": machine()["load_average"],
            "flags": " ".join(flags),
            "prompt_tokens": num_tokens,
            "idle": on_idle,
            "beside": with_long,
            "long_alone_seconds": round(alone.ttft_seconds, 2),
            "long_alone_cpu_seconds": round(cpu[1] - cpu[0], 2),
            "long_beside_seconds": round(long.ttft_seconds, 2),
            "long_beside_cpu_seconds": round(cpu[2] - cpu[1], 2),
            "figures": {
                # Over the limit of 2 x idle + one step, so 1 is the most that is allowed; the same below.
                "ttft_p99_of_limit": with_long["ttft_p99_seconds"]
                / (2 * on_idle["ttft_p99_seconds"] + CPU_STEP_SECONDS),
                "itl_p99_of_limit": with_long["itl_p99_seconds"] / (1.3 * CPU_STEP_SECONDS),
                "long_seconds_of_limit": long.ttft_seconds / (2.5 * alone.ttft_seconds),
            },
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--idle-chats", type=int, default=IDLE_CHATS)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    go_first()
    runs = []
    with tempfile.TemporaryDirectory() as home:
        for run in range(args.runs):
            runs.append(measure(Path(home), args.tokens, run=run, idle_chats=args.idle_chats))
            print(json.dumps(runs[-1], indent=1), flush=True)
            write_part(args.out, "medians_of_limits", medians([r["figures"] for r in runs]))
            write_part(args.out, "runs", runs)


if __name__ == "__main__":
    main()
