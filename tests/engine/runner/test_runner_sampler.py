"""The sampler beside a scalar implementation of every parameter, and its independence of batch neighbours."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.messages import SamplingParams
from engine.plan import NewRequest
from engine.runner import sampler
from engine.runner.penalties import PenaltyCounts
from engine.runner.philox import philox4x32, uniform
from engine.runner.request_table import RequestTable
from engine.runner.sampler import Sampled, sample, sorted_prefix

EOS = 1
CPU = torch.device("cpu")


@dataclass
class Row:
    """One request that samples now."""

    logits: Sequence[float]
    params: SamplingParams
    prompt: list[int] = field(default_factory=lambda: [0])
    output: list[int] = field(default_factory=list)


def run(rows: list[Row], num_slots: int | None = None, slots: list[int] | None = None) -> Sampled:
    """Sample rows through a request table, the way the model runner does."""
    slots = slots or list(range(len(rows)))
    vocab = len(rows[0].logits)
    counts = PenaltyCounts(num_slots or len(rows), vocab, CPU)
    table = RequestTable(num_slots=num_slots or len(rows), max_pages=4, eos_token_id=EOS, counts=counts)
    for i, (row, slot) in enumerate(zip(rows, slots, strict=True)):
        known = np.array(row.prompt, dtype=np.int32)
        table.add(
            NewRequest(request_id=str(i), slot=slot, token_ids=known, num_prompt_tokens=len(known), sampling=row.params)
        )
        for token in row.output:
            table.append_tokens(np.array([slot]), np.array([token]))
    logits = torch.tensor(np.array([row.logits for row in rows], dtype=np.float32))
    before = logits.clone()
    result = sample(logits, table.sampling(np.array(slots)), counts)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num()), "the caller's logits were changed"
    return result


# ----------------------------------------------------------------------------------------------- the oracle


def adjusted(row: Row) -> list[float]:
    """Bias, penalties, mask, one token at a time in float32 (so that ties are the same ties)."""
    p, f32 = row.params, np.float32
    produced, seen = Counter(row.output), {*row.prompt, *row.output}
    result = []
    for token, logit in enumerate(row.logits):
        x = f32(logit)
        if token in p.logit_bias:
            x = x + f32(p.logit_bias[token])
        if token in seen and p.repetition_penalty != 1.0:
            x = x / f32(p.repetition_penalty) if x > 0 else x * f32(p.repetition_penalty)
        x = x - f32(p.frequency_penalty) * f32(produced[token])
        if produced[token]:
            x = x - f32(p.presence_penalty)
        if len(row.output) < p.min_tokens and token in (EOS, *p.stop_token_ids):
            x = f32(-math.inf)
        result.append(float(x))
    return result


def expected(row: Row) -> tuple[int, float]:
    """(token, distance from the nearest decision that rounding could turn)."""
    p, x = row.params, adjusted(row)
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    if p.temperature == 0:
        return order[0], math.inf
    weights = [math.exp((x[token] - x[order[0]]) / p.temperature) for token in order]
    total = sum(weights)
    probs = [w / total for w in weights]
    margin = math.inf
    if p.top_k:
        order, probs = order[: p.top_k], probs[: p.top_k]
    if p.top_p < 1:
        limit, before, kept = p.top_p * sum(probs), 0.0, 0
        for prob in probs:
            if kept:  # the first is always kept
                margin = min(margin, abs(before - limit))
                if before >= limit:
                    break
            before += prob
            kept += 1
        order, probs = order[:kept], probs[:kept]
    top = probs[0]
    if p.min_p:
        margin = min([margin, *(abs(prob / top - p.min_p) for prob in probs if prob != top)])
        kept = sum(prob >= p.min_p * top for prob in probs)
        order, probs = order[:kept], probs[:kept]
    draw = float(uniform(np.array([p.seed], dtype=np.uint64), np.array([len(row.prompt) + len(row.output)]))[0])
    point, mass = draw * sum(probs), 0.0
    for token, prob in zip(order, probs, strict=True):
        mass += prob
        margin = min(margin, abs(point - mass))
        if point < mass:
            return token, margin
    return order[-1], 0.0


def choice(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


@st.composite
def batches(draw: Any) -> list[Row]:
    vocab = draw(st.integers(3, 24))
    token = st.integers(0, vocab - 1)
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        params = SamplingParams(
            temperature=draw(choice(0.0, 0.25, 0.7, 1.0, 1.0, 3.0)),
            top_k=draw(choice(0, 0, 1, 2, 5, vocab, 1000)),
            top_p=draw(choice(1.0, 1.0, 0.9, 0.55, 0.05, 0.0)),
            min_p=draw(choice(0.0, 0.0, 0.03, 0.3, 1.0)),
            presence_penalty=draw(choice(0.0, 0.0, 0.6, -1.1)),
            frequency_penalty=draw(choice(0.0, 0.0, 0.35, -0.2)),
            repetition_penalty=draw(choice(1.0, 1.0, 1.3, 0.7)),
            logit_bias=draw(st.dictionaries(token, choice(-100.0, -1.5, 2.25, 100.0), max_size=3)),
            seed=draw(st.integers(0, 2**64 - 1)),
            min_tokens=draw(choice(0, 0, 2)),
            stop_token_ids=tuple(draw(st.lists(st.integers(2, vocab - 1), max_size=1))),
        )
        # A coarse grid, so that ties are common.
        logits = [v / 4 for v in draw(st.lists(st.integers(-12, 12), min_size=vocab, max_size=vocab))]
        prompt = draw(st.lists(token, min_size=1, max_size=6))
        rows.append(Row(logits, params, prompt, draw(st.lists(token, max_size=6))))
    return rows


@pytest.mark.parametrize("prefix", [None, 3, 8])
def test_every_combination_equals_the_scalar_implementation(
    prefix: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if prefix is not None:
        monkeypatch.setattr(sampler, "SORT_TOKENS", 0)
        monkeypatch.setattr(sampler, "PREFIX_TOKENS", prefix)
    compared, near = 0, 0

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(batches())
    def compare(rows: list[Row]) -> None:
        nonlocal compared, near
        result = run(rows)
        for i, row in enumerate(rows):
            token, margin = expected(row)
            compared += 1
            if margin < 1e-6:
                near += 1  # on the edge of a decision: fp32 softmax may fall on either side
            else:
                assert i not in result.failed
                assert int(result.token_ids_L[i]) == token, row

    compare()
    assert compared > 250 and near < 0.02 * compared


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"top_k": 40},
        {"top_k": 3000},
        {"top_p": 0.3},
        {"top_p": 0.95},
        {"top_p": 0.999999},
        {"min_p": 0.05},
        {"min_p": 1e-6},
        {"top_k": 900, "top_p": 0.8},
        {"top_k": 2000, "top_p": 0.5},
        {"temperature": 0.05},
        {"temperature": 8.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("grid", [None, 0.5])
def test_prefix_and_whole_sort_agree_exactly(
    change: dict[str, Any], grid: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a grid of few values, where the prefix ends in ties."""
    values = np.random.default_rng(3).normal(size=(24, 6000)).astype(np.float32) * 2.5
    if grid is not None:
        values = np.round(values / grid) * grid
    params = [SamplingParams(seed=seed, **change) for seed in range(24)]
    rows = [Row(list(logits), p) for logits, p in zip(values, params, strict=True)]
    fast = run(rows).token_ids_L
    monkeypatch.setattr(sampler, "SORT_TOKENS", 10**9)
    assert fast.tolist() == run(rows).token_ids_L.tolist()


