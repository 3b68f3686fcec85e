"""The cost model against machines with known answers and against a roofline with kinks."""

import json
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cost_model import (
    CostModel,
    CostPrior,
    StepFeatures,
    active_parameters,
    chunk_work,
    cost_prior,
    features_of,
    replay_row_equivalents,
)
from engine.plan import ScheduledTokens, StepPlan
from engine.resume_costs import CopyAndComputeCosts
from engine.simulation.hardware import Machine, StepWork, gpu, simulated_config
from model.presets import preset

FLASH = preset("flash")
TRUTH = {"step": 4e-3, "request": 5e-5, "row": 3e-5, "context": 1e-9, "work": 1e-10, "mixed": 2e-3}
PRIOR = CostPrior(
    step_seconds=1e-2,
    request_seconds=1e-4,
    row_seconds=1e-4,
    context_seconds=5e-9,
    work_seconds=1e-9,
    mixed_seconds=5e-3,
)


def linear_seconds(features: StepFeatures) -> float:
    """The formula of the fact sheet: one slope for all rows."""
    return (
        TRUTH["step"]
        + TRUTH["request"] * features.num_requests
        + TRUTH["row"] * features.num_rows
        + TRUTH["context"] * features.decode_context
        + TRUTH["work"] * features.prefill_work
        + TRUTH["mixed"] * features.mixed
    )


