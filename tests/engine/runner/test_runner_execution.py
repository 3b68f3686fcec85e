"""Plans made by hand on a small random model: whatever happens around a request, its tokens are the same."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from engine.executor import StepError
from engine.messages import SamplingParams
from engine.plan import PageCopy, StepPlan

PROMPTS = (3, 130, 257, 390)
COUNT = 6


@pytest.fixture(scope="module")
def alone(lab: Any) -> dict[int, list[int]]:
    """Greedy tokens of each prompt length, one request at a time in a fresh engine."""
    return {length: lab.hand().generate(lab.prompt(length, seed=length), COUNT).output for length in PROMPTS}


def test_tokens_are_worth_comparing(lab: Any, alone: dict[int, list[int]]) -> None:
    """They differ between prompts, and a change at the start of a prompt is felt at its end."""
    assert len({tuple(tokens) for tokens in alone.values()}) == len(PROMPTS)
    prompt = lab.prompt(390, seed=390)
    changed = lab.hand().generate([*([7] * 200), *prompt[200:]], COUNT)
    assert changed.output != alone[390]


def test_batched_equals_alone(lab: Any, alone: dict[int, list[int]]) -> None:
    hand = lab.hand()
    sequences = {length: hand.start(lab.prompt(length, seed=length)) for length in PROMPTS}
    hand.step(*((s, s.missing) for s in sequences.values()))
    for _ in range(COUNT - 1):
        hand.step(*((s, 1) for s in sequences.values()))
    assert {length: s.output for length, s in sequences.items()} == alone


def test_prefill_and_decode_mix_in_one_step(lab: Any, alone: dict[int, list[int]]) -> None:
    hand = lab.hand()
    sequences = {length: hand.start(lab.prompt(length, seed=length)) for length in PROMPTS}
    generator = np.random.default_rng(1)
    while any(len(s.output) < COUNT for s in sequences.values()):
        rows = [
            (s, 1 if s.missing == 1 else int(generator.integers(1, min(s.missing, 150) + 1)))
            for s in sequences.values()
            if len(s.output) < COUNT and generator.random() < 0.7
        ]
        generator.shuffle(rows)
        hand.step(*rows)
    assert {length: s.output for length, s in sequences.items()} == alone


@pytest.mark.parametrize("chunk", [1, 37, 128, 200])
def test_chunked_equals_whole(lab: Any, alone: dict[int, list[int]], chunk: int) -> None:
    length = 130 if chunk == 1 else 390
    hand = lab.hand()
    assert hand.generate(lab.prompt(length, seed=length), COUNT, chunk=chunk).output == alone[length]


def test_page_order_is_irrelevant(lab: Any, alone: dict[int, list[int]]) -> None:
    pages = np.random.default_rng(3).permutation(lab.resolved().num_pages).tolist()
    hand = lab.hand(page_order=[*pages])
    first, second = hand.start(lab.prompt(390, seed=390)), hand.start(lab.prompt(257, seed=257))
    while len(first.output) < COUNT or len(second.output) < COUNT:
        # Chunks take turns, so that the pages of the two interleave.
        rows = [(s, min(100, s.missing)) for s in (first, second) if len(s.output) < COUNT]
        hand.step(*rows)
    assert (first.pages, second.pages) == ([pages[0], pages[2]], [pages[1], pages[3]])
    assert (first.output, second.output) == (alone[390], alone[257])


def test_slots_and_pages_are_reused_cleanly(lab: Any, alone: dict[int, list[int]]) -> None:
    hand = lab.hand()
    others = [hand.start(lab.prompt(300 + i, seed=50 + i), SamplingParams(seed=i)) for i in range(4)]
    hand.step(*((s, s.missing) for s in others))
    for _ in range(5):
        hand.step(*((s, 1) for s in others))
    hand.finish(*others)
    for length in PROMPTS:
        sequence = hand.generate(lab.prompt(length, seed=length), COUNT)
        assert sequence.slot == others[-1].slot and sequence.output == alone[length]


def test_abort_in_the_middle_of_a_prompt_leaves_the_others_alone(lab: Any, alone: dict[int, list[int]]) -> None:
    hand = lab.hand()
    kept, gone = hand.start(lab.prompt(257, seed=257)), hand.start(lab.prompt(400, seed=9))
    hand.step((kept, 100), (gone, 150))
    hand.step((kept, 157), (gone, 130))
    hand.finish(gone)
    heir = hand.start(lab.prompt(130, seed=130))
    assert heir.slot == gone.slot
    while len(heir.output) < COUNT:
        hand.step(*((s, s.missing) for s in (kept, heir) if len(s.output) < COUNT))
    assert (kept.output, heir.output) == (alone[257], alone[130])
    assert set(heir.pages) <= set(gone.pages)


def test_plain_ops_run_the_same_plans(lab: Any, alone: dict[int, list[int]]) -> None:
    """Without fixed shapes bits may differ; the first token of a prompt has margin enough here."""
    hand = lab.hand(deterministic=False)
    sequences = {length: hand.start(lab.prompt(length, seed=length)) for length in PROMPTS}
    hand.step(*((s, s.missing) for s in sequences.values()))
    assert {length: s.output for length, s in sequences.items()} == {k: v[:1] for k, v in alone.items()}


@pytest.mark.parametrize("flags", [{"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "bfloat16"}], ids=str)
def test_other_row_formats_keep_the_equalities(lab: Any, flags: dict[str, Any]) -> None:
    single = {length: lab.hand(**flags).generate(lab.prompt(length, seed=length), COUNT).output for length in PROMPTS}
    hand = lab.hand(**flags)
    sequences = {length: hand.start(lab.prompt(length, seed=length)) for length in PROMPTS}
    while any(len(s.output) < COUNT for s in sequences.values()):
        hand.step(*((s, min(90, s.missing)) for s in sequences.values() if len(s.output) < COUNT))
    assert {length: s.output for length, s in sequences.items()} == single


SAMPLED: tuple[dict[str, Any], ...] = (
    {"logprobs": 3},
    {"top_k": 20, "top_p": 0.9},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.3, "temperature": 0.0},
    {"logit_bias": {5: 4.0}, "min_p": 0.02},
    {"min_tokens": 4, "stop_token_ids": (9,), "temperature": 2.0},
)


def test_sampled_requests_do_not_depend_on_their_neighbours(lab: Any) -> None:
    params = [SamplingParams(seed=40 + i, max_tokens=300, **change) for i, change in enumerate(SAMPLED)]
    single = [lab.hand().generate(lab.prompt(60 + i, seed=i), 12, p) for i, p in enumerate(params)]
    hand = lab.hand()
    sequences = [hand.start(lab.prompt(60 + i, seed=i), p) for i, p in enumerate(params)]
    hand.step(*((s, 30) for s in sequences[::2]))
    while any(len(s.output) < 12 for s in sequences):
        hand.step(*((s, s.missing) for s in sequences if len(s.output) < 12))
    assert [s.output for s in sequences] == [s.output for s in single]
    assert [s.logprobs for s in sequences] == [s.logprobs for s in single]
    assert all(row.logprob <= 0 and len(row.top_ids) == 3 for row in sequences[0].logprobs)
    again = lab.hand().generate(lab.prompt(60, seed=0), 12, params[0])
    other = lab.hand().generate(lab.prompt(60, seed=0), 12, SamplingParams(seed=1, max_tokens=300, logprobs=3))
    assert again.output == single[0].output and other.output != single[0].output


def test_plain_ops_survive_a_request_that_is_not_finite(lab: Any, alone: dict[int, list[int]]) -> None:
    weight = lab.models[False].embed.weight
    saved = weight[1].clone()
    try:
        weight[1] = float("nan")
        hand = lab.hand(deterministic=False)
        victim, neighbour = hand.start([*lab.prompt(300, seed=8), 1]), hand.start(lab.prompt(257, seed=257))
        result = hand.step((victim, victim.missing), (neighbour, neighbour.missing))
        assert set(result.failed) == {victim.request_id}
        hand.finish(victim)
        heir = hand.start(lab.prompt(390, seed=390))
        assert not hand.step((neighbour, 1), (heir, heir.missing)).failed
        assert (neighbour.output[0], heir.output[0]) == (alone[257][0], alone[390][0])
    finally:
        weight[1] = saved


def test_a_request_that_is_not_finite_fails_alone_and_leaves_nothing_behind(
    lab: Any, alone: dict[int, list[int]]
) -> None:
    weight = lab.models[True].embed.weight
    poison = 1
    saved = weight[poison].clone()
    try:
        weight[poison] = float("nan")
        hand = lab.hand()
        victim, neighbour = hand.start([*lab.prompt(300, seed=8), poison]), hand.start(lab.prompt(257, seed=257))
        result = hand.step((victim, victim.missing), (neighbour, neighbour.missing))
        assert result.failed == {victim.request_id: "the model's output is not finite"}
        assert result.request_ids == (neighbour.request_id,) and victim.output == []
        hand.finish(victim)
        # The heir gets the victim's slot and pages, NaN rows and all.
        heir = hand.start(lab.prompt(390, seed=390))
        assert heir.slot == victim.slot
        while len(heir.output) < COUNT:
            hand.step(*((s, s.missing) for s in (neighbour, heir) if len(s.output) < COUNT))
        assert set(victim.pages) <= set(heir.pages)
        assert (neighbour.output, heir.output) == (alone[257], alone[390])
    finally:
        weight[poison] = saved


def test_page_copies_move_whole_pages(lab: Any) -> None:
    hand = lab.hand()
    sequence = hand.start(lab.prompt(300))
    hand.step((sequence, 300))
    cache = hand.executor._runner.cache
    pages = [t.transpose(0, 1) for t in cache._pages()]
    assert not any(torch.equal(t[0], t[7]) for t in pages)
    copies = (PageCopy(source=0, target=7), PageCopy(source=1, target=9))
    result = hand.executor.execute(StepPlan(step_id=2, page_copies=copies))
    assert result.request_ids == () and result.step_id == 2
    assert all(torch.equal(t[0], t[7]) and torch.equal(t[1], t[9]) for t in pages)


def test_finished_requests_may_be_unknown_and_plans_may_be_empty(lab: Any) -> None:
    hand = lab.hand()
    assert hand.executor.execute(StepPlan(step_id=1, finished=("nobody",))).token_ids == ()
    assert hand.step().request_ids == ()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_running_out_of_memory_costs_the_step_only(lab: Any, alone: dict[int, list[int]], error: Exception) -> None:
    hand = lab.hand()
    runner, real = hand.executor._runner, hand.executor._runner.model.forward
    try:
        runner.model.forward = _raise(error)
        doomed = hand.start(lab.prompt(50))
        with pytest.raises(StepError, match="out of memory in a step of 50 tokens"):
            hand.step((doomed, 50))
    finally:
        runner.model.forward = real
    hand.finish(doomed)
    assert hand.generate(lab.prompt(130, seed=130), COUNT).output == alone[130]


def test_other_errors_are_not_swallowed(lab: Any) -> None:
    hand = lab.hand()
    model, real = hand.executor._runner.model, hand.executor._runner.model.forward
    try:
        model.forward = _raise(RuntimeError("an illegal memory access"))
        with pytest.raises(RuntimeError, match="illegal") as caught:
            hand.step((hand.start(lab.prompt(5)), 5))
        assert not isinstance(caught.value, StepError)
    finally:
        model.forward = real


def _raise(error: Exception) -> Callable[..., Any]:
    def forward(*_: Any) -> Any:
        raise error

    return forward


def test_logits_come_in_blocks_of_bounded_size(
    lab: Any, alone: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.runner.model_runner.SAMPLER_ELEMENTS", 2 * lab.models[True].config.vocab_size)
    hand = lab.hand()
    sequences = {length: hand.start(lab.prompt(length, seed=length)) for length in PROMPTS}
    for _ in range(COUNT):
        hand.step(*((s, s.missing) for s in sequences.values()))
    assert {length: s.output for length, s in sequences.items()} == alone
