"""What a streamed token costs in the API process: `python -m tests.bench.bench_frontend [--json FILE]`.

Three processes: the server as `fathom serve` runs it, an engine, and a client with 64 streams of chat completions.

    paced       an engine of this file sends one token to each stream at a fixed pace and notes when it did;
                gives CPU seconds of the server for a token, and how late tokens reach the client
    simulated   `fathom serve --simulate`, as fast as the engine makes steps

Tokens for each second of CPU time is what one core serves: on a machine that others use, wall time says less.
"""

import argparse
import asyncio
import functools
import json
import mmap
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvloop
import zmq

from engine.messages import (
    PROTOCOL_VERSION,
    AddRequest,
    EngineInfo,
    EngineStats,
    Shutdown,
    StepOutputs,
    decode_to_engine,
    encode,
    pack_ids,
)
from engine.process import LaunchConfig, start_engine
from model.config import load_config
from model.presets import preset
from model.tools.byte_tokenizer import save_byte_tokenizer

RESULTS = Path(__file__).parent / "results" / "frontend.json"
NUM_STREAMS = 64
_LETTER = b"~"
"""What every token says; it is nowhere else in a chunk."""
_LETTER_ID = 3 + ord("~")


def run_engine(directory: Path, steps_per_second: float, num_steps: int) -> None:
    """Speak the engine's protocol: once all requests are there, a token for each of them at every tick."""
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=LaunchConfig)
    model = load_config(Path(launch.config.model_dir))
    context = zmq.Context()
    output, source = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    output.connect(launch.output_address)
    source.bind(launch.input_address)
    info = EngineInfo(
        protocol_version=PROTOCOL_VERSION,
        model_dir=launch.config.model_dir,
        vocab_size=model.vocab_size,
        max_model_len=65536,
        eos_token_id=1,
        page_tokens=256,
        num_pages=10_000,
        num_slots=256,
        kv_bytes_per_page=1,
        dtype="float32",
        kv_cache_dtype="float32",
        numerics="plain",
        pid=os.getpid(),
    )
    output.send(encode(info))
    with open(directory / "times", "r+b") as file:
        sent_at = np.frombuffer(mmap.mmap(file.fileno(), 8 * num_steps), dtype=np.float64)
    while True:
        ids: list[str] = []
        while len(ids) < NUM_STREAMS:
            message = decode_to_engine(source.recv())
            if isinstance(message, Shutdown):
                return
            if isinstance(message, AddRequest):
                ids.append(message.request_id)
        _send_steps(output, tuple(ids), sent_at, steps_per_second)


def _send_steps(output: Any, ids: tuple[str, ...], sent_at: np.ndarray, steps_per_second: float) -> None:
    count, begin = len(ids), time.monotonic() + 0.5
    for step in range(len(sent_at)):
        last = step == len(sent_at) - 1
        frame = StepOutputs(
            request_ids=ids,
            cu_tokens=tuple(range(count + 1)),
            token_ids=pack_ids([_LETTER_ID] * count),
            finish=(("length" if last else None),) * count,
            stop_ids=(None,) * count,
            cached_tokens=(0,) * count,
            logprobs=(None,) * count,
            errors=(None,) * count,
            queued_seconds=(0.0,) * count,
            stats=EngineStats(step_id=step, num_running=0 if last else count),
            miss_reasons=(None,) * count,
        )
        raw = encode(frame)
        time.sleep(max(0.0, begin + step / steps_per_second - time.monotonic()))
        sent_at[step] = time.monotonic()
        output.send(raw)