def test_greedy_and_tied_tokens_go_to_the_lower_id() -> None:
    logits = [1.0, 3.0, 3.0, -2.0, 3.0]
    assert run([Row(logits, SamplingParams(temperature=0.0))]).token_ids_L.tolist() == [1]
    assert run([Row(logits, SamplingParams(temperature=1e-9))]).token_ids_L.tolist() == [1]
    assert run([Row(logits, SamplingParams(temperature=5.0, top_k=1, seed=7))]).token_ids_L.tolist() == [1]
    assert {int(run([Row(logits, SamplingParams(top_k=2, seed=s))]).token_ids_L[0]) for s in range(40)} == {1, 2}


@pytest.mark.parametrize("size", [1, 2, 5, 9, 10])
def test_sorted_prefix_orders_by_value_then_id(size: int) -> None:
    x = torch.tensor(np.random.default_rng(size).integers(-2, 3, (40, 10)).astype(np.float32))
    values, ids, known = sorted_prefix(x, size)
    for row in range(40):
        order = sorted(range(10), key=lambda i: (-float(x[row, i]), i))
        sure = int(known[row])
        assert ids[row, :sure].tolist() == order[:sure]
        assert values[row].tolist() == [float(x[row, i]) for i in order[:size]]
        # What is not known must be a tie across the prefix's end.
        assert sure >= size or float(x[row, order[size - 1]]) == float(x[row, order[size]])


