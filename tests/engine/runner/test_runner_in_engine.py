"""The model behind the real engine core: many requests at once, and none of them notices."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from engine.client import RequestOutput
from engine.clients import InProcessClient
from engine.messages import AddRequest, SamplingParams, pack_ids
from engine.runner.executor import ModelExecutor

PARAMS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0, "logprobs": 2},
    {"top_p": 0.8, "presence_penalty": 0.5},
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"top_k": 10, "min_tokens": 3},
)


def message(lab: Any, i: int) -> AddRequest:
    params = SamplingParams(seed=i, max_tokens=5 + i % 7, **PARAMS[i % len(PARAMS)])
    prompt = lab.prompt(1 + i * 37 % 300, seed=i)
    return AddRequest(request_id=f"r{i}", prompt_token_ids=pack_ids(prompt), sampling=params)


async def collect(stream: AsyncIterator[RequestOutput]) -> tuple[list[int], str | None]:
    tokens: list[int] = []
    reason = None
    async for output in stream:
        tokens += output.token_ids
        reason = output.finish_reason
        assert output.error is None
    return tokens, reason


async def answers(
    lab: Any, order: list[int], aborted: set[int], **flags: Any
) -> dict[int, tuple[list[int], str | None]]:
    client = InProcessClient(ModelExecutor(lab.resolved(**flags), lab.models[True]))
    try:
        tasks = {i: asyncio.create_task(collect(client.submit(message(lab, i)))) for i in order}
        await asyncio.sleep(0.3)
        for i in aborted:
            client.abort(f"r{i}")
        results = {i: await task for i, task in tasks.items()}
        while client.stats.num_free_slots < flags["max_num_seqs"]:
            await asyncio.sleep(0.05)
        assert client.stats.num_running == client.stats.num_waiting == 0
        return results
    finally:
        await client.close()


def test_answers_do_not_depend_on_load_budget_or_aborted_neighbours(lab: Any) -> None:
    order = list(range(9))
    calm = asyncio.run(answers(lab, order, set(), max_num_seqs=1, max_num_batched_tokens=512))
    shuffled = np.random.default_rng(4).permutation(order).tolist()
    # 20 to 25 are aborted somewhere between the queue and their last token.
    busy = asyncio.run(
        answers(
            lab,
            [*range(20, 23), *shuffled, *range(23, 26)],
            set(range(20, 26)),
            max_num_seqs=6,
            max_num_batched_tokens=96,
        )
    )
    assert {i: busy[i] for i in order} == calm
    assert all(reason in ("stop", "length") and tokens for tokens, reason in calm.values())