class Stream(asyncio.Protocol):
    """One chat completion: counts tokens as they come."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.received: list[tuple[float, int]] = []
        """(monotonic seconds, tokens)."""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        count = data.count(_LETTER)
        if count or not self.received:
            self.received.append((time.monotonic(), count))
        if b"data: [DONE]" in data and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the stream ended early"))


@dataclass
class Server:
    process: subprocess.Popen[str]
    port: int

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Round:
    tokens: int
    seconds: float
    cpu_seconds: float
    latencies: list[float] = field(default_factory=list)


async def one_round(server: Server, num_tokens: int, sent_at: np.ndarray | None) -> Round:
    body = json.dumps(
        {
            "model": "sim",
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "ignore_eos": True,
            "max_tokens": num_tokens,
            "thinking": {"type": "disabled"},
            "temperature": 0,
        }
    ).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}"
    loop = asyncio.get_running_loop()
    streams = []
    for _ in range(NUM_STREAMS):
        make = functools.partial(Stream, head.encode() + b"\r\n\r\n" + body)
        streams.append((await loop.create_connection(make, "127.0.0.1", server.port))[1])
    while not all(stream.received for stream in streams):
        await asyncio.sleep(0.001)
    begin, cpu = time.monotonic(), server.cpu_seconds()
    await asyncio.gather(*(stream.done for stream in streams))
    seconds, cpu = time.monotonic() - begin, server.cpu_seconds() - cpu
    result = Round(NUM_STREAMS * num_tokens, seconds, cpu)
    if sent_at is not None:
        result.seconds = time.monotonic() - float(sent_at[0])
        for stream in streams:
            token = 0
            for at, count in stream.received:
                result.latencies += [at - float(sent_at[n]) for n in range(token, token + count)]
                token += count
            assert token == num_tokens
    return result


def start_server(model_dir: Path, *flags: str) -> Server:
    command = [sys.executable, "-m", "tests.bench.bench_frontend", "--role", "server", str(model_dir), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    port = re.search(r"http://127.0.0.1:(\d+)", line)
    assert port is not None, line
    return Server(process, int(port[1]))


def run_server(model_dir: str, engine: list[str]) -> int:
    """`fathom serve`, with the engine of this file when it has arguments."""
    import server.launch
    from server.cli import main

    if engine:
        command = (sys.executable, "-m", "tests.bench.bench_frontend", "--role", "engine", *engine)
        server.launch.start_engine = functools.partial(start_engine, command=command)
    return main(["serve", model_dir, "--simulate", "--port", "0", "--max-num-seqs", "128"])


def measure(kind: str, num_tokens: int, rate: float, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        directory, model_dir = Path(name), Path(name) / "sim"
        model_dir.mkdir()
        (model_dir / "config.json").write_text(json.dumps(preset("nano").to_dict()), encoding="utf-8")
        save_byte_tokenizer(model_dir, model_max_length=65536)
        (directory / "times").write_bytes(bytes(8 * num_tokens))
        engine = [name, str(rate / NUM_STREAMS), str(num_tokens)] if kind == "paced" else []
        server = start_server(model_dir, *engine)
        try:
            sent_at = np.memmap(directory / "times", dtype=np.float64, mode="r") if engine else None

            async def run() -> list[Round]:
                await one_round(server, num_tokens, None)  # warm
                return [await one_round(server, num_tokens, sent_at) for _ in range(rounds)]

            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                results = runner.run(run())
        finally:
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(20)
    per_cpu = [r.tokens / r.cpu_seconds for r in results]
    row: dict[str, Any] = {
        "engine": kind,
        "streams": NUM_STREAMS,
        "tokens": sum(r.tokens for r in results),
        "tokens_per_cpu_second": round(statistics.median(per_cpu)),
        "tokens_per_cpu_second_rounds": [round(value) for value in per_cpu],
        "tokens_per_second": round(statistics.median(r.tokens / r.seconds for r in results)),
    }
    if kind == "paced":
        row["asked_tokens_per_second"] = rate
        row["added_latency_ms_rounds"] = [
            {f"p{q}": round(1000 * float(np.percentile(r.latencies, q)), 2) for q in (50, 95, 99)} for r in results
        ]
        row["added_latency_p99_ms"] = min(r["p99"] for r in row["added_latency_ms_rounds"])
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", choices=("client", "server", "engine"), default="client")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--tokens", type=int, default=1500, help="of each stream")
    parser.add_argument("--rate", type=float, nargs="*", default=[5_000, 15_000], help="tokens a second, paced")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("rest", nargs="*")
    arguments = parser.parse_args()
    if arguments.role == "server":
        return run_server(arguments.rest[0], arguments.rest[1:])
    if arguments.role == "engine":
        directory, rate, num_steps = arguments.rest
        run_engine(Path(directory), float(rate), int(num_steps))
        return 0
    rows = [measure("paced", arguments.tokens, rate, arguments.rounds) for rate in arguments.rate]
    rows.append(measure("simulated", arguments.tokens, 0.0, arguments.rounds))
    report = {
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
        },
        "python": platform.python_version(),
        "rows": rows,
    }
    print(json.dumps(report, indent=1))
    arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
