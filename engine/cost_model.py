"""How long a step takes, learnt from the steps that ran. Everything the scheduler weighs is in these seconds.

    seconds = a                            a step at all (launches, the weights that every step reads)
            + b * requests                 what each request costs, however few its rows
            + f(rows)                      piecewise linear: memory-bound, then compute-bound; experts saturate between
            + c * sum(context)             decode rows read their context
            + d * sum(rows * context)      prompt rows multiply with theirs
            + e * [mixed]                  decode and prompt rows together

All coefficients are >= 0, so more work never costs less. They are fitted by least squares on relative errors, with
exponential forgetting, as multiples of a prior: each part is measured in prior seconds, so products of 1e12 stand
beside counts of 1 in a well-conditioned matrix (kv-and-scheduling 7.3).
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from engine.plan import StepPlan
from model.config import ModelConfig

ROW_KNOTS = (4, 16, 64, 256, 1024, 4096)
"""Where the slope of f may change. The distinct experts of a step saturate over two decades of rows, projections become
compute-bound at a few hundred and experts at a few thousand, on every machine of interest within a factor of four."""
_MANY_ROWS, _FEW_ROWS = 64, 5.0
"""The prior's slope is this many times steeper below 64 rows, where most rows read experts of their own."""
_PIECE_START = np.array([0.0, *ROW_KNOTS])
_PIECE_LENGTH = np.diff([0.0, *ROW_KNOTS, math.inf])
_STEP, _REQUEST, _DECODE_CONTEXT, _PREFILL_WORK, _MIXED = range(5)
_FIRST_SLOPE = 5
COEFFICIENTS = (
    "step",
    "request",
    "decode_context",
    "prefill_work",
    "mixed",
    *(f"row_{knot}" for knot in (0, *ROW_KNOTS)),
)
_NUM_PARTS = _FIRST_SLOPE + len(ROW_KNOTS) + 1
_PRIOR_WEIGHT = 0.1
"""Of the prior, in observations; it fades like they do."""
_INERTIA = 0.3
"""Observations that hold a coefficient in place while nothing is learnt about it."""
_INERTIA_MATRIX = np.eye(_NUM_PARTS) * _INERTIA
_OUTLIER = 4.0
"""Residuals beyond this many typical ones weigh less, in proportion."""
_LEAST_SPREAD = 0.02
_SPREAD_MEMORY = 0.95


@dataclass(slots=True, kw_only=True)
class StepFeatures:
    """What a step contains, as far as its duration depends on it; the scheduler adds rows as it takes them."""

    num_requests: int = 0
    num_decode_rows: int = 0
    num_prefill_rows: int = 0
    decode_context: int = 0
    """Sum of the contexts of the decode rows, in tokens."""
    prefill_work: float = 0.0
    """Sum over the prompt rows of the context of each."""
    replays: list[tuple[int, int]] = field(default_factory=list)
    """(rows, position) of each replay: a pass of its own before the step's rows, see `CostModel.replay_rows`."""

    @property
    def num_rows(self) -> int:
        return self.num_decode_rows + self.num_prefill_rows

    @property
    def mixed(self) -> bool:
        return bool(self.num_decode_rows and self.num_prefill_rows)

    def add_decode(self, context: int, num_rows: int = 1) -> None:
        """Rows that sample (more than one when drafts are verified), the first of which sees `context` tokens."""
        self.num_requests += 1
        self.num_decode_rows += num_rows
        self.decode_context += num_rows * context

    def add_prefill(self, start: int, num_rows: int) -> None:
        """Prompt rows at positions start .. start + num_rows."""
        self.num_requests += 1
        self.num_prefill_rows += num_rows
        self.prefill_work += chunk_work(start, num_rows)

    def add_replay(self, num_rows: int, position: int) -> None:
        """A slot is rebuilt at `position`."""
        self.replays.append((num_rows, position))

    def copy(self) -> "StepFeatures":
        return StepFeatures(
            num_requests=self.num_requests,
            num_decode_rows=self.num_decode_rows,
            num_prefill_rows=self.num_prefill_rows,
            decode_context=self.decode_context,
            prefill_work=self.prefill_work,
            replays=list(self.replays),
        )


