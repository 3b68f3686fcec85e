"""The checking twin must be able to say no: every kind of malformed plan is refused."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from engine.config import EngineConfig, EngineConfigError, ResolvedConfig
from engine.messages import SamplingParams
from engine.plan import NewRequest, PageCopy, ScheduledTokens, StepPlan
from engine.runner.sim_executor import CostModel, SimExecutor, create_sim_executor
from model.config import ModelConfig
from model.presets import preset


def new(request_id: str, slot: int, num_prompt: int = 300) -> NewRequest:
    tokens = np.arange(num_prompt, dtype=np.int32) % 2048
    return NewRequest(
        request_id=request_id,
        slot=slot,
        token_ids=tokens,
        num_prompt_tokens=num_prompt,
        sampling=SamplingParams(seed=1, max_tokens=9),
    )


def row(request_id: str, start: int, end: int, pages: tuple[int, ...] = (), samples: bool = False) -> ScheduledTokens:
    return ScheduledTokens(
        request_id=request_id, start=start, num_tokens=end - start, new_page_ids=pages, samples=samples
    )


@pytest.fixture
def executor(make_config: Callable[..., ResolvedConfig]) -> SimExecutor:
    """Request a (300 tokens, 256 computed, slot 0, page 4) and b (10 tokens, one sampled, slot 1, page 5)."""
    executor = SimExecutor(make_config(), preset("nano"))
    plan = StepPlan(
        step_id=1,
        new=(new("a", 0), new("b", 1, 10)),
        scheduled=(row("b", 0, 10, (5,), samples=True), row("a", 0, 256, (4,))),
    )
    result = executor.execute(plan)
    assert result.request_ids == ("b",) and result.logprobs == (None,)
    return executor


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (StepPlan(step_id=1), "step ids grow"),
        (StepPlan(step_id=2, scheduled=(row("a", 255, 300, (6,), samples=True),)), "row 255 after 256"),
        (StepPlan(step_id=2, scheduled=(row("a", 256, 301, (6,), samples=True),)), "unknown tokens"),
        (StepPlan(step_id=2, scheduled=(row("a", 256, 300, (6,)),)), "samples is wrong"),
        (StepPlan(step_id=2, scheduled=(row("a", 256, 299, (6,), samples=True),)), "samples is wrong"),
        (StepPlan(step_id=2, scheduled=(row("a", 256, 300, samples=True),)), "outside its pages"),
        (StepPlan(step_id=2, scheduled=(row("a", 256, 300, (5,), samples=True),)), "two owners"),
        (StepPlan(step_id=2, scheduled=(row("a", 256, 300, (4,), samples=True),)), "two owners"),
        (StepPlan(step_id=2, scheduled=(row("a", 256, 300, (64,), samples=True),)), "page 64"),
        (StepPlan(step_id=2, scheduled=(row("a", 256, 258, (6,)), row("a", 258, 259))), "scheduled twice"),
        (StepPlan(step_id=2, new=(new("c", 1),), scheduled=(row("c", 0, 256, (6,)),)), "slot 1 has two owners"),
        (StepPlan(step_id=2, new=(new("c", 8),), scheduled=(row("c", 0, 256, (6,)),)), "slot 8"),
        (StepPlan(step_id=2, new=(new("a", 2),), scheduled=(row("a", 0, 256, (6,)),)), "new twice"),
        (StepPlan(step_id=2, new=(new("c", 2),)), "no rows"),
        (StepPlan(step_id=2, new=(new("c", 2, 600),), scheduled=(row("c", 0, 600, (6, 7, 8), True),)), "600 rows"),
        (StepPlan(step_id=2, page_copies=(PageCopy(source=1, target=5),)), "is overwritten while"),
    ],
)
def test_a_malformed_plan_is_refused(executor: SimExecutor, plan: StepPlan, text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        executor.execute(plan)


def test_a_slot_and_pages_pass_on_in_one_plan(executor: SimExecutor) -> None:
    plan = StepPlan(
        step_id=2, finished=("b", "never seen"), new=(new("c", 1),), scheduled=(row("c", 0, 300, (5, 6), True),)
    )
    assert executor.execute(plan).request_ids == ("c",)


def test_a_plan_may_only_forget(executor: SimExecutor) -> None:
    assert executor.execute(StepPlan(step_id=2, finished=("a", "b"))).request_ids == ()


def test_cost_counts_rows_and_context() -> None:
    cost = CostModel(base_seconds=1.0, row_seconds=0.5, context_seconds=0.25)
    assert cost.seconds(StepPlan(step_id=1, scheduled=(row("a", 0, 4), row("b", 8, 10)))) == 1.0 + 3.0 + 4.0


def test_a_script_answers(make_config: Callable[..., ResolvedConfig]) -> None:
    executor = SimExecutor(make_config(), preset("nano"), script=lambda prompt: [int(prompt[1]) + 7])
    plan = StepPlan(step_id=1, new=(new("a", 0, 3),), scheduled=(row("a", 0, 3, (0,), samples=True),))
    assert executor.execute(plan).token_ids == (8,)
    assert executor.execute(StepPlan(step_id=2, scheduled=(row("a", 3, 4, samples=True),))).token_ids == (1,)


def test_ends_are_as_likely_as_said_and_never_too_early(make_config: Callable[..., ResolvedConfig]) -> None:
    executor = SimExecutor(make_config(num_pages=64), preset("nano"), eos_probability=0.1)
    ended = 0
    for i in range(1000):
        sampling = SamplingParams(seed=i, min_tokens=1 if i % 2 else 0)
        fresh = replace(new(str(i), 0, 5), sampling=sampling)
        plan = StepPlan(
            step_id=i + 1,
            finished=(str(i - 1),),
            new=(fresh,),
            scheduled=(row(str(i), 0, 5, (0,), samples=True),),
        )
        is_eos = executor.execute(plan).token_ids == (1,)
        assert not (is_eos and sampling.min_tokens)
        ended += is_eos
    assert 30 <= ended <= 75  # 50 expected of 500; more than 3 sigma either way


def test_the_simulated_engine_obeys_the_flags() -> None:
    config = EngineConfig(model_dir="", simulate=True, max_model_len=2048, max_num_seqs=5, max_num_batched_tokens=64)
    resolved = create_sim_executor(config).config
    assert (resolved.max_model_len, resolved.max_num_seqs, resolved.max_num_batched_tokens) == (2048, 5, 64)
    with pytest.raises(EngineConfigError, match="kv_cache_bytes"):
        create_sim_executor(EngineConfig(model_dir="", simulate=True, kv_cache_bytes=1000))
    assert isinstance(create_sim_executor(config).model, ModelConfig)
