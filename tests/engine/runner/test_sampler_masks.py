"""Allowed tokens, bad words, min_tokens and a forced token beside a scalar implementation, row by row."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.messages import ForcedToken, SamplingParams, pack_ids
from engine.plan import NOTHING_LEFT, NewRequest
from engine.runner.penalties import PenaltyCounts
from engine.runner.request_table import RequestTable
from engine.runner.sampler import Sampled, only_allowed, sample

EOS = 1
CPU = torch.device("cpu")


@dataclass
class Row:
    """One request that samples now."""

    logits: list[float]
    params: SamplingParams
    output: list[int] = field(default_factory=list)
    num_resumed: int = 0
    """Tokens of `output` that the request brings along, as after a preemption."""


def run(rows: list[Row], slots: list[int] | None = None) -> Sampled:
    slots = slots or list(range(len(rows)))
    vocab = len(rows[0].logits)
    counts = PenaltyCounts(max(slots) + 1, vocab, CPU)
    table = RequestTable(num_slots=max(slots) + 1, max_pages=1, eos_token_id=EOS, counts=counts)
    for i, (row, slot) in enumerate(zip(rows, slots, strict=True)):
        known = np.array([0, *row.output[: row.num_resumed]], dtype=np.int32)
        table.add(NewRequest(request_id=str(i), slot=slot, token_ids=known, num_prompt_tokens=1, sampling=row.params))
        for token in row.output[row.num_resumed :]:
            table.append_tokens(np.array([slot]), np.array([token]))
    logits = torch.tensor([row.logits for row in rows], dtype=torch.float32)
    before = logits.clone()
    result = sample(logits, table.sampling(np.array(slots)), counts)
    assert torch.equal(logits, before)
    return result


def expected(row: Row) -> int | None:
    """The greedy token, from the words of the contract."""
    p, output = row.params, row.output
    forced = p.forced_token
    if forced is not None and len(output) >= forced.after and not {forced.token_id, *forced.unless} & set(output):
        return forced.token_id
    allowed = range(len(row.logits)) if p.allowed_token_ids is None else np.frombuffer(p.allowed_token_ids, "<i4")
    left = []
    for token in sorted(int(t) for t in allowed):
        text = [*output, token]
        completes = any(text[len(text) - len(word) :] == list(word) and len(word) <= len(text) for word in p.bad_words)
        early = len(output) < p.min_tokens and token in (EOS, *p.stop_token_ids)
        if not completes and not early:
            left.append((-row.logits[token], token))
    return min(left)[1] if left else None


@st.composite
def batches(draw: Any) -> list[Row]:
    vocab = draw(st.integers(2, 20))
    token = st.integers(0, vocab - 1)
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        allowed = draw(st.none() | st.lists(token, min_size=1, max_size=6))
        words = draw(st.lists(st.lists(token, min_size=1, max_size=3).map(tuple), max_size=6))
        params = SamplingParams(
            temperature=0.0,
            allowed_token_ids=None if allowed is None else pack_ids(allowed),
            bad_words=tuple(words),
            min_tokens=draw(st.sampled_from([0, 0, 3])),
            stop_token_ids=tuple(draw(st.lists(token, max_size=2))),
            forced_token=draw(
                st.none()
                | st.builds(
                    ForcedToken, token_id=token, after=st.integers(0, 6), unless=st.lists(token, max_size=2).map(tuple)
                )
            ),
        )
        output = draw(st.lists(token, max_size=7))
        logits = draw(st.lists(st.integers(-8, 8), min_size=vocab, max_size=vocab))
        rows.append(Row([x / 2 for x in logits], params, output, draw(st.integers(0, len(output)))))
    return rows


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(batches())
def test_every_combination_equals_the_scalar_implementation(rows: list[Row]) -> None:
    result = run(rows, slots=list(range(3, 3 + len(rows))))
    for i, row in enumerate(rows):
        token = expected(row)
        if token is None:
            assert result.failed[i] == NOTHING_LEFT
        else:
            assert i not in result.failed and int(result.token_ids_L[i]) == token


def test_random_draws_stay_within_the_mask() -> None:
    allowed = [3, 8, 9, 700, 4999]
    logits = np.random.default_rng(0).normal(size=5000).tolist()
    params = {"allowed_token_ids": pack_ids(allowed), "bad_words": ((9,), (8, 3))}
    rows = [Row(logits, SamplingParams(seed=seed, temperature=5.0, **params), [8]) for seed in range(200)]
    assert set(run(rows).token_ids_L.tolist()) == {8, 700, 4999}


def test_a_mask_renormalises_what_is_left() -> None:
    """The draw among allowed tokens follows their own softmax."""
    logits, allowed = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0, 2, 3]
    params = [SamplingParams(seed=seed, allowed_token_ids=pack_ids(allowed)) for seed in range(4000)]
    counted = np.bincount(run([Row(logits, p) for p in params]).token_ids_L, minlength=6)
    weights = np.array([math.exp(logits[token]) for token in allowed])
    share = weights / weights.sum()
    assert counted[[1, 4, 5]].sum() == 0
    assert ((counted[allowed] - 4000 * share) ** 2 / (4000 * share)).sum() < 13.8  # 99.9 % of chi-square, 2 degrees


@pytest.mark.parametrize("vocab", [1, 7, 8, 9, 64, 1000])
def test_bits_cover_vocabularies_of_any_width(vocab: int) -> None:
    allowed = np.random.default_rng(vocab).random((3, vocab)) < 0.5
    bits = torch.from_numpy(np.packbits(allowed, axis=-1, bitorder="little"))
    masked = only_allowed(torch.zeros(3, vocab), bits)
    assert torch.equal(masked == 0, torch.from_numpy(allowed)) and torch.isinf(masked[masked != 0]).all()


def test_a_forced_token_is_stronger_than_everything() -> None:
    params = SamplingParams(
        temperature=0.0,
        forced_token=ForcedToken(token_id=4, after=1),
        bad_words=((4,),),
        allowed_token_ids=pack_ids([2]),
        logit_bias={4: -100.0},
        min_tokens=9,
        stop_token_ids=(4,),
        logprobs=1,
    )
    logits = [0.0, 0.0, 1.0, 5.0, -30.0]
    result = run([Row(logits, params, [2])])
    assert result.token_ids_L.tolist() == [4]
    # What is reported is the model's opinion, not the mask.
    assert result.logprobs_L[0] is not None and result.logprobs_L[0].logprob == pytest.approx(-35.0, abs=0.1)
    assert run([Row(logits, params, [])]).token_ids_L.tolist() == [2]
    assert run([Row(logits, params, [2, 4])]).token_ids_L.tolist() == [2]


def test_a_new_request_in_a_slot_inherits_no_mask() -> None:
    counts = PenaltyCounts(1, 8, CPU)
    table = RequestTable(num_slots=1, max_pages=1, eos_token_id=EOS, counts=counts)
    masked = SamplingParams(
        temperature=0.0,
        allowed_token_ids=pack_ids([3]),
        bad_words=((5,),),
        forced_token=ForcedToken(token_id=2, after=0),
        prompt_logprobs=3,
    )
    for request_id, params in (("a", masked), ("b", SamplingParams(temperature=0.0))):
        table.add(
            NewRequest(
                request_id=request_id, slot=0, token_ids=np.zeros(1, np.int32), num_prompt_tokens=1, sampling=params
            )
        )
        table.remove(request_id)
    batch = table.sampling(np.array([0]))
    assert len(batch.allowed_rows_N) == len(batch.forced_rows_N) == len(batch.banned_rows_N) == 0
    assert table.num_prompt_logprobs_S.tolist() == [-1]