def chunk_work(start: int, num_rows: int) -> float:
    """Sum of the contexts of rows start .. start + num_rows; row p sees p + 1 tokens."""
    return num_rows * (start + (num_rows + 1) / 2)


def features_of(plan: StepPlan) -> StepFeatures:
    """The features of a whole plan; a row alone counts as a decode row."""
    features = StepFeatures()
    for rows in plan.scheduled:
        if rows.num_tokens == 1:
            features.add_decode(rows.start + 1)
        else:
            features.add_prefill(rows.start, rows.num_tokens)
    return features


@dataclass(frozen=True, slots=True, kw_only=True)
class CostPrior:
    """Seconds believed before anything is measured; all > 0. Too high is safe: the first steps are small then."""

    step_seconds: float
    request_seconds: float
    row_seconds: float
    """For one row among many."""
    context_seconds: float
    """For one decode row and one token of context."""
    work_seconds: float
    """For one prompt row and one token of context."""
    mixed_seconds: float


def cost_prior(model: ModelConfig, device: Literal["cpu", "cuda"]) -> CostPrior:
    """A prior that errs on the slow side for a machine of the kind, from the model's arithmetic."""
    flops, bandwidth, launch = (2e14, 1e12, 2e-4) if device == "cuda" else (2e10, 1e10, 4e-4)
    num_csa, num_hca = len(model.layers_of("csa")), len(model.layers_of("hca"))
    index = num_csa * 2 * model.index_n_heads * model.index_head_dim / 4
    core = num_hca * 4 * model.num_attention_heads * model.head_dim / 128
    context_bytes = (num_csa * model.index_head_dim / 4 + num_hca * model.head_dim / 128) * 4
    return CostPrior(
        step_seconds=launch * model.num_hidden_layers,
        request_seconds=launch / 4,
        row_seconds=2 * active_parameters(model) / flops,
        context_seconds=context_bytes / bandwidth + (index + core) / flops,
        work_seconds=(index + core) / flops,
        mixed_seconds=launch * model.num_hidden_layers / 2,
    )


def active_parameters(model: ModelConfig) -> int:
    """Parameters that one token multiplies with in the linear layers, head excluded (architecture 5.1)."""
    m = model
    heads = m.num_attention_heads * m.head_dim
    attention = m.hidden_size * (m.q_lora_rank + m.head_dim) + heads * (m.q_lora_rank + m.o_lora_rank)
    attention += m.o_groups * m.o_lora_rank * m.hidden_size
    experts = (m.num_experts_per_tok + m.n_shared_experts) * 3 * m.hidden_size * m.moe_intermediate_size
    index = m.q_lora_rank * m.index_n_heads * m.index_head_dim
    index += m.hidden_size * (4 * (m.head_dim + m.index_head_dim) + m.index_n_heads)
    hca = 2 * m.hidden_size * m.head_dim
    every = m.num_hidden_layers * (attention + experts + m.hidden_size * m.n_routed_experts)
    return every + len(m.layers_of("csa")) * index + len(m.layers_of("hca")) * hca


