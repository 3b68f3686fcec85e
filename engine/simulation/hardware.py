"""The machine of a simulation: seconds of a step by roofline arithmetic, the sum of each component at its own bound.

This is what a simulated device "does"; the scheduler never reads it and learns its own cost model from the durations.
`FittedMachine` stands in for a real machine with the coefficients that were learnt there.
Formulas: architecture 5 (FLOPs and bytes) and performance 4 (roofline of Flash on one H200, which a test reproduces).

    linear layers    max(2 * parameters * rows / rate, bytes / bandwidth); weights are read once for each step
    routed experts   E (1 - (1 - k/E)^rows) distinct experts are read, FP4 with BF16 arithmetic
    attention        4 * heads * head_dim * entries * rows; entries: window, top-k of context/4, or context/128
    index            2 * heads * dim * context/4 * rows at the FP8 rate; the scores are written and read by the top-k
    streams          hyper-connections read and write their streams at both sites: bandwidth
"""

from dataclasses import dataclass, field, replace

from engine.config import EngineConfig, MachineFacts, ResolvedConfig, resolve
from engine.cost_model import CostModel, StepFeatures
from engine.plan import StepPlan
from model.config import ModelConfig
from model.kv_layout import KVLayout

_FP4_BYTES = 0.53125
_SCORE_BYTES = 8
_STREAM_BYTES = 8 * 4
_ENOUGH_BYTES = 1 << 50
_ENOUGH_CORES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Attainable rates of a card (a copy, a large product; not those of its data sheet)."""

    name: str
    bf16_flops: float
    fp8_flops: float
    bandwidth: float
    """Bytes per second of device memory."""
    link_bandwidth: float = 50e9
    """Bytes per second between device and host, each way."""
    efficiency: float = 0.75
    """Share of the arithmetic rates that a model's kernels reach; 1: the roofline itself. At 0.75 an H200 computes a
    cold prompt of 1M tokens of Flash in about 100 s: 880 TFLOP/s effective, the rate of kv-and-scheduling 7.3."""
    step_seconds: float = 1e-3
    """Of every step: plan, inputs, sampler, results."""
    launch_seconds: float = 35e-6
    """Of every layer of a step with prompt rows; steps of decode rows alone run as captured graphs."""


GPUS = {
    "h100": Gpu(name="h100", bf16_flops=790e12, fp8_flops=1500e12, bandwidth=3.0e12),
    "h200": Gpu(name="h200", bf16_flops=790e12, fp8_flops=1500e12, bandwidth=4.3e12),
    "b200": Gpu(name="b200", bf16_flops=1750e12, fp8_flops=3400e12, bandwidth=7.2e12),
}


def gpu(name: str, *, efficiency: float | None = None) -> Gpu:
    """A card by name; `efficiency` replaces the usual share of its arithmetic rates.

    Raises:
        ValueError: the name is not in `GPUS`, or the efficiency is not above 0.
    """
    if name not in GPUS:
        raise ValueError(f"unknown gpu {name!r}; known are {', '.join(GPUS)}")
    if efficiency is None:
        return GPUS[name]
    if efficiency <= 0.0:
        raise ValueError(f"efficiency: expected more than 0, found {efficiency}")
    return replace(GPUS[name], efficiency=efficiency)


def simulated_config(
    model: ModelConfig,
    *,
    kv_bytes: int,
    host_bytes: int = 0,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 8192,
) -> ResolvedConfig:
    """The engine configuration of a card with `kv_bytes` for pages and slots and `host_bytes` beside it for snapshots
    and spilled pages: FP8 rows, nothing is allocated.

    Raises:
        EngineConfigError: `kv_bytes` hold no page beside the slots.
    """
    config = EngineConfig(
        model_dir="",
        device="cuda",
        kv_cache_dtype="fp8",
        kv_cache_bytes=kv_bytes,
        host_cache_bytes=host_bytes,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    facts = MachineFacts(
        device="cuda", has_bf16=True, free_bytes=_ENOUGH_BYTES, num_cores=_ENOUGH_CORES, host_free_bytes=_ENOUGH_BYTES
    )
    return resolve(config, model, facts)


@dataclass(slots=True, kw_only=True)
class StepWork:
    """What a device does in one step."""

    decode_contexts: list[int] = field(default_factory=list)
    """Tokens that each decode row sees."""
    chunks: list[tuple[int, int]] = field(default_factory=list)
    """(start, rows) of each prompt chunk."""
    replays: list[int] = field(default_factory=list)
    """Positions at which slots are rebuilt."""
    num_sampled: int = 0
    bytes_in: int = 0
    """Host to device, before the rows run."""
    bytes_out: int = 0
    """Device to host, beside the rows."""
    bytes_copied: int = 0
    """Within the device."""


class Machine:
    """One card that runs one model."""

    def __init__(self, model: ModelConfig, layout: KVLayout, card: Gpu) -> None:
        m = model
        self.model = model
        self.layout = layout
        self.card = card
        self._bf16_flops, self._fp8_flops = card.bf16_flops * card.efficiency, card.fp8_flops * card.efficiency
        self._bandwidth = card.bandwidth
        self._num_layers = m.num_hidden_layers
        self._num_csa, self._num_hca = len(m.layers_of("csa")), len(m.layers_of("hca"))
        heads = m.num_attention_heads * m.head_dim
        self._projections = m.hidden_size * (m.q_lora_rank + m.head_dim) + heads * (m.q_lora_rank + m.o_lora_rank)
        self._projections += m.o_groups * m.o_lora_rank * m.hidden_size
        self._expert = 3 * m.hidden_size * m.moe_intermediate_size
        self._gate = m.hidden_size * m.n_routed_experts
        self._streams = 2 * (2 * m.hc_mult + m.hc_mult**2) * m.hc_mult * m.hidden_size
        self._hca_compressor = 2 * m.hidden_size * m.head_dim
        self._csa_compressor = 2 * self._hca_compressor
        self._index_queries = m.q_lora_rank * m.index_n_heads * m.index_head_dim
        self._index_others = m.hidden_size * (4 * m.index_head_dim + m.index_n_heads)
        self._head = m.vocab_size * m.hidden_size
        self._row_bytes, self._index_bytes = layout.bytes_per_row, layout.bytes_per_index_row
        self._page_bytes, self._snapshot_bytes = layout.bytes_per_page, layout.bytes_per_snapshot
        # Beyond this context a decode row's cost is a straight line.
        self._linear_from = max(m.sliding_window, 4 * m.index_topk)
        self._decode_base = self.attention_seconds(self._linear_from, 1)
        self._decode_slope = self.attention_seconds(self._linear_from + 1, 1) - self._decode_base

    def work_of(self, plan: StepPlan) -> StepWork:
        """The work of a plan."""
        work = StepWork()
        for rows in plan.scheduled:
            if rows.num_tokens == 1:
                work.decode_contexts.append(rows.start + 1)
            else:
                work.chunks.append((rows.start, rows.num_tokens))
            work.num_sampled += rows.samples
        work.replays = [replay.position for replay in plan.replays]
        work.bytes_in = len(plan.page_loads) * self._page_bytes + len(plan.slot_restores) * self._snapshot_bytes
        work.bytes_out = len(plan.page_spills) * self._page_bytes + len(plan.slot_snapshots) * self._snapshot_bytes
        work.bytes_copied = 2 * len(plan.page_copies) * self._page_bytes
        return work

    def step_seconds(self, work: StepWork) -> float:
        """Seconds of a step. Loads come before its rows; spills and snapshots run beside them."""
        seconds = self._beside_copies(work)
        return seconds + self.load_seconds(work) + self._save_seconds(work, seconds)

    def load_seconds(self, work: StepWork) -> float:
        """What the rows wait for copies from the host."""
        return work.bytes_in / self.card.link_bandwidth

    def save_seconds(self, work: StepWork) -> float:
        """What copies to the host take longer than the rows."""
        return self._save_seconds(work, self._beside_copies(work)) if work.bytes_out else 0.0

    def _save_seconds(self, work: StepWork, seconds: float) -> float:
        return max(0.0, work.bytes_out / self.card.link_bandwidth - seconds)

    def _beside_copies(self, work: StepWork) -> float:
        seconds = work.bytes_copied / self._bandwidth
        if work.decode_contexts or work.chunks:
            seconds += self.rows_seconds(work)
        return seconds + sum(self.replay_seconds(position) for position in work.replays)

    def rows_seconds(self, work: StepWork) -> float:
        """Seconds of a step's rows, without what is moved."""
        num_rows = len(work.decode_contexts) + sum(rows for _, rows in work.chunks)
        seconds = self.card.step_seconds + self.dense_seconds(num_rows, work.num_sampled)
        seconds += sum(self.decode_attention_seconds(context) for context in work.decode_contexts)
        seconds += sum(self.attention_seconds(start + (rows + 1) / 2, rows) for start, rows in work.chunks)
        return seconds + self.card.launch_seconds * self._num_layers if work.chunks else seconds

    def dense_seconds(self, num_rows: int, num_sampled: int) -> float:
        """All that does not depend on context: every linear layer, the experts and the streams."""
        m, n = self.model, num_rows
        layer = self._fp8(self._projections, n) + self._fp8(self._expert * m.n_shared_experts, n)
        layer += self._bf16(self._gate, n) + self._experts(n)
        layer += (4 * self._streams + _STREAM_BYTES * m.hidden_size * n) / self._bandwidth
        csa = (
            self._bf16(self._csa_compressor, n) + self._fp8(self._index_queries, n) + self._bf16(self._index_others, n)
        )
        seconds = self._num_layers * layer + self._num_csa * csa + self._num_hca * self._bf16(self._hca_compressor, n)
        return seconds + (self._bf16(self._head, num_sampled) if num_sampled else 0.0)

    def attention_seconds(self, context: float, num_rows: int) -> float:
        """Attention and index of `num_rows` rows of one request that see `context` tokens on average, all layers."""
        m, n = self.model, num_rows
        window = min(context, m.sliding_window)
        seconds = (self._num_layers - self._num_csa - self._num_hca) * self._core(window, n, n)
        keys = context / 4
        seconds += self._num_csa * self._core(window + min(m.index_topk, keys), n, n)
        index = 2 * m.index_n_heads * m.index_head_dim * keys * n / self._fp8_flops
        index = max(index, keys * self._index_bytes / self._bandwidth)
        seconds += self._num_csa * (index + n * keys * _SCORE_BYTES / self._bandwidth)
        return seconds + self._num_hca * self._core(window + context / 128, n, 1)

    def decode_attention_seconds(self, context: int) -> float:
        """`attention_seconds` of one row."""
        if context < self._linear_from:
            return self.attention_seconds(context, 1)
        return self._decode_base + self._decode_slope * (context - self._linear_from)

    def prefill_seconds(self, start: int, end: int, chunk_tokens: int = 8192) -> float:
        """Seconds for the prompt rows start .. end of one request on an idle machine, its first token included."""
        seconds = 0.0
        while start < end:
            rows = min(chunk_tokens, end - start)
            seconds += self.step_seconds(StepWork(chunks=[(start, rows)], num_sampled=int(start + rows == end)))
            start += rows
        return seconds

    def replay_seconds(self, position: int) -> float:
        """Seconds to rebuild the windows at `position`: layer l computes the (L - l)(W - 1) rows before it."""
        reach = self.model.sliding_window - 1
        rows = sum(min(position, (self._num_layers - layer) * reach) for layer in range(self._num_layers))
        mean = -(-rows // self._num_layers)
        return self.rows_seconds(StepWork(chunks=[(position - mean, mean)])) if mean else 0.0

    def _fp8(self, parameters: int, num_rows: int) -> float:
        return max(2 * parameters * num_rows / self._fp8_flops, parameters / self._bandwidth)

    def _bf16(self, parameters: int, num_rows: int) -> float:
        return max(2 * parameters * num_rows / self._bf16_flops, 2 * parameters / self._bandwidth)

    def _experts(self, num_rows: int) -> float:
        m = self.model
        total, active = m.n_routed_experts, m.num_experts_per_tok
        distinct = total * (1.0 - (1.0 - active / total) ** num_rows)
        flops = 2 * active * self._expert * num_rows
        return max(flops / self._bf16_flops, distinct * self._expert * _FP4_BYTES / self._bandwidth)

    def _core(self, entries: float, num_rows: int, num_reads: int) -> float:
        """Attention of one layer; `num_reads` times the entries are read."""
        flops = 4 * self.model.num_attention_heads * self.model.head_dim * entries * num_rows
        return max(flops / self._bf16_flops, num_reads * entries * self._row_bytes / self._bandwidth)


class FittedMachine(Machine):
    """A machine whose rows take what a cost model says that was fitted on a real one; `card` gives the link."""

    def __init__(self, model: ModelConfig, layout: KVLayout, card: Gpu, cost: CostModel) -> None:
        super().__init__(model, layout, card)
        self._cost = cost

    def rows_seconds(self, work: StepWork) -> float:
        features = StepFeatures()
        for context in work.decode_contexts:
            features.add_decode(context)
        for start, rows in work.chunks:
            features.add_prefill(start, rows)
        return self._cost.predict(features)