# ----------------------------------------------------------------------------------------------- randomness


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers of the Random123 distribution (kat_vectors)
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    block = philox4x32(np.array(counter, dtype=np.uint64)[:, None], np.array(key, dtype=np.uint64)[:, None])
    assert tuple(int(w) for w in block[:, 0]) == words


def chi_square(observed: np.ndarray, probs: np.ndarray) -> float:
    count = observed.sum()
    return float(((observed - count * probs) ** 2 / (count * probs)).sum())


@pytest.mark.parametrize("vary", ["seed", "position"])
@pytest.mark.parametrize("change", [{}, {"top_k": 5}, {"top_p": 0.8}])
def test_draws_follow_the_distribution(vary: str, change: dict[str, Any]) -> None:
    logits = np.array([0.3, 1.2, -0.5, 0.9, 0.0, -1.5, 0.6, 1.0])
    count, vocab = 20000, 8
    probs = np.exp(logits / 0.8)
    probs /= probs.sum()
    order = np.argsort(-probs)
    keep = {"top_k": 5, "top_p": int((np.cumsum(probs[order]) - probs[order] < 0.8).sum())}.get(
        next(iter(change), ""), 8
    )
    probs[order[keep:]] = 0.0
    probs /= probs.sum()
    table = RequestTable(num_slots=1, max_pages=1, eos_token_id=EOS, counts=PenaltyCounts(1, vocab, CPU))
    params = SamplingParams(temperature=0.8, seed=11, **change)
    one = NewRequest(request_id="a", slot=0, token_ids=np.zeros(1, np.int32), num_prompt_tokens=1, sampling=params)
    table.add(one)
    batch = table.sampling(np.zeros(count, dtype=np.int64))
    many, same = np.arange(count), np.full(count, 5)
    batch.uniform_L = uniform((many if vary == "seed" else same).astype(np.uint64), same if vary == "seed" else many)
    ids = sample(torch.tensor(logits, dtype=torch.float32).repeat(count, 1), batch, table.counts).token_ids_L
    observed = np.bincount(ids, minlength=vocab)
    assert not observed[probs == 0].any()
    # 99.9th percentile of chi-square with 7 degrees of freedom; with fewer it is smaller still.
    assert chi_square(observed[probs > 0], probs[probs > 0]) < 24.32


def test_uniform_is_a_function_of_seed_and_position() -> None:
    seeds = np.array([0, 1, 2**63, 2**64 - 1], dtype=np.uint64).repeat(1000)
    positions = np.tile(np.arange(1000), 4)
    draws = uniform(seeds, positions)
    assert len(set(draws.tolist())) == 4000 and draws.min() >= 0 and draws.max() < 1
    order = np.random.default_rng(0).permutation(4000)
    assert (uniform(seeds[order], positions[order]) == draws[order]).all()
    assert abs(draws.mean() - 0.5) < 0.02 and abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.05


