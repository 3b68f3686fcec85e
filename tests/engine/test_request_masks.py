"""Log probabilities of prompts, forced and excluded tokens through the whole engine on the simulated executor."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine.config import ResolvedConfig, SchedulingConfig
from engine.core import EngineCore
from engine.messages import AddRequest, ForcedToken, PromptLogprobColumns, StepOutputs, pack_ids, unpack_ids
from engine.request import InvalidRequestError, Request
from engine.runner.sim_executor import SimExecutor
from model.presets import preset

MakeMessage = Callable[..., AddRequest]
MakeConfig = Callable[..., ResolvedConfig]
OVERBOOKED = SchedulingConfig(
    step_seconds=1e6, interactive_itl_seconds=1e6, long_itl_seconds=1e6, long_prompt_tokens=600, output_quantile=0.5
)
END, CALL = 90, 91


def answers(core: EngineCore, messages: list[AddRequest]) -> dict[str, Any]:
    """By request: tokens, finish reason, error code and the log probabilities of its prompt."""
    found: dict[str, Any] = {
        m.request_id: {"tokens": [], "finish": None, "error": None, "scores": []} for m in messages
    }
    for message in messages:
        core.inbox.put(message)
    for _ in range(20_000):
        core.step()
        core.scheduler.check()
        while core.outbox:
            frame = core.outbox.popleft()
            if not isinstance(frame, StepOutputs):
                continue
            token_ids = unpack_ids(frame.token_ids).tolist()
            for i, request_id in enumerate(frame.request_ids):
                mine = found[request_id]
                mine["tokens"] += token_ids[frame.cu_tokens[i] : frame.cu_tokens[i + 1]]
                mine["finish"] = frame.finish[i] or mine["finish"]
                mine["error"] = None if frame.errors[i] is None else frame.errors[i].code
                if request_id in frame.prompt_logprobs:
                    assert len(mine["tokens"]) == 1, "beside the first token"
                    mine["scores"].append(frame.prompt_logprobs[request_id])
        if all(mine["finish"] for mine in found.values()):
            return found
    raise AssertionError("the engine does not come to an end")


def check_scores(columns: PromptLogprobColumns, message: AddRequest) -> None:
    count = len(message.prompt_token_ids) // 4 - 1
    asked = message.sampling.prompt_logprobs or 0
    assert len(columns.logprobs) == len(columns.ranks) == 4 * count
    assert len(columns.top_ids) == len(columns.top_logprobs) == 4 * count * asked
    if asked and count:
        firsts = np.frombuffer(columns.top_ids, "<i4").reshape(count, asked)[:, 0]
        assert firsts.tolist() == unpack_ids(message.prompt_token_ids)[1:].tolist()


def test_scores_come_once_and_whole_whatever_happens(make_config: MakeConfig, make_message: MakeMessage) -> None:
    """Chunks of 96 rows, few pages, victims: every prompt is scored from its second token to its last."""
    for seed in range(3):
        chance = np.random.default_rng(seed)
        config = make_config(num_pages=6, max_num_batched_tokens=96, scheduling=OVERBOOKED, num_host_pages=8)
        core = EngineCore(SimExecutor(config, preset("nano"), eos_probability=0.02), clock=lambda: 0.0)
        teach = [make_message(f"t{i}", 4, max_tokens=2, ignore_eos=True) for i in range(20)]
        answers(core, teach)
        messages = [
            make_message(
                f"r{i}",
                int(chance.integers(1, 400)),
                max_tokens=int(chance.integers(1, 500)),
                ignore_eos=True,
                prompt_logprobs=None if i % 3 == 2 else int(chance.integers(0, 4)),
            )
            for i in range(9)
        ]
        found = answers(core, messages)
        for message in messages:
            mine = found[message.request_id]
            assert mine["finish"] == "length"
            assert len(mine["scores"]) == (message.sampling.prompt_logprobs is not None)
            for columns in mine["scores"]:
                check_scores(columns, message)
        assert core.scheduler.totals.num_preemptions > 0, "nothing was preempted: the test says little"


def test_a_scored_prompt_is_not_taken_from_the_cache(make_config: MakeConfig, make_message: MakeMessage) -> None:
    core = EngineCore(SimExecutor(make_config(num_snapshots=8, num_host_pages=8), preset("nano")), clock=lambda: 0.0)
    prompt = np.random.default_rng(1).integers(2, 2048, 1500).tolist()
    positions = {"snapshot_positions": pack_ids([1280])}
    found = answers(core, [make_message("a", prompt, max_tokens=3, **positions)])
    hits = core.scheduler.totals.hit_tokens
    found |= answers(core, [make_message("b", prompt, max_tokens=3, prompt_logprobs=1)])
    assert core.scheduler.totals.hit_tokens == hits and len(found["b"]["scores"]) == 1
    found |= answers(core, [make_message("c", prompt, max_tokens=3)])
    assert core.scheduler.totals.hit_tokens >= hits + 1280
    assert found["a"]["tokens"] == found["b"]["tokens"] == found["c"]["tokens"]
    assert core.scheduler.totals.miss_counts["prompt_logprobs"] == 1


@pytest.mark.parametrize(
    ("script", "forced", "expected"),
    [
        ([5, 6, 7, END, 8, 9], ForcedToken(token_id=END, after=2), [5, 6, END, 8, 9]),
        ([5, 6, 7, END, 8, 9], ForcedToken(token_id=END, after=0), [END, 8, 9]),
        ([5, 6, 7, END, 8, 9], ForcedToken(token_id=END, after=3), [5, 6, 7, END, 8, 9]),
        ([5, 6, 7, END, 8, 9], ForcedToken(token_id=END, after=9), [5, 6, 7, END, 8, 9]),
        ([5, CALL, 7, 8, 9, 9], ForcedToken(token_id=END, after=3, unless=(CALL,)), [5, CALL, 7, 8, 9, 9]),
        ([5, 6, 7, 8], ForcedToken(token_id=END, after=2), [5, 6, END, 8]),
    ],
)
def test_a_script_under_a_forced_token(
    make_config: MakeConfig, make_message: MakeMessage, script: list[int], forced: ForcedToken, expected: list[int]
) -> None:
    executor = SimExecutor(make_config(), preset("nano"), script=lambda prompt: script)
    core = EngineCore(executor, clock=lambda: 0.0)
    found = answers(core, [make_message("a", 5, max_tokens=50, forced_token=forced)])
    assert found["a"]["tokens"] == [*expected, 1] and found["a"]["finish"] == "stop"


def test_nothing_left_ends_one_request(make_config: MakeConfig, make_message: MakeMessage) -> None:
    core = EngineCore(SimExecutor(make_config(), preset("nano")), clock=lambda: 0.0)
    stuck = make_message("a", 5, max_tokens=9, allowed_token_ids=pack_ids([7]), bad_words=((7, 7),))
    found = answers(core, [stuck, make_message("b", 5, max_tokens=9, ignore_eos=True)])
    assert (found["a"]["finish"], found["a"]["error"], found["a"]["tokens"]) == ("error", "no_token_left", [7])
    assert found["b"]["finish"] == "length"


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": b""},
        {"allowed_token_ids": b"abc"},
        {"allowed_token_ids": pack_ids([2048])},
        {"allowed_token_ids": pack_ids([-1])},
        {"bad_words": ((2048,),)},
        {"bad_words": ((5, -1),)},
        {"bad_words": ((),)},
        {"forced_token": ForcedToken(token_id=2048, after=0)},
        {"forced_token": ForcedToken(token_id=5, after=0, unless=(2048,))},
        {"prompt_logprobs": -1},
    ],
    ids=str,
)
def test_impossible_parameters_never_become_a_request(make_message: MakeMessage, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        Request(make_message("a", **fields), vocab_size=2048, order=1, seed=0)
