"""The request table and the batch of a step, beside naive loops."""

from typing import Any

import numpy as np
import pytest
import torch

from engine.messages import SamplingParams
from engine.plan import NewRequest, ScheduledTokens
from engine.runner.inputs import build_inputs
from engine.runner.penalties import PenaltyCounts
from engine.runner.request_table import RequestTable

CPU = torch.device("cpu")
VOCAB = 50


def new_table(num_slots: int = 8, max_pages: int = 64) -> RequestTable:
    return RequestTable(
        num_slots=num_slots, max_pages=max_pages, eos_token_id=1, counts=PenaltyCounts(num_slots, VOCAB, CPU)
    )


def request(name: str, slot: int, tokens: Any, **sampling: Any) -> NewRequest:
    ids = np.asarray(tokens, dtype=np.int32)
    params = SamplingParams(**{"seed": 1, "max_tokens": 4, **sampling})
    return NewRequest(request_id=name, slot=slot, token_ids=ids, num_prompt_tokens=len(ids), sampling=params)


@pytest.mark.parametrize("seed", range(20))
def test_batches_equal_naive_loops(seed: int) -> None:
    generator = np.random.default_rng(seed)
    table, scheduled, facts = new_table(), [], []
    pages = generator.permutation(500).tolist()
    for i in generator.permutation(8)[: generator.integers(1, 9)]:
        tokens = generator.integers(0, VOCAB, generator.integers(1, 2000))
        table.add(request(f"r{i}", int(i), tokens))
        for token in generator.integers(0, VOCAB, generator.integers(0, 600)):
            table.append_tokens(np.array([i]), np.array([token]))
            tokens = np.append(tokens, token)
        start = int(generator.integers(0, len(tokens)))
        end = int(generator.integers(start + 1, len(tokens) + 1)) if generator.random() < 0.5 else len(tokens)
        own = [pages.pop() for _ in range(-(-end // 256) + int(generator.integers(0, 3)))]
        half = len(own) // 2
        table.append_pages(int(i), tuple(own[:half]))
        table.append_pages(int(i), tuple(own[half:]))
        rows = ScheduledTokens(
            request_id=f"r{i}", start=start, num_tokens=end - start, new_page_ids=(), samples=end == len(tokens)
        )
        scheduled.append(rows)
        facts.append((int(i), tokens.tolist(), own))

    inputs = build_inputs(tuple(scheduled), table, CPU)
    batch = inputs.batch
    token_ids, positions, owners, starts, logits_index, sampling = [], [], [], [0], [], []
    for b, (rows, (_, tokens, _)) in enumerate(zip(scheduled, facts, strict=True)):
        for position in range(rows.start, rows.start + rows.num_tokens):
            token_ids.append(tokens[position])
            positions.append(position)
            owners.append(b)
        starts.append(len(token_ids))
        if rows.samples:
            logits_index.append(len(token_ids) - 1)
            sampling.append(b)
    assert batch.token_ids_T.tolist() == token_ids
    assert batch.positions_T.tolist() == positions
    assert batch.request_index_T.tolist() == owners
    assert batch.query_start_B1.tolist() == starts
    assert batch.seq_lens_B.tolist() == [s.start + s.num_tokens for s in scheduled]
    assert batch.slot_B.tolist() == [slot for slot, _, _ in facts]
    assert batch.logits_index_L.tolist() == logits_index
    assert batch.query_lens == tuple(s.num_tokens for s in scheduled)
    assert batch.start_positions == tuple(s.start for s in scheduled)
    width = max(-(-(s.start + s.num_tokens) // 256) for s in scheduled)
    assert batch.page_table_BP.tolist() == [(own + [0] * width)[:width] for _, _, own in facts]
    assert inputs.request_ids == tuple(scheduled[b].request_id for b in sampling)
    assert inputs.slots_L.tolist() == [facts[b][0] for b in sampling]
    tensors = [getattr(batch, name) for name in type(batch).__slots__ if isinstance(getattr(batch, name), torch.Tensor)]
    assert len(tensors) == 8 and all(t.dtype == torch.int64 for t in tensors)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"start": 0, "num_tokens": 11, "samples": True}, "not known"),
        ({"start": 0, "num_tokens": 10, "samples": False}, "sampled from the last"),
        ({"start": 0, "num_tokens": 9, "samples": True}, "sampled from the last"),
        ({"start": 0, "num_tokens": 0, "samples": False}, "without rows"),
    ],
)
def test_wrong_rows_are_noticed(rows: dict[str, Any], message: str) -> None:
    table = new_table()
    table.add(request("a", 0, range(10)))
    table.append_pages(0, (3,))
    with pytest.raises(AssertionError, match=message):
        build_inputs((ScheduledTokens(request_id="a", new_page_ids=(), **rows),), table, CPU)


def test_rows_outside_the_pages_and_twice_scheduled_requests_are_noticed() -> None:
    table = new_table()
    table.add(request("a", 0, range(10)))
    rows = ScheduledTokens(request_id="a", start=0, num_tokens=10, new_page_ids=(), samples=True)
    with pytest.raises(AssertionError, match="outside their request's pages"):
        build_inputs((rows,), table, CPU)
    table.append_pages(0, (3,))
    with pytest.raises(AssertionError, match="scheduled twice"):
        build_inputs((rows, rows), table, CPU)


def test_slots_and_ids_have_one_owner() -> None:
    table = new_table()
    table.add(request("a", 2, [5]))
    with pytest.raises(AssertionError, match="slot 2 belongs to a"):
        table.add(request("b", 2, [5]))
    with pytest.raises(AssertionError, match="a is new twice"):
        table.add(request("a", 3, [5]))
    table.remove("a")
    table.remove("a")
    table.remove("never seen")
    assert "a" not in table and len(table) == 0
    table.add(request("b", 2, [5]))


def test_more_pages_than_the_longest_request_may_have_are_noticed() -> None:
    table = new_table(max_pages=20)
    table.add(request("a", 0, [5]))
    table.append_pages(0, tuple(range(20)))
    with pytest.raises(AssertionError, match="21 pages, at most 20"):
        table.append_pages(0, (99,))


def test_a_reused_slot_remembers_nothing() -> None:
    loud: dict[str, Any] = {
        "temperature": 0.3,
        "top_k": 5,
        "top_p": 0.4,
        "min_p": 0.2,
        "presence_penalty": 1.0,
        "frequency_penalty": 1.5,
        "repetition_penalty": 2.0,
        "logit_bias": {3: 5.0},
        "seed": 77,
        "max_tokens": 900,
        "min_tokens": 400,
        "stop_token_ids": (9, 8),
        "logprobs": 4,
    }
    used, fresh = new_table(), new_table()
    used.add(request("loud", 4, [3] * 700, **loud))
    used.append_pages(4, tuple(range(30)))
    for _ in range(300):
        used.append_tokens(np.array([4]), np.array([6]))
    used.remove("loud")
    for table in (used, fresh):
        table.add(request("plain", 4, [1, 2, 3], frequency_penalty=0.5))
        table.append_pages(4, (7,))
        table.append_tokens(np.array([4]), np.array([2]))
    ours, theirs = used.sampling(np.array([4])), fresh.sampling(np.array([4]))
    for name in type(ours).__slots__:
        assert getattr(ours, name).tolist() == getattr(theirs, name).tolist(), name
    assert used.token_ids(4, 0, 4).tolist() == [1, 2, 3, 2] and used.num_tokens_S[4] == 4
    assert used.page_ids_SP[4].tolist()[:16] == fresh.page_ids_SP[4].tolist() and used.num_pages_S[4] == 1
    assert not used.page_ids_SP[4, 1:].any()
    logits, slots, penalties = torch.zeros(1, VOCAB), np.array([4]), np.array([[2.0], [1.0], [0.5]])
    assert torch.equal(used.counts.apply(logits, slots, penalties), fresh.counts.apply(logits, slots, penalties))


def test_counts_follow_the_tokens_and_survive_a_resume() -> None:
    """Counted one by one, or at once when a request comes back with its output: the same."""
    grown, resumed = new_table(), new_table()
    prompt, output = [4, 4, 9, 11], [4, 7, 7, 7, 11, 30]
    sampling = SamplingParams(
        seed=1, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0, max_tokens=90
    )
    grown.add(
        NewRequest(request_id="a", slot=1, token_ids=np.array(prompt, np.int32), num_prompt_tokens=4, sampling=sampling)
    )
    for token in output:
        grown.append_tokens(np.array([1]), np.array([token]))
    everything = np.array(prompt + output, np.int32)
    resumed.add(NewRequest(request_id="a", slot=1, token_ids=everything, num_prompt_tokens=4, sampling=sampling))
    logits = torch.linspace(-2, 2, VOCAB).unsqueeze(0)
    rows = []
    for table in (grown, resumed):
        batch = table.sampling(np.array([1]))
        rows.append(table.counts.apply(logits, np.array([1]), batch.penalties_3L)[0])
        assert batch.uniform_L.tolist() == resumed.sampling(np.array([1])).uniform_L.tolist()
    assert torch.equal(rows[0], rows[1])
    for token in range(VOCAB):
        x = float(logits[0, token])
        if token in {*prompt, *output}:
            x = x / 2 if x > 0 else x * 2
        x -= 0.25 * output.count(token) + 0.5 * (token in output)
        assert float(rows[0][token]) == pytest.approx(x, abs=1e-6)
