"""What the measurements with long prompts share: a real server, prompts of token ids, and watches beside it.

Times are the client's, from before a request is sent until its answer comes in. Cores are shared, so the engine's CPU
seconds and the machine's load stand beside every wall time.
"""

import contextlib
import http.client
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.cost_model import active_parameters
from model.config import CSA_RATIO, HCA_RATIO, ModelConfig
from model.kv_layout import KVLayout
from model.presets import preset
from model.tools.make_checkpoint import make_checkpoint
from tests.e2e.conftest import LiveServer, launch

INDEX_HEADS = 4
"""Of the model that is measured: `nano` has 24 for comparisons with another implementation."""
_LETTER = 100
"""A token id that is an ASCII letter; sampled always, so that every token comes as a chunk of its own."""
_ANSWER_SECONDS = 4 * 3600.0
_TICKS = os.sysconf("SC_CLK_TCK")
NICENESS = -5


def long_model() -> ModelConfig:
    return replace(preset("nano"), index_n_heads=INDEX_HEADS)


def long_layout() -> KVLayout:
    return KVLayout(config=long_model(), row_format="float32", index_format="float32")


def prompt_ids(seed: int, count: int) -> list[int]:
    """Random bytes, as ids of the byte tokenizer."""
    return (3 + np.random.default_rng(seed).integers(0, 256, count)).tolist()


def cache_flags(*, device_tokens: int, host_bytes: int, max_model_len: int, num_seqs: int = 8) -> list[str]:
    """Flags of a server whose KV cache holds exactly the pages of `device_tokens` tokens beside its slots."""
    layout = long_layout()
    kv_bytes = layout.bytes_for(device_tokens) + num_seqs * layout.bytes_per_slot
    flags = {
        "--kv-cache-bytes": kv_bytes,
        "--host-cache-bytes": host_bytes,
        "--max-model-len": max_model_len,
        "--max-num-seqs": num_seqs,
    }
    return [str(part) for pair in flags.items() for part in pair]


@contextmanager
def long_server(home: Path, *flags: str, num_threads: int | None = None) -> Iterator[LiveServer]:
    """A server process with the small model, on all cores."""
    model_dir = home / "nano-long"
    if not model_dir.exists():
        make_checkpoint(long_model(), 0, "f32", model_dir)
    threads = num_threads or os.cpu_count() or 1
    with launch(home, str(model_dir), "--num-threads", str(threads), *flags) as live:
        yield live


