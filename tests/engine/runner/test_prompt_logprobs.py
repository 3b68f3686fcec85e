"""Log probabilities of prompts: the model's own, whatever the chunks, the neighbours, the tiles and the cache."""

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from engine.client import RequestOutput
from engine.clients import InProcessClient
from engine.config import workspace_bytes
from engine.messages import AddRequest, SamplingParams, pack_ids
from engine.plan import PromptLogprobs
from engine.runner import model_runner
from engine.runner.executor import ModelExecutor
from model.presets import preset


def asking(num_top: int = 3, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=10, prompt_logprobs=num_top, **fields)


def scored(hand: Any, prompt: list[int], chunks: list[int], params: SamplingParams) -> list[PromptLogprobs]:
    """Chunks of one request alone."""
    sequence = hand.start(prompt, params)
    found = []
    for chunk in chunks:
        result = hand.step((sequence, chunk))
        found += list(result.prompt_logprobs.values())
    hand.step((sequence, 1))  # a decode step has none
    hand.finish(sequence)
    return found


def joined(found: list[PromptLogprobs]) -> tuple[np.ndarray, ...]:
    positions = np.concatenate([chunk.start + np.arange(len(chunk.logprobs_N)) for chunk in found])
    assert positions.tolist() == list(range(1, len(positions) + 1))
    columns = ("logprobs_N", "ranks_N", "top_ids_NK", "top_logprobs_NK")
    return tuple(np.concatenate([getattr(chunk, column) for chunk in found]) for column in columns)