def steps(seed: int, count: int) -> Iterator[tuple[StepFeatures, StepWork]]:
    """A server's life: decode steps, prompt steps and mixed ones, contexts from 1K to 1M."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        features, work = StepFeatures(), StepWork()
        shape = rng.choice(3, p=(0.4, 0.2, 0.4))
        if shape != 1:
            for context in np.exp(rng.uniform(np.log(1e3), np.log(1e6), rng.integers(1, 65))).astype(int).tolist():
                features.add_decode(context)
                work.decode_contexts.append(context)
                work.num_sampled += 1
        if shape != 0:
            for _ in range(rng.integers(1, 4)):
                rows = int(np.exp(rng.uniform(np.log(64), np.log(4096))))
                start = int(np.exp(rng.uniform(np.log(1e3), np.log(1e6))))
                features.add_prefill(start, rows)
                work.chunks.append((start, rows))
        yield features, work


def noisy(seconds: float, rng: np.random.Generator, sigma: float = 0.03) -> float:
    return seconds * float(np.exp(rng.normal(0.0, sigma)))


def errors(model: CostModel, truth: Callable[[StepFeatures, StepWork], float], seed: int) -> np.ndarray:
    pairs = [(model.predict(f), truth(f, w)) for f, w in steps(seed, 400)]
    return np.array([abs(predicted - seconds) / seconds for predicted, seconds in pairs])


def test_known_coefficients_are_recovered() -> None:
    model, rng = CostModel(FLASH, PRIOR), np.random.default_rng(1)
    for features, _ in steps(2, 600):
        model.observe(features, noisy(linear_seconds(features), rng, 0.02))
    found = model.coefficients()
    assert found["decode_context"] == pytest.approx(TRUTH["context"], rel=0.05)
    assert found["prefill_work"] == pytest.approx(TRUTH["work"], rel=0.05)
    # The slopes of f are told apart only where rows differ; what they add up to is what matters.
    for rows in (256, 1024, 4096, 8192):
        features = StepFeatures(num_requests=1, num_prefill_rows=rows)
        assert model.predict(features) == pytest.approx(linear_seconds(features), rel=0.05)
    assert np.quantile(errors(model, lambda f, _: linear_seconds(f), 3), 0.99) < 0.05


def test_a_few_steps_beat_the_prior_and_the_first_ones_are_bounded() -> None:
    model, rng = CostModel(FLASH, PRIOR), np.random.default_rng(4)
    before = errors(model, lambda f, _: linear_seconds(f), 5)
    assert (before > 0.5).mean() > 0.9
    budget, rows = 0.06, []
    for features, _ in steps(6, 40):
        rows.append(model.rows_within(StepFeatures(), 0, 8192, budget))
        model.observe(features, noisy(linear_seconds(features), rng))
    assert 0 < rows[0] <= 500
    assert np.median(errors(model, lambda f, _: linear_seconds(f), 5)) < 0.05


def test_drift_is_followed() -> None:
    model, rng = CostModel(FLASH, PRIOR), np.random.default_rng(7)
    for features, _ in steps(8, 400):
        model.observe(features, noisy(linear_seconds(features), rng))
    for features, _ in steps(9, 600):
        model.observe(features, noisy(1.6 * linear_seconds(features), rng))
    assert np.quantile(errors(model, lambda f, _: 1.6 * linear_seconds(f), 10), 0.95) < 0.06


def test_warm_ups_and_outliers_do_not_matter() -> None:
    model, rng = CostModel(FLASH, PRIOR), np.random.default_rng(11)
    for i, (features, _) in enumerate(steps(12, 500)):
        factor = 80.0 if i < 8 else 20.0 if rng.random() < 0.03 else 1.0
        model.observe(features, noisy(factor * linear_seconds(features), rng))
    assert np.quantile(errors(model, lambda f, _: linear_seconds(f), 13), 0.95) < 0.10


def test_what_is_not_seen_for_long_is_kept() -> None:
    model, rng = CostModel(FLASH, PRIOR), np.random.default_rng(14)
    for features, _ in steps(15, 500):
        model.observe(features, noisy(linear_seconds(features), rng))
    before = model.prefill_seconds(500_000, 520_000)
    for _ in range(5000):
        features = StepFeatures()
        for _ in range(4):
            features.add_decode(int(rng.integers(1000, 50_000)))
        model.observe(features, noisy(linear_seconds(features), rng))
    assert model.prefill_seconds(500_000, 520_000) == pytest.approx(before, rel=0.15)


@pytest.mark.parametrize(("name", "card"), [("flash", "h200"), ("flash", "b200"), ("pro", "h100")])
def test_prediction_error_on_a_roofline_with_kinks(name: str, card: str) -> None:
    """p95 under 15 % on steps that were not learnt from (kv-and-scheduling 8.4, I22)."""
    model = preset(name)
    layout = simulated_config(model, kv_bytes=80 << 30).layout(model)
    machine = Machine(model, layout, gpu(card))
    learner, rng = CostModel(model, cost_prior(model, "cuda")), np.random.default_rng(16)
    for features, work in steps(17, 800):
        learner.observe(features, noisy(machine.step_seconds(work), rng))
    found = errors(learner, lambda _, work: machine.step_seconds(work), 18)
    assert np.quantile(found, 0.95) < 0.15
    assert np.median(found) < 0.05
    # What resume plans and queues are ordered by: within 20 % of the machine's own times.
    for start, end in ((0, 5000), (0, 100_000), (900_000, 1_000_000)):
        assert learner.prefill_seconds(start, end) == pytest.approx(machine.prefill_seconds(start, end, 2048), rel=0.2)
    assert learner.replay_seconds(500_000) == pytest.approx(machine.replay_seconds(500_000), rel=0.2)


def test_steps_with_replays_are_learnt_from_like_others() -> None:
    """A replay is a pass of its own: what it costs is known from its rows, and it spoils nothing that is known."""
    layout = simulated_config(FLASH, kv_bytes=80 << 30).layout(FLASH)
    machine = Machine(FLASH, layout, gpu("h200"))
    learner, rng = CostModel(FLASH, PRIOR), np.random.default_rng(20)

    def with_replays(seed: int, count: int) -> Iterator[tuple[StepFeatures, StepWork]]:
        for features, work in steps(seed, count):
            for position in rng.choice([500, 30_000, 400_000], size=rng.integers(0, 3)).tolist():
                features.add_replay(learner.replay_rows(position), position)
                work.replays.append(position)
            yield features, work

    for features, work in with_replays(21, 500):
        learner.observe(features, noisy(machine.step_seconds(work), rng))
    found = [
        abs(learner.predict(features) / machine.step_seconds(work) - 1.0) for features, work in with_replays(22, 300)
    ]
    assert np.quantile(found, 0.95) < 0.15 and np.median(found) < 0.05
    plain = errors(learner, lambda _, work: machine.step_seconds(work), 23)
    assert np.quantile(plain, 0.95) < 0.15


def test_a_replay_is_counted_wherever_it_is_asked_for() -> None:
    model = CostModel(FLASH, PRIOR)
    features = StepFeatures()
    features.add_decode(1000)
    without = model.predict(features)
    features.add_replay(model.replay_rows(50_000), 50_000)
    assert model.predict(features) == pytest.approx(without + model.replay_seconds(50_000))
    assert model.predict(features.copy()) == model.predict(features)
    more = model.predict_with_prefill(features, 0, 500)
    features.add_prefill(0, 500)
    assert model.predict(features) == pytest.approx(more)
    model.observe(features, 2.0 * more)
    assert model.predict(features) > more


def test_the_speed_of_copies_is_learnt() -> None:
    costs = CopyAndComputeCosts(CostModel(FLASH, PRIOR), "cuda")
    assert costs.load_seconds(20_000_000_000) == pytest.approx(1.0)
    rng = np.random.default_rng(24)
    for _ in range(200):
        num_bytes = int(rng.integers(1 << 20, 1 << 30))
        held_up = 50.0 if rng.random() < 0.03 else 1.0
        costs.observe_load(num_bytes, noisy(held_up * num_bytes / 50e9, rng, 0.1))
    assert costs.load_seconds(10**9) == pytest.approx(1 / 50, rel=0.3)
    for _ in range(100):
        costs.observe_load(10**8, 10**8 / 5e9)
    assert costs.load_seconds(10**9) == pytest.approx(1 / 5, rel=0.1), "a link that has become slower is noticed"
    before = costs.load_seconds(10**9)
    costs.observe_load(0, 1.0)
    costs.observe_load(10**9, 0.0)
    assert costs.load_seconds(10**9) == before, "nothing was copied, or nobody measured"


def test_the_prior_errs_on_the_slow_side() -> None:
    layout = simulated_config(FLASH, kv_bytes=80 << 30).layout(FLASH)
    machine = Machine(FLASH, layout, gpu("h200"))
    model = CostModel(FLASH, cost_prior(FLASH, "cuda"))
    for features, work in steps(19, 200):
        assert machine.step_seconds(work) < model.predict(features) < 50 * machine.step_seconds(work)


feature_sets = st.builds(
    StepFeatures,
    num_requests=st.integers(1, 300),
    num_decode_rows=st.integers(0, 300),
    num_prefill_rows=st.integers(0, 9000),
    decode_context=st.integers(0, 10**9),
    prefill_work=st.floats(0, 1e13),
)


@settings(max_examples=60, deadline=None)
@given(observed=st.lists(st.tuples(feature_sets, st.floats(1e-6, 1e4)), max_size=25), asked=feature_sets)
def test_more_work_never_costs_less(observed: list[tuple[StepFeatures, float]], asked: StepFeatures) -> None:
    """Whatever nonsense was measured: all coefficients are finite and >= 0, and predictions grow with work."""
    model = CostModel(FLASH, PRIOR)
    for features, seconds in observed:
        model.observe(features, seconds)
    assert all(np.isfinite(v) and v >= 0.0 for v in model.coefficients().values())
    now = model.predict(asked)
    assert np.isfinite(now) and now >= 0.0
    assert now <= model.predict_with_prefill(asked, 1000, 1) <= model.predict_with_prefill(asked, 1000, 2000)
    assert model.prefill_seconds(0, 1000) <= model.prefill_seconds(0, 1001) <= model.prefill_seconds(0, 50_000)


@settings(max_examples=60, deadline=None)
@given(features=feature_sets, start=st.integers(0, 10**6), most=st.integers(0, 9000), seconds=st.floats(0, 2))
def test_rows_within_is_the_most_that_fits(features: StepFeatures, start: int, most: int, seconds: float) -> None:
    model = CostModel(FLASH, PRIOR)
    rows = model.rows_within(features, start, most, seconds)
    assert 0 <= rows <= most
    if rows:
        assert model.predict_with_prefill(features, start, rows) <= seconds
    if rows < most:
        assert model.predict_with_prefill(features, start, rows + 1) > seconds


def test_impossible_measurements_are_ignored() -> None:
    model = CostModel(FLASH, PRIOR)
    before = model.coefficients()
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        model.observe(StepFeatures(num_requests=1, num_decode_rows=1), seconds)
    model.observe(StepFeatures(), 1.0)
    assert model.coefficients() == before and model.num_observations == 0
    assert model.predict(StepFeatures()) == 0.0
    assert model.prefill_seconds(5, 5) == 0.0 and model.replay_seconds(0) == 0.0


def test_a_fit_can_be_told_and_taken_up() -> None:
    model, other = CostModel(FLASH, PRIOR), CostModel(FLASH, cost_prior(FLASH, "cuda"))
    for features, _ in steps(21, 100):
        model.observe(features, linear_seconds(features))
    told = json.loads(json.dumps(model.coefficients()))
    other.set_coefficients(told)
    for features, _ in steps(22, 50):
        assert other.predict(features) == pytest.approx(model.predict(features), rel=1e-9)
    features = next(steps(23, 1))[0]
    before = other.predict(features)
    other.observe(features, before)
    assert other.predict(features) == pytest.approx(before, rel=1e-6)
    with pytest.raises(ValueError, match="expected step, request"):
        other.set_coefficients({"step": 1.0})
    with pytest.raises(ValueError, match="at least 0"):
        other.set_coefficients({**told, "mixed": -1.0})


def test_features_of_a_plan() -> None:
    rows = [
        ScheduledTokens(request_id="a", start=99, num_tokens=1, new_page_ids=(), samples=True),
        ScheduledTokens(request_id="b", start=10, num_tokens=3, new_page_ids=(), samples=False),
    ]
    features = features_of(StepPlan(step_id=1, scheduled=tuple(rows)))
    assert (features.num_requests, features.num_decode_rows, features.num_prefill_rows) == (2, 1, 3)
    assert features.decode_context == 100 and features.prefill_work == 11 + 12 + 13 and features.mixed
    twin = features.copy()
    assert twin == features and twin is not features
    assert sum(chunk_work(s, 100) for s in (0, 100, 200)) == chunk_work(0, 300)


def test_the_replay_triangle_and_the_active_parameters_are_those_of_the_fact_sheets() -> None:
    assert replay_row_equivalents(FLASH, 1 << 20) == 2794 and replay_row_equivalents(preset("pro"), 1 << 20) == 3937
    assert replay_row_equivalents(FLASH, 100) == 100 and replay_row_equivalents(FLASH, 0) == 0
    # Architecture 5.1, without head and hyper-connections.
    assert active_parameters(FLASH) == pytest.approx((13.268 - 0.5295 - 0.0339) * 1e9, rel=1e-3)
    assert active_parameters(preset("pro")) == pytest.approx((48.849 - 0.9267 - 0.0841) * 1e9, rel=1e-3)


def test_it_is_cheap() -> None:
    """Median of a prediction a few microseconds, of an observation a small part of a step."""
    model = CostModel(FLASH, PRIOR)
    learnt = list(steps(20, 200))
    observing = []
    for features, _ in learnt:
        start = time.perf_counter()
        model.observe(features, linear_seconds(features))
        observing.append(time.perf_counter() - start)
    predicting = []
    for features, _ in learnt:
        start = time.perf_counter()
        model.predict(features)
        predicting.append(time.perf_counter() - start)
    assert np.median(predicting) < 50e-6 and np.median(observing) < 1e-3