def go_first() -> int:
    """Raise this process, and with it the servers that it starts; returns the niceness it has then.

    Where the kernel groups processes by session, niceness only counts within the group: a measurement in a session of
    its own (`setsid`) raises that too.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
        if os.getsid(0) == os.getpid():
            Path("/proc/self/autogroup").write_text(str(NICENESS))
    return os.getpriority(os.PRIO_PROCESS, 0)


@dataclass(slots=True, kw_only=True)
class Answer:
    """One streamed answer; times are seconds since the request was sent."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    miss_reason: str | None = None
    token_ids: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)

    @property
    def ttft_seconds(self) -> float:
        return self.token_times[0]

    @property
    def gaps(self) -> list[float]:
        """Seconds between one token and the next."""
        return [later - earlier for earlier, later in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def computed_tokens(self) -> int:
        """Known to the engine when it ended: the last token is sampled and never computed."""
        return self.prompt_tokens + len(self.token_ids) - 1


def complete(live: LiveServer, ids: Sequence[int], *, max_tokens: int) -> Answer:
    """A greedy completion of token ids."""
    answer = _stream(live, "/v1/completions", {"prompt": list(ids), "max_tokens": max_tokens})
    # What was sampled is known, see `_stream`.
    answer.token_ids = [_LETTER] * max_tokens
    return answer


def chat(live: LiveServer, text: str, *, max_tokens: int) -> Answer:
    """A greedy answer to one message."""
    body = {"messages": [{"role": "user", "content": text}], "thinking": {"type": "disabled"}}
    return _stream(live, "/v1/chat/completions", {**body, "max_tokens": max_tokens})


def _stream(live: LiveServer, path: str, body: dict[str, Any]) -> Answer:
    greedy = {"temperature": 0, "ignore_eos": True, "logit_bias": {str(_LETTER): 100}}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    raw = json.dumps({"model": live.model, **body, **greedy, **streamed}, separators=(",", ":")).encode()
    host, port = live.url.removeprefix("http://").split(":")
    answer = Answer()
    connection = http.client.HTTPConnection(host, int(port), timeout=_ANSWER_SECONDS)
    try:
        began = time.monotonic()
        connection.request("POST", path, raw, {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        for line in response:
            if line.strip() == b"data: [DONE]":
                break
            if line.startswith(b"data: "):
                _read_chunk(answer, json.loads(line[len(b"data: ") :]), time.monotonic() - began)
        else:
            raise AssertionError("the stream broke off")
    finally:
        connection.close()
    assert len(answer.token_times) == body["max_tokens"], f"{len(answer.token_times)} tokens came"
    return answer


def _read_chunk(answer: Answer, chunk: dict[str, Any], seconds: float) -> None:
    assert "error" not in chunk, chunk
    for choice in chunk["choices"]:
        text = choice["text"] if "text" in choice else choice["delta"].get("content")
        answer.token_times += [seconds] * len(text or "")
    if chunk.get("usage"):
        _read_usage(answer, chunk["usage"])


def _read_usage(answer: Answer, usage: dict[str, Any]) -> None:
    answer.prompt_tokens = usage["prompt_tokens"]
    answer.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
    answer.miss_reason = usage.get("cache_miss_reason")


class Watch:
    """Calls a function about every `seconds` on a thread of its own, until it is left."""

    def __init__(self, look: Callable[[], None], seconds: float) -> None:
        self._look = look
        self._seconds = seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._over.wait(self._seconds):
            self._look()


class Memory:
    """Resident bytes of a server, its engine and what other processes it has."""

    def __init__(self, live: LiveServer) -> None:
        self._live = live
        self.most_bytes: dict[str, int] = {}
        """The most that was seen at one moment: of all together, and of each."""

    def look(self) -> None:
        found = {self._live.process.pid: "server"}
        found |= dict.fromkeys(self._live.descendants(), "others") | {engine_pid(self._live): "engine"}
        now = {"all processes": 0, "server": 0, "engine": 0, "others": 0}
        for pid, name in found.items():
            num_bytes = _resident_bytes(pid)
            now[name] += num_bytes
            now["all processes"] += num_bytes
        self.most_bytes = {name: max(num_bytes, self.most_bytes.get(name, 0)) for name, num_bytes in now.items()}


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a prefill stood."""

    seconds: float
    cpu_seconds: float
    tokens: int
    load: float


class Progress:
    """Prompt tokens computed over time."""

    def __init__(self, live: LiveServer) -> None:
        self._live = live
        self._began = time.monotonic()
        self._cpu = engine_cpu_seconds(live)
        self._tokens = int(live.metric("vllm:prompt_tokens_total"))
        self.moments: list[Moment] = []

    def look(self) -> None:
        tokens = int(self._live.metric("vllm:prompt_tokens_total")) - self._tokens
        seconds, cpu_seconds = time.monotonic() - self._began, engine_cpu_seconds(self._live) - self._cpu
        self.moments.append(Moment(seconds, cpu_seconds, tokens, os.getloadavg()[0]))

    def pace(self, model: ModelConfig, *, num_tokens: int, block: int) -> list[dict[str, float]]:
        """For each `block` tokens of the prompt: seconds, CPU seconds, FLOPs by formula, and what follows."""
        tokens = [m.tokens for m in self.moments]
        # A prompt that has just arrived has no token computed until its first step is over.
        first = max(0, sum(n == 0 for n in tokens) - 1)
        kept = self.moments[first:]
        rows = []
        for start in range(0, num_tokens, block):
            end = min(start + block, num_tokens)
            wall, cpu, load = (
                np.interp([start, end], [m.tokens for m in kept], [value(m) for m in kept])
                for value in (_seconds, _cpu_seconds, _load)
            )
            seconds, cpu_seconds = float(wall[1] - wall[0]), float(cpu[1] - cpu[0])
            gflops = prefill_flops(model, start, end) / 1e9
            rows.append(
                {
                    "tokens": end,
                    "seconds": round(seconds, 2),
                    "engine_cpu_seconds": round(cpu_seconds, 2),
                    "tokens_per_second": round((end - start) / seconds, 1),
                    "gflop": round(gflops, 1),
                    "gflop_per_second": round(gflops / seconds, 2),
                    "gflop_per_cpu_second": round(gflops / cpu_seconds, 2),
                    "load_average": round(float(load.mean()), 2),
                }
            )
        return rows


def _seconds(moment: Moment) -> float:
    return moment.seconds


def _cpu_seconds(moment: Moment) -> float:
    return moment.cpu_seconds


def _load(moment: Moment) -> float:
    return moment.load


def token_flops(model: ModelConfig) -> tuple[float, float, int, int]:
    """FLOPs of one prompt token as (constant, per token of context, window, selected entries): see `prefill_flops`."""
    heads, width = 4 * model.num_attention_heads * model.head_dim, model.hc_mult * model.hidden_size
    mixes = 2 * model.num_hidden_layers * 2 * width * model.hc_mult * (2 + model.hc_mult)
    num_csa, num_hca = len(model.layers_of("csa")), len(model.layers_of("hca"))
    index = num_csa * 2 * model.index_n_heads * model.index_head_dim / CSA_RATIO
    constant = 2.0 * active_parameters(model) + mixes
    return (
        constant,
        index + num_hca * heads / HCA_RATIO,
        heads * model.num_hidden_layers,
        heads * num_csa,
    )


def prefill_flops(model: ModelConfig, start: int, end: int) -> float:
    """FLOPs of the prompt tokens start .. end, products only (a multiplication and an addition are two).

    token at context n:  2 * active parameters + hyper-connection mixes
                         + 4 H C layers min(n, window)                          window rows, scores and sums
                         + csa layers * (2 I J n / 4 + 4 H C min(n / 4, topk))  index scores, selected entries
                         + hca layers * 4 H C n / 128                           all entries
    """
    constant, per_context, per_window_row, per_entry = token_flops(model)
    n = np.arange(start + 1, end + 1, dtype=np.float64)
    window = np.minimum(n, model.sliding_window).sum() * per_window_row
    selected = np.minimum(n / CSA_RATIO, model.index_topk).sum() * per_entry
    return float(constant * len(n) + per_context * n.sum() + window + selected)


def engine_pid(live: LiveServer) -> int:
    """The process among the server's descendants that computes."""
    (pid,) = (pid for pid in live.descendants() if b"engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return pid


def engine_cpu_seconds(live: LiveServer) -> float:
    """User and system time of the engine's process."""
    fields = Path(f"/proc/{engine_pid(live)}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _resident_bytes(pid: int) -> int:
    """0 for a process that has just gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return 1024 * int(line.split()[1])
    return 0


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, int(np.ceil(share * len(ordered))) - 1)]


def machine() -> dict[str, Any]:
    return {
        "num_cores": os.cpu_count(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "cpu": _cpu_name(),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def write_part(path: Path, name: str, part: Any) -> None:
    """Replace one part of a result file, or take it out (None), and keep the others."""
    result = json.loads(path.read_text()) if path.exists() else {}
    result.pop(name, None)
    if part is not None:
        result[name] = part
    path.write_text(json.dumps(result, indent=1) + "\n")


def medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}
