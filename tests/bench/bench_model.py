"""Prefill and decode of one model, Fathom beside transformers, in one run on the same weights' shapes.

    python tests/bench/bench_model.py [--preset mini] [--dtype bfloat16] [--out tests/bench/results/model-cpu.json]

Both sides get random weights of the same shapes and equal-length prompts; a figure is the median over `--repeats`
after one warm-up; the two sides alternate, so that a drifting machine moves both. Transformers runs eager attention
with grouped experts, its fastest way on a CPU, and prefills in chunks of 1,024 beyond that length.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache

from model.batch import ForwardBatch
from model.checkpoint import load_model
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.kv_layout import PAGE_TOKENS, KVLayout
from model.ops.table import resolve_ops
from model.presets import preset
from model.tools.make_checkpoint import make_checkpoint
from model.transformer import Transformer

CHUNK = 1024


class Fathom:
    """A batch of equal-length requests on the paged cache."""

    def __init__(
        self, config: ModelConfig, model: Transformer, dtype: torch.dtype, batch: int, max_tokens: int
    ) -> None:
        name = "bfloat16" if dtype == torch.bfloat16 else "float32"
        layout = KVLayout(config=config, row_format=name, index_format=name)
        pages = layout.pages_for(max_tokens)
        self.model, self.batch = model, batch
        self.cache = KVCache(layout, num_pages=pages * batch, num_slots=batch, device="cpu", dtype=dtype)
        self.page_table = torch.arange(pages * batch).view(batch, pages)
        self.cache.reset_slots(torch.arange(batch))
        self.length = 0

    def step(self, token_ids_BN: torch.Tensor) -> torch.Tensor:
        batch, n = token_ids_BN.shape
        start, self.length = self.length, self.length + n
        forward = ForwardBatch(
            token_ids_T=token_ids_BN.reshape(-1),
            positions_T=torch.arange(start, self.length).repeat(batch),
            request_index_T=torch.arange(batch).repeat_interleave(n),
            query_start_B1=torch.arange(batch + 1) * n,
            seq_lens_B=torch.full((batch,), self.length),
            page_table_BP=self.page_table[:, : -(-self.length // PAGE_TOKENS)],
            slot_B=torch.arange(batch),
            logits_index_L=torch.arange(1, batch + 1) * n - 1,
            query_lens=(n,) * batch,
            start_positions=(start,) * batch,
        )
        return self.model.logits(self.model(forward, self.cache)).argmax(-1)


class Transformers:
    def __init__(self, model: DeepseekV4ForCausalLM) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)

    def step(self, token_ids_BN: torch.Tensor) -> torch.Tensor:
        out = self.model(token_ids_BN, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1)


def prefill(engine: Fathom | Transformers, ids_BN: torch.Tensor) -> torch.Tensor:
    for start in range(0, ids_BN.shape[1], CHUNK):
        token_B = engine.step(ids_BN[:, start : start + CHUNK])
    return token_B


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def median(values: list[float]) -> float:
    return statistics.median(values)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    config, dtype = preset(args.preset), getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(config, 0, "bf16" if dtype == torch.bfloat16 else "f32", Path(folder) / "model")
        ours = load_model(Path(folder) / "model", dtype=dtype, numerics="plain", ops=resolve_ops("cpu"), progress=False)
    theirs = DeepseekV4ForCausalLM._from_config(
        DeepseekV4Config(**config.to_dict()), dtype=dtype, attn_implementation="eager"
    ).eval()
    theirs.set_experts_implementation("grouped_mm")
    generator = torch.Generator().manual_seed(0)

    def engines(batch: int, length: int) -> dict[str, Fathom | Transformers]:
        return {"fathom": Fathom(config, ours, dtype, batch, length), "transformers": Transformers(theirs)}

    rows: list[dict[str, Any]] = []
    for length in args.prefill:
        ids = torch.randint(0, config.vocab_size, (1, length), generator=generator)
        seconds: dict[str, list[float]] = {"fathom": [], "transformers": []}
        for repeat in range(args.repeats + 1):
            for name, engine in engines(1, length).items():
                took, _ = timed(lambda engine=engine, ids=ids: prefill(engine, ids))
                if repeat:
                    seconds[name].append(took)
        rates = {name: length / median(s) for name, s in seconds.items()}
        rows.append({"what": "prefill", "tokens": length, "tokens_per_second": rates, "seconds": seconds})
        report(f"prefill {length}", rates, "tok/s", rates["fathom"] / rates["transformers"])
    for batch in args.batch:
        for length in args.context:
            ids = torch.randint(0, config.vocab_size, (batch, length), generator=generator)
            both = engines(batch, length + args.steps + 1)
            seconds = {name: [] for name in both}
            tokens = {name: prefill(engine, ids) for name, engine in both.items()}
            for step in range(args.steps + 1):
                for name, engine in both.items():
                    took, tokens[name] = timed(lambda engine=engine, t=tokens[name]: engine.step(t[:, None]))
                    if step:
                        seconds[name].append(took)
            millis = {name: 1e3 * median(s) for name, s in seconds.items()}
            rows.append(
                {"what": "decode", "batch": batch, "context": length, "milliseconds": millis, "seconds": seconds}
            )
            report(f"decode batch {batch} context {length}", millis, "ms", millis["transformers"] / millis["fathom"])
    return {"rows": rows}


def report(what: str, values: dict[str, float], unit: str, ratio: float) -> None:
    pairs = ", ".join(f"{name} {value:.1f} {unit}" for name, value in values.items())
    print(f"{what:32} {pairs}: Fathom is {ratio:.2f}x", flush=True)


def machine() -> dict[str, Any]:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].partition(": ")[2] if models else platform.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--prefill", type=numbers, default=[1024, 4096], help="prompt lengths")
    parser.add_argument("--batch", type=numbers, default=[1, 4, 16], help="decode batch sizes")
    parser.add_argument("--context", type=numbers, default=[1024, 4096], help="decode context lengths")
    parser.add_argument("--steps", type=int, default=10, help="timed decode steps")
    parser.add_argument("--repeats", type=int, default=3, help="timed prefills")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "model-cpu.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    with torch.inference_mode():
        result = measure(args)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine(), "settings": settings, **result}, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
