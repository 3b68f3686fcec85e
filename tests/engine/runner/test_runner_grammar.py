"""Masks in the sampler and behind the model: what is sampled is allowed, and nothing else changes."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from engine.clients import InProcessClient
from engine.messages import AddRequest, Grammar, SamplingParams, pack_ids
from engine.runner.executor import ModelExecutor
from engine.runner.penalties import PenaltyCounts
from engine.runner.sampler import SamplingBatch, only_allowed, sample
from model.tools.byte_tokenizer import save_byte_tokenizer

V = 100
COUNTS = PenaltyCounts(4, V, torch.device("cpu"))


def packed(allowed: list[list[int]], vocab: int = V) -> np.ndarray:
    flags = np.zeros((len(allowed), 32 * ((vocab + 31) // 32)), dtype=np.uint8)
    for row, ids in enumerate(allowed):
        flags[row, ids] = 1
    return np.packbits(flags, axis=1, bitorder="little").view(np.int32)


def batch(rows: int, **columns: Any) -> SamplingBatch:
    no_ids = np.empty(0, dtype=np.int64)
    fields: dict[str, Any] = {
        "temperature_L": np.ones(rows),
        "top_k_L": np.zeros(rows, dtype=np.int64),
        "top_p_L": np.ones(rows),
        "min_p_L": np.zeros(rows),
        "uniform_L": np.linspace(0.0, 0.99, rows),
        "num_logprobs_L": np.full(rows, -1),
        "slot_L": np.arange(rows) % 4,
        "penalties_3L": np.tile([[1.0], [0.0], [0.0]], rows),
        "bias_rows_N": no_ids,
        "bias_ids_N": no_ids,
        "bias_values_N": np.empty(0),
        "banned_rows_N": no_ids,
        "banned_ids_N": no_ids,
        "allowed_rows_N": no_ids,
        "allowed_bits_NW": np.empty((0, 0), dtype=np.uint8),
        "forced_rows_N": no_ids,
        "forced_ids_N": no_ids,
    }
    return SamplingBatch(**{**fields, **columns})


def under(some: SamplingBatch, rows: list[int], allowed: list[list[int]], end: int = 1) -> SamplingBatch:
    return some.masked(np.array(rows), packed(allowed), vocab_size=V, end=end)


def test_processors_see_the_allowed_tokens_only() -> None:
    logits = torch.arange(V, dtype=torch.float32).repeat(4, 1)
    allowed = [[3, 7, 40], [3, 7, 40], [90], [5, 99]]
    columns = {
        "temperature_L": np.array([0.0, 1.0, 1.0, 1.0]),
        # top_p and top_k count among the allowed tokens: the likeliest of those is kept, whatever the rest weighs.
        "top_p_L": np.array([1.0, 0.5, 1e-6, 1.0]),
        "top_k_L": np.array([0, 0, 0, 1]),
        "num_logprobs_L": np.array([2, -1, -1, -1]),
    }
    sampled = sample(logits, under(batch(4, **columns), [0, 1, 2, 3], allowed), COUNTS)
    assert sampled.token_ids_L.tolist() == [40, 40, 90, 99] and not sampled.failed
    # Log probabilities stay those of the model.
    assert sampled.logprobs_L[0] is not None and sampled.logprobs_L[0].top_ids == (99, 98)
    assert sampled.logprobs_L[0].logprob == pytest.approx(torch.log_softmax(logits[0], 0)[40].item())


def test_rows_without_a_grammar_do_not_notice() -> None:
    logits = torch.randn((6, V), generator=torch.Generator().manual_seed(1))
    alone = sample(logits, batch(6), COUNTS).token_ids_L
    masked = sample(logits, under(batch(6), [1, 4], [[1], [4]]), COUNTS).token_ids_L
    assert masked[[0, 2, 3, 5]].tolist() == alone[[0, 2, 3, 5]].tolist() and masked[[1, 4]].tolist() == [1, 4]
    halves = under(batch(6), [1, 4], [[1], [4]])
    split = [sample(logits[s], halves.rows(s.start, s.stop), COUNTS).token_ids_L for s in (slice(0, 4), slice(4, 6))]
    assert np.concatenate(split).tolist() == masked.tolist()


def test_a_mask_without_a_token_fails_its_row() -> None:
    sampled = sample(torch.zeros((2, V)), under(batch(2), [1], [[]]), COUNTS)
    assert set(sampled.failed) == {1} and "no token" in sampled.failed[1]


def test_min_tokens_gives_way_to_a_grammar_that_has_ended() -> None:
    bans = {"banned_rows_N": np.array([0, 0, 1, 1]), "banned_ids_N": np.array([1, 64, 1, 64])}
    masked = under(batch(2, **bans), [0, 1], [[1], [1, 8]])
    assert masked.banned_rows_N.tolist() == [1, 1]
    assert sample(torch.zeros((2, V)), masked, COUNTS).token_ids_L.tolist() == [1, 8]
    # A bad word is not excused: it is another token than the end.
    assert set(sample(torch.zeros((2, V)), under(batch(2, **bans), [0, 1], [[64], [8]]), COUNTS).failed) == {0}


def test_a_grammar_narrows_what_the_request_allows() -> None:
    own = np.packbits(np.isin(np.arange(V), [2, 3, 5]), bitorder="little")[None]
    allows = batch(3, allowed_rows_N=np.array([1]), allowed_bits_NW=own)
    masked = under(allows, [0, 1], [[7], [3, 90]])
    assert masked.allowed_rows_N.tolist() == [0, 1]
    assert sample(torch.zeros((3, V)), masked, COUNTS).token_ids_L[:2].tolist() == [7, 3]
    logits = torch.zeros((1, V))
    left = only_allowed(logits, torch.from_numpy(packed([[31, 32, 99]]).view(np.uint8)[:, : (V + 7) // 8].copy()))
    assert torch.isfinite(left[0]).nonzero().flatten().tolist() == [31, 32, 99]


@pytest.fixture
def follow(lab: Any, tmp_path: Path) -> Callable[..., list[tuple[str, str | None]]]:
    """Answers of a random model to requests with grammars, as (text, finish reason)."""
    save_byte_tokenizer(tmp_path, model_max_length=4096)
    resolved = replace(lab.resolved(), model_dir=str(tmp_path))

    def run(requests: list[tuple[Grammar | None, SamplingParams]]) -> list[tuple[str, str | None]]:
        async def one(client: InProcessClient, n: int) -> tuple[str, str | None]:
            grammar, sampling = requests[n]
            message = AddRequest(
                request_id=f"r{n}",
                prompt_token_ids=pack_ids(lab.prompt(20 + n, seed=n)),
                sampling=msgspec.structs.replace(sampling, seed=n),
                grammar=grammar,
            )
            tokens: list[int] = []
            reason = None
            async for output in client.submit(message):
                tokens += output.token_ids
                reason = output.finish_reason
            return bytes(t - 3 for t in tokens if 3 <= t < 259).decode("utf-8", "replace"), reason

        async def all_of_them() -> list[tuple[str, str | None]]:
            client = InProcessClient(ModelExecutor(resolved, lab.models[True]))
            try:
                return await asyncio.gather(*(one(client, n) for n in range(len(requests))))
            finally:
                await client.close()

        return asyncio.run(all_of_them())

    return run


def test_random_tokens_under_a_mask_end_in_valid_output(follow: Callable[..., list[tuple[str, str | None]]]) -> None:
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["a", "b"]},
            "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
            "note": {"type": "string", "maxLength": 12},
            "more": {"type": ["null", "boolean"]},
        },
        "required": ["kind", "sizes"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    grammar = Grammar(text=json.dumps({"grammars": [{"json_schema": schema}]}))
    params = [
        SamplingParams(max_tokens=200),
        SamplingParams(max_tokens=200, top_p=0.7, presence_penalty=1.0),
        SamplingParams(max_tokens=200, temperature=0.0, repetition_penalty=1.3),
        SamplingParams(max_tokens=200, top_k=2, min_tokens=150),
        SamplingParams(max_tokens=200, temperature=1.5, ignore_eos=True),
    ]
    answers = follow(
        [
            *((grammar, p) for p in params),
            (None, SamplingParams(max_tokens=30)),
            (grammar, SamplingParams(max_tokens=5)),
        ]
    )
    for text, reason in answers[: len(params)]:
        assert reason == "stop"
        answer = json.loads(text)
        assert {"kind", "sizes"} <= set(answer) <= set(schema["properties"])
        assert answer["kind"] in ("a", "b") and len(answer["sizes"]) <= 3 and len(answer.get("note", "")) <= 12
    assert answers[-1][1] == "length"