def equal(first: tuple[np.ndarray, ...], second: tuple[np.ndarray, ...]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_they_are_the_log_softmax_of_each_prefix(make_hand: Any, lab: Any) -> None:
    """The oracle: each prefix as a prompt of its own, and the log probability of what comes next."""
    prompt = lab.prompt(40, seed=5)
    logprobs, ranks, top_ids, tops = joined(scored(make_hand(), prompt, [40], asking()))
    assert logprobs.shape == ranks.shape == (39,) and top_ids.shape == tops.shape == (39, 3)
    for position in (1, 2, 7, 38, 39):
        alone = make_hand().generate(prompt[:position], 1, SamplingParams(temperature=0.0, logprobs=320, max_tokens=2))
        row = alone.logprobs[0]
        by_id = dict(zip(row.top_ids, row.top_logprobs, strict=True))
        assert logprobs[position - 1] == pytest.approx(by_id[prompt[position]], abs=1e-4)
        assert top_ids[position - 1].tolist() == list(row.top_ids[:3])
        assert tops[position - 1].tolist() == pytest.approx(row.top_logprobs[:3], abs=1e-4)
        assert row.top_logprobs[ranks[position - 1] - 1] == pytest.approx(by_id[prompt[position]], abs=1e-6)


@pytest.mark.parametrize("chunks", [[1, 299], [299, 1], [100, 100, 100], [257, 43], [23] * 13 + [1]], ids=str)
def test_chunks_change_nothing(make_hand: Any, lab: Any, chunks: list[int]) -> None:
    prompt = lab.prompt(300, seed=1)
    assert equal(
        joined(scored(make_hand(), prompt, [300], asking())), joined(scored(make_hand(), prompt, chunks, asking()))
    )


def test_neighbours_and_tiles_change_nothing(make_hand: Any, lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [lab.prompt(n, seed=n) for n in (60, 90, 1, 2)]
    params = [asking(2), asking(0), asking(5), asking(1)]
    alone = [
        joined(found) if (found := scored(make_hand(), prompt, [len(prompt)], p)) else None
        for prompt, p in zip(prompts, params, strict=True)
    ]
    assert alone[2] is None, "one token predicts nothing of its prompt"
    monkeypatch.setattr(model_runner, "SAMPLER_ELEMENTS", 7 * 320)  # seven rows at a time
    hand = make_hand()
    plain = hand.start(lab.prompt(50, seed=9))
    hand.step((plain, 50))
    sequences = [hand.start(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    first = hand.step((plain, 1), (sequences[0], 31), (sequences[1], 90), (sequences[2], 1), (sequences[3], 2))
    second = hand.step((sequences[0], 29), (plain, 1), (sequences[1], 1))
    for i in (0, 1, 3):
        name = sequences[i].request_id
        found = [r.prompt_logprobs[name] for r in (first, second) if name in r.prompt_logprobs]
        expected = alone[i]
        assert expected is not None and equal(joined(found), expected)
    assert plain.request_id not in first.prompt_logprobs
    # Its tokens are those of a request without such neighbours.
    assert plain.output == make_hand().generate(lab.prompt(50, seed=9), 3).output


def test_tiles_are_bounded(make_hand: Any, lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    widest = 0
    model = lab.models[True]
    head = model.logits

    def watched(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal widest
        widest = max(widest, len(hidden))
        return head(hidden)

    monkeypatch.setattr(model, "logits", watched)
    monkeypatch.setattr(model_runner, "SAMPLER_ELEMENTS", 16 * 320)
    scored(make_hand(), lab.prompt(200), [200], asking())
    assert widest == 16


def test_the_workspace_counts_the_rows_of_a_whole_step() -> None:
    small, large = (
        workspace_bytes(preset("flash"), dtype="bfloat16", max_num_seqs=1, max_num_batched_tokens=n, max_model_len=1000)
        for n in (1, 512)
    )
    # One block of logits, four copies, beyond what the activations of 511 more rows take.
    assert large - small > (1 << 25) * 4 * 3


def test_a_prompt_that_is_not_finite_fails_alone(make_hand: Any, lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lab.models[True]
    head = model.logits

    def poisoned(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = head(hidden)
        if len(hidden) == 29:
            logits[11] = float("nan")
        return logits

    hand = make_hand()
    bad, good = hand.start(lab.prompt(30), asking()), hand.start(lab.prompt(12, seed=3))
    monkeypatch.setattr(model, "logits", poisoned)
    result = hand.step((bad, 30), (good, 12))
    assert set(result.failed) == {bad.request_id}
    assert result.request_ids == (good.request_id,) and result.prompt_logprobs == {}


async def answer(client: InProcessClient, request_id: str, prompt: list[int], params: SamplingParams) -> Any:
    outputs: list[RequestOutput] = []
    request = AddRequest(
        request_id=request_id, prompt_token_ids=pack_ids(prompt), sampling=params, snapshot_positions=pack_ids([512])
    )
    async for output in client.submit(request):
        assert output.error is None
        outputs.append(output)
    return outputs


def test_a_cached_prompt_is_computed_again_and_shared_afterwards(lab: Any) -> None:
    prompt = lab.prompt(600, seed=8)

    async def main() -> None:
        resolved = lab.resolved(max_num_batched_tokens=256)
        assert resolved.enable_prefix_cache
        client = InProcessClient(ModelExecutor(resolved, lab.models[True]))
        try:
            cold = await answer(client, "a", prompt, asking())
            warm = await answer(client, "b", prompt, asking())
            plain = await answer(client, "c", prompt, SamplingParams(temperature=0.0, max_tokens=10))
            assert [o.prompt_logprobs is not None for o in cold] == [True] + [False] * 9
            columns = cold[0].prompt_logprobs
            assert columns == warm[0].prompt_logprobs
            assert len(columns.logprobs) == 4 * 599 and len(columns.top_ids) == 3 * 4 * 599
            assert cold[-1].cached_tokens == warm[-1].cached_tokens == 0
            assert warm[-1].miss_reason == "prompt_logprobs"
            assert plain[-1].cached_tokens >= 512
            tokens = [[t for o in outputs for t in o.token_ids] for outputs in (cold, warm, plain)]
            assert tokens[0] == tokens[1] == tokens[2]
            expected = joined(scored(lab.hand(), prompt, [600], asking()))
            assert np.array_equal(np.frombuffer(columns.logprobs, "<f4"), expected[0])
            assert np.array_equal(np.frombuffer(columns.ranks, "<i4"), expected[1])
        finally:
            await client.close()

    asyncio.run(main())
