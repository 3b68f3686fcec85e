"""Each kind of snapshot is taken where it should be and used by whom it is for."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from engine.config import ResolvedConfig, SchedulingConfig
from engine.core import EngineCore
from engine.messages import AddRequest, StepOutputs, pack_ids, unpack_ids
from engine.plan import StepPlan, StepResult
from engine.runner.sim_executor import SimExecutor
from model.presets import preset

MakeMessage = Callable[..., AddRequest]
MakeConfig = Callable[..., ResolvedConfig]
PERIOD = 32_768


class Watched(SimExecutor):
    """Keeps its plans."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.plans: list[StepPlan] = []

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        return super().execute(plan)


class Engine:
    def __init__(self, config: ResolvedConfig, make_message: MakeMessage) -> None:
        self.executor = Watched(config, preset("nano"))
        self.core = EngineCore(self.executor)
        self.make_message = make_message
        self.tokens: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}
        self.sent = 0

    def ask(self, prompt: list[int], answer: int = 4, anchors: tuple[int, ...] = ()) -> tuple[list[int], int]:
        """Tokens of the answer, and how many of the prompt were cached."""
        name = self.submit(prompt, answer, anchors)
        self.run()
        return self.tokens[name], self.cached[name]

    def submit(self, prompt: list[int], answer: int, anchors: tuple[int, ...] = ()) -> str:
        self.sent += 1
        positions = pack_ids(list(anchors))
        message = self.make_message(
            f"r{self.sent}", prompt, max_tokens=answer, ignore_eos=True, snapshot_positions=positions
        )
        self.core.inbox.put(message)
        return message.request_id

    def run(self) -> None:
        self.step()
        while self.core.scheduler.has_work:
            self.step()

    def step(self) -> None:
        self.core.step()
        self.core.scheduler.check()
        while self.core.outbox:
            frame = self.core.outbox.popleft()
            assert isinstance(frame, StepOutputs)
            ids = unpack_ids(frame.token_ids).tolist()
            for i, name in enumerate(frame.request_ids):
                self.tokens.setdefault(name, []).extend(ids[frame.cu_tokens[i] : frame.cu_tokens[i + 1]])
                self.cached[name] = frame.cached_tokens[i]

    @property
    def kept(self) -> set[tuple[str, int]]:
        """Kind and position of all snapshots."""
        return {(snapshot.kind, snapshot.position) for snapshot in self.core.scheduler.kv.snapshots}

    @property
    def last_way(self) -> str:
        """How the newest request began."""
        plan = next(plan for plan in reversed(self.executor.plans) if plan.new)
        return "restored" if plan.slot_restores else "replayed" if plan.replays else "cold"


@pytest.fixture
def engine(make_config: MakeConfig, make_message: MakeMessage) -> Engine:
    config = make_config(
        max_model_len=1 << 18, num_pages=1024, num_snapshots=32, num_host_pages=64, max_num_batched_tokens=8192
    )
    return Engine(config, make_message)


def text(length: int, seed: int) -> list[int]:
    """Tokens that differ from those of another seed everywhere."""
    return [2 + (seed * 101 + i * 7) % 2000 for i in range(length)]


def test_where_the_assistant_opens(engine: Engine) -> None:
    """What follows may be dropped from the history by the next turn."""
    prompt = text(700, 1)
    engine.ask(prompt, anchors=(690,))
    assert ("prompt_end", 690) in engine.kept
    _, cached = engine.ask([*prompt[:690], *text(50, 2)])
    assert cached == 690 and engine.last_way == "restored"


def test_at_the_end_of_a_turn(engine: Engine) -> None:
    prompt = text(700, 1)
    answer, _ = engine.ask(prompt, 9)
    assert engine.kept == {("turn_end", 708)}
    _, cached = engine.ask([*prompt, *answer, *text(50, 2)])
    assert cached == 708 and engine.last_way == "restored"


@pytest.mark.parametrize("own", [900, 30])
def test_where_a_second_request_leaves_the_first(engine: Engine, own: int) -> None:
    """The second is replayed there, the third restored; both compute their own tokens only."""
    shared = text(20_000, 1)
    engine.ask([*shared, *text(900, 2)])
    junction = len(shared) // 256 * 256
    _, second = engine.ask([*shared, *text(own, 3)])
    assert second == junction and engine.last_way == "replayed"
    assert ("junction", junction) in engine.kept
    _, third = engine.ask([*shared, *text(own, 4)])
    assert third == junction and engine.last_way == "restored"


def test_where_replay_would_be_dearer_the_second_request_passes_the_junction(engine: Engine) -> None:
    """A short shared beginning is computed again, and kept on the way."""
    shared = text(300, 1)
    engine.ask([*shared, *text(900, 2)])
    _, second = engine.ask([*shared, *text(900, 3)])
    assert second == 0 and ("junction", 256) in engine.kept
    _, third = engine.ask([*shared, *text(900, 4)])
    assert third == 256 and engine.last_way == "restored"


def test_on_the_way_through_a_long_cold_prompt(engine: Engine) -> None:
    prompt = text(3 * PERIOD + 5000, 1)
    engine.ask(prompt)
    assert {position for kind, position in engine.kept if kind == "periodic"} == {PERIOD, 2 * PERIOD, 3 * PERIOD}
    _, cached = engine.ask([*prompt[:PERIOD], *text(3000, 2)])
    assert cached == PERIOD and engine.last_way == "restored"
    # What is cached is not kept again, and what is not is too little.
    engine.ask([*prompt, *text(PERIOD, 3)])
    assert len([kind for kind, _ in engine.kept if kind == "periodic"]) == 3


def test_when_a_request_is_preempted(make_config: MakeConfig, make_message: MakeMessage) -> None:
    scheduling = SchedulingConfig(
        step_seconds=1e6, interactive_itl_seconds=1e6, long_itl_seconds=1e6, output_quantile=0.1
    )
    config = make_config(num_pages=5, num_snapshots=32, num_host_pages=64, scheduling=scheduling)
    engine = Engine(config, make_message)
    for i in range(20):
        engine.ask(text(8, i), 1)
    names = [engine.submit(text(240 + 2 * i, 50 + i), 300) for i in range(4)]
    hibernated: set[int] = set()
    while engine.core.scheduler.has_work or not engine.core.inbox.empty():
        engine.step()
        hibernated |= {position for kind, position in engine.kept if kind == "hibernate"}
    stats = engine.core.scheduler.stats()
    assert stats.num_hibernations == stats.num_wakes > 0 and stats.num_recomputed_tokens == 0
    woken = {
        new.num_computed_tokens
        for plan in engine.executor.plans
        for new in plan.new
        if len(new.token_ids) > new.num_prompt_tokens
    }
    assert woken and woken <= hibernated
    cold = Engine(replace(config, num_pages=64, enable_prefix_cache=False), make_message)
    for i, name in enumerate(names):
        assert engine.tokens[name] == cold.ask(text(240 + 2 * i, 50 + i), 300)[0]