class CostModel:
    """Predicts and learns. Predictions cost about a microsecond; learning from a step some tens of them."""

    def __init__(
        self, model: ModelConfig, prior: CostPrior, *, forgetting: float = 0.995, chunk_tokens: int = 2048
    ) -> None:
        """`forgetting` weighs each earlier step against the next one. `chunk_tokens` is the step size that
        `prefill_seconds` assumes.
        """
        assert 0.0 < forgetting <= 1.0
        self.num_observations = 0
        self.spread = 0.5
        """Typical relative error of recent predictions."""
        self._model = model
        self._replay_reach = model.num_hidden_layers * (model.sliding_window - 1)
        self._most_replay_rows = replay_row_equivalents(model, self._replay_reach)
        self._forgetting = forgetting
        self._chunk_tokens = chunk_tokens
        self._prior = np.array(
            [
                prior.step_seconds,
                prior.request_seconds,
                prior.context_seconds,
                prior.work_seconds,
                prior.mixed_seconds,
                *(prior.row_seconds * (_FEW_ROWS if low < _MANY_ROWS else 1.0) for low in (0, *ROW_KNOTS)),
            ]
        )
        assert (self._prior > 0).all(), "every part of the prior is positive"
        self._multiples = np.ones(_NUM_PARTS)
        self._information = np.eye(_NUM_PARTS) * _PRIOR_WEIGHT
        self._target = np.ones(_NUM_PARTS) * _PRIOR_WEIGHT
        self._set_coefficients()

    def predict(self, features: StepFeatures) -> float:
        """Seconds of a step; 0 for one without rows."""
        seconds = self._seconds(
            features.num_requests,
            features.num_rows,
            features.decode_context,
            features.prefill_work,
            features.mixed,
        )
        return seconds + self._replays_seconds(features) if features.replays else seconds

    def predict_with_prefill(self, features: StepFeatures, start: int, num_rows: int) -> float:
        """Seconds of a step with prompt rows start .. start + num_rows of one more request."""
        seconds = self._seconds(
            features.num_requests + 1,
            features.num_rows + num_rows,
            features.decode_context,
            features.prefill_work + chunk_work(start, num_rows),
            features.num_decode_rows > 0,
        )
        return seconds + self._replays_seconds(features) if features.replays else seconds

    def rows_within(self, features: StepFeatures, start: int, most: int, seconds: float) -> int:
        """Most prompt rows from `start` on, up to `most`, with which the step is predicted to stay within `seconds`."""
        if most <= 0 or self.predict_with_prefill(features, start, most) <= seconds:
            return max(0, most)
        fits, exceeds = 0, most
        while exceeds - fits > 1:
            middle = (fits + exceeds) // 2
            if self.predict_with_prefill(features, start, middle) <= seconds:
                fits = middle
            else:
                exceeds = middle
        return fits

    def prefill_seconds(self, start: int, end: int) -> float:
        """Seconds to compute the prompt rows start .. end in steps of their own."""
        if end <= start:
            return 0.0
        whole, rest = divmod(end - start, self._chunk_tokens)
        seconds = whole * self._seconds(1, self._chunk_tokens, 0, 0.0, False)
        if rest:
            seconds += self._seconds(1, rest, 0, 0.0, False)
        return seconds + self._work * chunk_work(start, end - start)

    def replay_seconds(self, position: int) -> float:
        """Seconds to rebuild the windows and accumulators at `position` from cached entries."""
        rows = self.replay_rows(position)
        return self._seconds(1, rows, 0, rows * float(position), False) if rows else 0.0

    def replay_rows(self, position: int) -> int:
        """Rows of a replay at `position`, averaged over the layers."""
        return (
            self._most_replay_rows if position >= self._replay_reach else replay_row_equivalents(self._model, position)
        )

    def _replays_seconds(self, features: StepFeatures) -> float:
        return sum(self._seconds(1, rows, 0, rows * float(position), False) for rows, position in features.replays)

    def decode_seconds(self, context: int) -> float:
        """Seconds of a step with one decode row that sees `context` tokens."""
        return self._seconds(1, 1, context, 0.0, False)

    def coefficients(self) -> dict[str, float]:
        """The fit by name, in seconds for one of each; `row_<from>` are the slopes of f."""
        return dict(zip(COEFFICIENTS, (self._multiples * self._prior).tolist(), strict=True))

    def set_coefficients(self, coefficients: Mapping[str, float]) -> None:
        """Go on from a fit that `coefficients` told.

        Raises:
            ValueError: a name is missing or unknown, or a value is negative or not finite.
        """
        if set(coefficients) != set(COEFFICIENTS):
            raise ValueError(f"cost model: expected {', '.join(COEFFICIENTS)}; found {', '.join(sorted(coefficients))}")
        values = np.array([coefficients[name] for name in COEFFICIENTS], dtype=np.float64)
        if not (np.isfinite(values) & (values >= 0.0)).all():
            raise ValueError("cost model: expected finite coefficients of at least 0")
        self._multiples = values / self._prior
        self._target = self._information @ self._multiples
        self._set_coefficients()

    def observe(self, features: StepFeatures, seconds: float) -> None:
        """Learn from a step that took `seconds`. Steps without rows and impossible times are ignored."""
        if not features.num_rows or not math.isfinite(seconds) or seconds <= 0.0:
            return
        # In units of the step's own time every step counts the same, and one that was held up (a compilation, a page
        # fault) by a factor of a hundred pulls a hundred times less.
        parts = self._parts(features) * self._prior / seconds
        residual = abs(1.0 - float(parts @ self._multiples))
        weight = min(1.0, _OUTLIER * max(self.spread, _LEAST_SPREAD) / max(residual, 1e-12))
        self.spread = _SPREAD_MEMORY * self.spread + (1.0 - _SPREAD_MEMORY) * min(residual, 1.0)
        self._information = self._forgetting * self._information + weight * np.outer(parts, parts)
        self._target = self._forgetting * self._target + weight * parts
        self._solve()
        self._set_coefficients()
        self.num_observations += 1

    def _solve(self) -> None:
        """Least squares with all multiples >= 0, held to the last ones by `_INERTIA`.

        The inertia does not bias what is learnt: it pulls to where the fit already is. It keeps a coefficient that has
        not been seen for long from following a single step.
        """
        matrix = self._information + _INERTIA_MATRIX
        vector = self._target + _INERTIA * self._multiples
        fit: np.ndarray = np.linalg.solve(matrix, vector)
        free = np.ones(_NUM_PARTS, dtype=bool)
        while fit.min() < 0.0:
            free &= fit >= 0.0
            fit = np.zeros(_NUM_PARTS)
            fit[free] = np.linalg.solve(matrix[np.ix_(free, free)], vector[free])
        self._multiples = fit

    def _parts(self, features: StepFeatures) -> np.ndarray:
        """float64 [parts]: how much of each coefficient a step takes."""
        parts = np.zeros(_NUM_PARTS)
        parts[_STEP] = 1.0 + len(features.replays)
        parts[_REQUEST] = features.num_requests + len(features.replays)
        parts[_DECODE_CONTEXT] = features.decode_context
        parts[_PREFILL_WORK] = features.prefill_work + sum(rows * float(at) for rows, at in features.replays)
        parts[_MIXED] = features.mixed
        for num_rows in (features.num_rows, *(rows for rows, _ in features.replays)):
            parts[_FIRST_SLOPE:] += np.minimum(np.maximum(num_rows - _PIECE_START, 0.0), _PIECE_LENGTH)
        return parts

    def _set_coefficients(self) -> None:
        """Plain floats for `_seconds`, which runs far more often than the fit changes."""
        values: list[float] = (self._multiples * self._prior).tolist()
        self._step, self._request, self._context, self._work, self._mixed = values[:_FIRST_SLOPE]
        self._slopes = values[_FIRST_SLOPE:]
        self._at_knots = [0.0]
        low = 0
        for slope, high in zip(self._slopes, ROW_KNOTS, strict=False):
            self._at_knots.append(self._at_knots[-1] + slope * (high - low))
            low = high

    def _seconds(
        self, num_requests: int, num_rows: int, decode_context: float, prefill_work: float, mixed: bool
    ) -> float:
        if num_rows == 0:
            return 0.0
        piece = bisect_right(ROW_KNOTS, num_rows)
        rows = self._at_knots[piece] + self._slopes[piece] * (num_rows - (ROW_KNOTS[piece - 1] if piece else 0))
        seconds = self._step + self._request * num_requests + rows
        seconds += self._context * decode_context + self._work * prefill_work
        return seconds + self._mixed if mixed else seconds


def replay_row_equivalents(model: ModelConfig, position: int) -> int:
    """Rows of a replay at `position`, averaged over the layers: layer l computes the last (L - l)(W - 1) before it."""
    layers, reach = model.num_hidden_layers, model.sliding_window - 1
    return -(-sum(min(position, (layers - layer) * reach) for layer in range(layers)) // layers)