def mixed_rows(vocab: int) -> list[Row]:
    generator = np.random.default_rng(5)
    changes: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 3},
        {},
        {"top_k": 7, "logprobs": 0},
        {"top_p": 0.7, "presence_penalty": 0.5},
        {"min_p": 0.1, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
        {"logit_bias": {4: 3.0, 5: -100.0}, "logprobs": 5},
        {"min_tokens": 9, "stop_token_ids": (3,)},
        {"temperature": 2.0, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
    ]
    return [
        Row(
            list(generator.normal(size=vocab).astype(np.float32) * 2),
            SamplingParams(seed=i, **change),
            prompt=generator.integers(0, vocab, 12).tolist(),
            output=generator.integers(0, vocab, i).tolist(),
        )
        for i, change in enumerate(changes)
    ]


@pytest.mark.parametrize("vocab", [100, 5000])
def test_a_row_does_not_depend_on_its_neighbours(vocab: int) -> None:
    rows = mixed_rows(vocab)
    together = run(rows)
    reversed_, slots = run(rows[::-1], num_slots=20, slots=[17, 3, 4, 9, 0, 1, 11, 8]), list(range(len(rows)))[::-1]
    for i, row in enumerate(rows):
        alone = run([row])
        assert alone.token_ids_L[0] == together.token_ids_L[i] == reversed_.token_ids_L[slots[i]]
        assert alone.logprobs_L[0] == together.logprobs_L[i] == reversed_.logprobs_L[slots[i]]


def test_a_row_that_is_not_finite_fails_alone() -> None:
    rows = mixed_rows(100)
    sound = run(rows)
    poisoned = rows[:]
    for i, (token, value) in {0: (7, math.nan), 2: (0, math.inf), 5: (99, -math.inf)}.items():
        logits = list(rows[i].logits)
        logits[token] = value
        poisoned[i] = Row(logits, rows[i].params, rows[i].prompt, rows[i].output)
    result = run(poisoned)
    assert set(result.failed) == {0, 2, 5} and set(result.failed.values()) == {"the model's output is not finite"}
    for i in {1, 3, 4, 6, 7}:
        assert result.token_ids_L[i] == sound.token_ids_L[i] and result.logprobs_L[i] == sound.logprobs_L[i]
    assert all(result.logprobs_L[i] is None for i in result.failed)


def test_parameters_that_leave_no_token_fail_their_row() -> None:
    everything = SamplingParams(seed=1, min_tokens=1, stop_token_ids=(0, 2, 3))
    result = run([Row([0.0, 1.0, 2.0, 3.0], everything), Row([0.0, 1.0, 2.0, 3.0], SamplingParams(temperature=0.0))])
    assert result.failed == {0: "the sampling parameters leave no token to choose"}
    assert result.token_ids_L[1] == 3


def test_min_tokens_masks_eos_and_stop_ids_until_enough_tokens() -> None:
    logits = [0.0, 9.0, 1.0, 8.0]
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(3,))
    assert [int(run([Row(logits, params, output=[0] * n)]).token_ids_L[0]) for n in range(4)] == [2, 2, 1, 1]


@pytest.mark.parametrize("vocab", [50, 5000])
def test_logprobs_are_those_of_the_raw_logits(vocab: int) -> None:
    logits = np.round(np.random.default_rng(2).normal(size=vocab) * 8) / 4
    plain = Row(list(logits), SamplingParams(temperature=0.0, logprobs=6))
    bent = Row(list(logits), SamplingParams(temperature=3.0, top_k=3, seed=4, logit_bias={9: 5.0}, logprobs=6))
    log_total = math.log(sum(math.exp(x) for x in logits))
    order = sorted(range(vocab), key=lambda i: (-logits[i], i))[:6]
    for row in (plain, bent):
        result = run([row])
        logprobs = result.logprobs_L[0]
        assert logprobs is not None and list(logprobs.top_ids) == order
        assert logprobs.logprob == pytest.approx(logits[result.token_ids_L[0]] - log_total, abs=1e-5)
        assert logprobs.top_logprobs == pytest.approx([logits[i] - log_total for i in order], abs=1e-5)


def test_logprobs_of_a_vocabulary_full_of_ties_take_the_lower_ids() -> None:
    result = run([Row([0.5] * 5000, SamplingParams(temperature=0.0, logprobs=4))])
    assert result.logprobs_L[0] is not None and result.logprobs_L[0].top_ids == (0, 1, 2, 3)
