"""A whole engine core on this thread, around a real model: requests in, tokens and log probabilities out."""

import random
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.core import EngineCore
from engine.messages import AddRequest, FinishReason, LogprobRow, SamplingParams, StepOutputs, pack_ids
from engine.outputs import split
from engine.plan import StepPlan, StepResult
from engine.runner.executor import ModelExecutor
from model.kv_layout import PAGE_TOKENS

TOP = 5
MOST_STEPS = 4000


@dataclass(slots=True)
class Answer:
    tokens: list[int]
    logprobs: list[LogprobRow]
    finish: FinishReason | None = None
    cached_tokens: int = 0


class WatchedExecutor(ModelExecutor):
    """Keeps the plans that it has run, and spoils pages that have left the device: whoever reads them is seen."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.plans: list[StepPlan] = []
        assert self._runner is not None
        pages, cache = self._runner.host_pages, self._runner.cache
        rubbish = torch.full((cache.layout.bytes_per_page,), 255, dtype=torch.uint8)
        spill = pages.spill

        def spill_and_spoil(page: int, host_page: int) -> None:
            spill(page, host_page)
            cache.unpack_page(page, rubbish)

        pages.spill = spill_and_spoil  # type: ignore[method-assign]

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        return super().execute(plan)


class Engine:
    """The engine core, its books checked after every step."""

    def __init__(
        self,
        lab: Any,
        *,
        output_quantile: float = 1.0,
        places: dict[str, int] | None = None,
        page_order: int | None = None,
        deterministic: bool = True,
        top: int = TOP,
        **flags: Any,
    ) -> None:
        """`places` overrides sizes of the resolved configuration; `page_order` seeds the order in which pages are
        taken; `top` is how many log probabilities are asked for.
        """
        config = lab.resolved(**flags)
        config = replace(
            config, scheduling=replace(config.scheduling, output_quantile=output_quantile), **(places or {})
        )
        self.executor = WatchedExecutor(config, lab.models[deterministic])
        self.core = EngineCore(self.executor)
        # Which way back is the cheapest must not depend on how busy this machine is.
        self.core.scheduler.costs.observe = lambda features, seconds: None  # type: ignore[method-assign]
        self.answers: dict[str, Answer] = {}
        self._top = top
        if page_order is not None:
            pages = self.core.scheduler.kv.pages
            ids = list(pages.allocate(pages.num_pages))
            random.Random(page_order).shuffle(ids)
            pages.free(ids)

    def submit(self, name: str, prompt: list[int], answer: int, anchors: tuple[int, ...] = ()) -> Answer:
        sampling = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True, logprobs=self._top, seed=1)
        message = AddRequest(
            request_id=name,
            prompt_token_ids=pack_ids(prompt),
            sampling=sampling,
            snapshot_positions=pack_ids(list(anchors)),
        )
        self.answers[name] = Answer([], [])
        self.core.inbox.put(self.core.prepare(message))
        return self.answers[name]

    def step(self) -> None:
        self.core.step()
        self.core.scheduler.check()
        while self.core.outbox:
            frame = self.core.outbox.popleft()
            assert isinstance(frame, StepOutputs)
            for name, output in split(frame):
                assert output.error is None
                answer = self.answers[name]
                answer.tokens += output.token_ids
                answer.logprobs += output.logprobs or ()
                answer.cached_tokens = output.cached_tokens
                answer.finish = output.finish_reason or answer.finish

    @property
    def has_work(self) -> bool:
        return self.core.scheduler.has_work or not self.core.inbox.empty()

    def run(self) -> None:
        for _ in range(MOST_STEPS):
            if not self.has_work:
                return
            self.step()
        raise AssertionError("the engine does not come to rest")

    def ask(self, prompt: list[int], answer: int, anchors: tuple[int, ...] = ()) -> Answer:
        found = self.submit(f"r{len(self.answers)}", prompt, answer, anchors)
        self.run()
        return found

    def take_all_pages(self) -> None:
        """Somebody else has all pages of the device for a moment: what is cached goes to host memory."""
        kv, num_tokens = self.core.scheduler.kv, self.executor.config.num_pages * PAGE_TOKENS
        admitted = kv.admit("stranger", num_tokens)
        assert isinstance(admitted, tuple), "somebody holds pages on the device"
        kv.extend(admitted[0], num_tokens)
        kv.release(admitted[0])

    def preempt_all(self) -> None:
        """Send everybody who runs back to the queue; no step is under way."""
        scheduler = self.core.scheduler
        for request in list(scheduler._running.values()):
            scheduler._preemption._preempt(request, 0.0)
        assert not scheduler.num_running

    def orders(self, kind: str) -> list[Any]:
        """All moves of a kind that were planned, by the name of the plan's field."""
        return [move for plan in self.executor.plans for move in getattr(plan, kind)]

    @property
    def stats(self) -> Any:
        return self.core.scheduler.stats()


def cold(lab: Any, prompt: list[int], answer: int) -> Answer:
    return Engine(lab, enable_prefix_cache=False).ask(prompt, answer)


def assert_same(found: Answer, expected: Answer) -> None:
    assert found.tokens == expected.tokens
    assert found.logprobs == expected.logprobs
    assert found.finish == expected.finish == "length"
