"""Engine configuration: what the user may say, and the one pure function that settles every "auto"."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from model.config import CSA_RATIO, ModelConfig
from model.kv_layout import IndexFormat, KVLayout, RowFormat

DType = Literal["auto", "bfloat16", "float32"]
Numerics = Literal["plain", "official"]
KVCacheDType = Literal["auto", "float32", "bfloat16", "fp8"]
Device = Literal["auto", "cpu", "cuda"]


class EngineConfigError(ValueError):
    """Flags that contradict each other or the machine: says which, what was expected and what would work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Flags of `fathom serve` that the engine reads. None and "auto" are settled by `resolve`."""

    model_dir: str
    device: Device = "auto"
    """Where the model runs; auto takes a GPU when there is one."""
    dtype: DType = "auto"
    """Arithmetic of activations; auto is bfloat16 where that is fast and the model is not tiny, else float32."""
    numerics: Numerics = "plain"
    """official: the reference's rounding of activations, KV rows and index keys to FP8 and FP4."""
    kv_cache_dtype: KVCacheDType = "auto"
    """Storage of KV rows; auto is that of the arithmetic, and fp8 in official numerics."""
    deterministic: bool = False
    """Fixed-shape, fixed-order arithmetic: a request's tokens do not depend on its neighbours or on chunking."""
    max_model_len: int | None = None
    """Most tokens of prompt and answer together; None: what the model and the memory allow."""
    max_num_seqs: int | None = None
    """Requests that run at once: the number of slots."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step."""
    kv_cache_bytes: int | None = None
    """Budget for pages and slots; None: a share of the memory that is free when the weights are loaded."""
    host_cache_bytes: int | None = None
    """Budget in host memory for snapshots and spilled pages; 0: none; None: a share of the memory that is left."""
    enable_prefix_cache: bool = True
    """Keep computed prefixes for requests that begin with them; without it a request computes all of its tokens."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that weights, pages, slots and workspace may take together."""
    num_threads: int | None = None
    """CPU threads of the engine; None: all cores but none more than there are."""
    step_seconds: float | None = None
    """How long a step takes at most, as the engine predicts it: the gap between two tokens of a running answer. None:
    0.06 on a GPU, 0.2 on a CPU."""
    interactive_ttft_seconds: float = 1.0
    """Time to first token that prompts under `long_prompt_tokens` should have, beside three times their own work."""
    long_ttft_seconds: float = 10.0
    """The same for longer prompts."""
    interactive_itl_seconds: float | None = None
    """Longest gap between two tokens while short requests decode, used when prompts would come late; None: 1.25 times
    `step_seconds`."""
    long_itl_seconds: float | None = None
    """The same while only long requests decode."""
    long_prompt_tokens: int = 262_144
    """Prompts of at least this many tokens are long: they run behind the others, with shares of their own."""
    long_prefill_share: float = 0.25
    """Least share of the prompt time of the steps that one long prompt gets while shorter ones compete."""
    long_page_share: float = 0.7
    """Most of the pages that long requests may hold while shorter ones wait."""
    output_quantile: float = 0.9
    """A request starts when there are pages for its prompt and for an answer that this share of such answers does not
    exceed; when answers grow beyond that, requests are set aside. 1: for the longest answer that it allows."""
    simulate: bool = False
    """Run without a model (deterministic tokens and a cost model); for tests of everything around the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """What `resolve` may know about the machine; measured by the runner so that `resolve` stays pure."""

    device: Literal["cpu", "cuda"]
    has_bf16: bool
    """Fast bfloat16 arithmetic."""
    free_bytes: int
    """Memory that the engine may still take once the weights are loaded."""
    num_cores: int
    """Cores this process may use."""
    host_free_bytes: int = 0
    """CUDA: free memory of the host. A CPU engine has `free_bytes` alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingConfig:
    """Goals and shares of the scheduler, all settled."""

    step_seconds: float = 0.06
    interactive_ttft_seconds: float = 1.0
    long_ttft_seconds: float = 10.0
    interactive_itl_seconds: float = 0.075
    long_itl_seconds: float = 0.075
    long_prompt_tokens: int = 262_144
    long_prefill_share: float = 0.25
    long_page_share: float = 0.7
    output_quantile: float = 0.9
    """Share of answers whose pages are reserved in whole; 1: all that a request may ever have, no overbooking."""
    unknown_output_tokens: int = 4096
    """What is reserved for an answer while nothing is known of such answers."""
    woken_output_tokens: int = 1024
    """Tokens of its answer that a request must find room for when it comes back from a preemption, and at least as many
    as it has had: each time it gets twice as far, so it is preempted a few times at most."""

    def ttft_seconds(self, service: int) -> float:
        """Goal of a service class: 0 interactive, 1 long."""
        return self.long_ttft_seconds if service else self.interactive_ttft_seconds

    def itl_seconds(self, service: int) -> float:
        return self.long_itl_seconds if service else self.interactive_itl_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """Every choice made; printable, and the same for every rank."""

    model_dir: str
    device: Literal["cpu", "cuda"]
    dtype: Literal["bfloat16", "float32"]
    numerics: Numerics
    row_format: RowFormat
    index_format: IndexFormat
    deterministic: bool
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_pages: int
    num_threads: int
    num_host_pages: int = 0
    """Pages of host memory that pages are spilled to."""
    num_snapshots: int = 0
    """Packed slots in host memory."""
    enable_prefix_cache: bool = True
    scheduling: SchedulingConfig = SchedulingConfig()

    def layout(self, model: ModelConfig) -> KVLayout:
        return KVLayout(config=model, row_format=self.row_format, index_format=self.index_format)


class Formats(NamedTuple):
    """What numbers are made of; settled before the weights are loaded."""

    dtype: Literal["bfloat16", "float32"]
    row_format: RowFormat
    index_format: IndexFormat


SMALL_HIDDEN_SIZE = 512
"""Below this width a CPU step is dispatch, not arithmetic: bfloat16 gains nothing there and float32 is exact."""
GPU_BATCHED_TOKENS = 8192
CPU_BATCHED_TOKENS = 1024
GPU_STEP_SECONDS = 0.06
CPU_STEP_SECONDS = 0.2
ITL_FACTOR = 1.25
"""Without ITL goals a step may take this many times `step_seconds` while prompts are pressed for time."""
MOST_SEQS = 256
CPU_KV_SHARE = 4
"""Without `kv_cache_bytes` a CPU engine takes one part in this many of the free memory,"""
CPU_KV_MOST_BYTES = 4 << 30
"""and no more than this: a machine's memory is shared, a card's is not."""
CPU_HOST_SHARE = 8
"""Without `host_cache_bytes` a CPU engine takes one part in this many of what the KV cache leaves,"""
CPU_HOST_MOST_BYTES = 2 << 30
"""and no more than this."""
CUDA_HOST_SHARE = 4
"""Without `host_cache_bytes` a CUDA engine pins one part in this many of the host's free memory,"""
CUDA_HOST_MOST_BYTES = 64 << 30
"""and no more than this: pinning takes its time."""
SNAPSHOT_SHARE = 4
"""Snapshots take one part in this many of the host budget, spilled pages the rest."""
SLOT_SHARE = 4
"""Without `max_num_seqs` slots take at most one part in this many of the budget."""
SAMPLER_ELEMENTS = 1 << 25
"""Most elements of one block of logits; longer batches are sampled block by block."""
_SAMPLER_COPIES = 4
_SECONDS = (
    "step_seconds",
    "interactive_ttft_seconds",
    "long_ttft_seconds",
    "interactive_itl_seconds",
    "long_itl_seconds",
)
_ACTIVATION_COPIES = 24
_BLOCK_BYTES = 16 << 20
"""Blocks of fixed size: index scores and their best, keys and values of a tile of queries."""
_ENTRY_BYTES = 32
"""Of one CSA entry of the longest request, in the lists of entries that a step makes for its layers."""


def resolve_formats(
    config: EngineConfig, model: ModelConfig, *, device: Literal["cpu", "cuda"], has_bf16: bool
) -> Formats:
    """Settle dtype and storage formats.

        dtype auto      CUDA: bfloat16. CPU: bfloat16 where it is fast and the model is at least 512 wide, else float32
        rows            kv_cache_dtype; auto is the dtype in plain numerics and fp8 in official numerics
        index keys      fp8 rows: fp8 in plain numerics, fp4 in official ones; float rows: the same float format

    Raises:
        EngineConfigError: float32 rows of a bfloat16 model.
    """
    dtype: Literal["bfloat16", "float32"]
    if config.dtype != "auto":
        dtype = config.dtype
    elif device == "cuda" or (has_bf16 and model.hidden_size >= SMALL_HIDDEN_SIZE):
        dtype = "bfloat16"
    else:
        dtype = "float32"
    row_format: RowFormat
    if config.kv_cache_dtype != "auto":
        row_format = config.kv_cache_dtype
    else:
        row_format = "fp8" if config.numerics == "official" else dtype
    if dtype == "bfloat16" and row_format == "float32":
        raise EngineConfigError(
            "kv_cache_dtype: float32 holds no more than bfloat16 when dtype is bfloat16; "
            "use kv_cache_dtype auto, bfloat16 or fp8, or dtype float32"
        )
    fp8_index: IndexFormat = "fp4" if config.numerics == "official" else "fp8"
    index_format: IndexFormat = fp8_index if row_format == "fp8" else row_format
    return Formats(dtype, row_format, index_format)


def workspace_bytes(
    model: ModelConfig,
    *,
    dtype: Literal["bfloat16", "float32"],
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
) -> int:
    """Memory one step may need beside weights, pages and slots: logits of one block of rows, counts of the penalties,
    the activations of the widest layer, and what it takes to find entries. An estimate from above for the logits, an
    empirical one for the rest.
    """
    # Every row of a step may want logits: those of prompt tokens whose log probabilities were asked for do.
    rows = max(max_num_seqs, max_num_batched_tokens)
    logits = min(rows * model.vocab_size, max(SAMPLER_ELEMENTS, model.vocab_size)) * 4 * _SAMPLER_COPIES
    counts = max_num_seqs * model.vocab_size * 4
    widest = max(
        model.hc_mult * model.hidden_size,
        model.num_attention_heads * model.head_dim,
        model.num_experts_per_tok * 2 * model.moe_intermediate_size,
    )
    element = 2 if dtype == "bfloat16" else 4
    activations = max_num_batched_tokens * widest * element * _ACTIVATION_COPIES
    return logits + counts + activations + _BLOCK_BYTES + max_model_len // CSA_RATIO * _ENTRY_BYTES


def resolve(config: EngineConfig, model: ModelConfig, facts: MachineFacts) -> ResolvedConfig:
    """Settle every "auto" from the flags, the model and the machine; a pure function.

    Raises:
        EngineConfigError: flags that contradict each other, the model or the machine.
    """
    _check_ranges(config, facts)
    formats = resolve_formats(config, model, device=facts.device, has_bf16=facts.has_bf16)
    layout = KVLayout(config=model, row_format=formats.row_format, index_format=formats.index_format)
    batched_tokens = config.max_num_batched_tokens or (
        GPU_BATCHED_TOKENS if facts.device == "cuda" else CPU_BATCHED_TOKENS
    )
    most_seqs = config.max_num_seqs or min(MOST_SEQS, batched_tokens)
    workspace = workspace_bytes(
        model,
        dtype=formats.dtype,
        max_num_seqs=most_seqs,
        max_num_batched_tokens=batched_tokens,
        max_model_len=config.max_model_len or model.max_position_embeddings,
    )
    budget = _kv_budget(config, facts, workspace)
    num_seqs = config.max_num_seqs or max(1, min(most_seqs, budget // SLOT_SHARE // layout.bytes_per_slot))
    if num_seqs > batched_tokens:
        raise EngineConfigError(
            f"max_num_seqs: {num_seqs} requests do not fit a step of max_num_batched_tokens {batched_tokens}; "
            f"every running request takes one token of a step"
        )
    host_pages, snapshots = host_places(_host_budget(config, facts, workspace + budget), layout)
    num_pages = (budget - num_seqs * layout.bytes_per_slot) // layout.bytes_per_page
    if num_pages < 1:
        least = num_seqs * layout.bytes_per_slot + layout.bytes_per_page
        raise EngineConfigError(
            f"kv_cache_bytes: {budget} bytes hold no page beside {num_seqs} slots: one page takes "
            f"{layout.bytes_per_page} bytes, one slot {layout.bytes_per_slot}; at least {least} bytes are needed "
            f"({layout.bytes_per_page + layout.bytes_per_slot} with max_num_seqs 1)"
        )
    return ResolvedConfig(
        model_dir=config.model_dir,
        device=facts.device,
        dtype=formats.dtype,
        numerics=config.numerics,
        row_format=formats.row_format,
        index_format=formats.index_format,
        deterministic=config.deterministic,
        max_model_len=_max_model_len(config, model, num_pages * layout.page_tokens),
        max_num_seqs=num_seqs,
        max_num_batched_tokens=batched_tokens,
        num_pages=num_pages,
        num_threads=config.num_threads or facts.num_cores,
        num_host_pages=host_pages,
        num_snapshots=snapshots,
        enable_prefix_cache=config.enable_prefix_cache,
        scheduling=_scheduling(config, facts),
    )


def _scheduling(config: EngineConfig, facts: MachineFacts) -> SchedulingConfig:
    step_seconds = config.step_seconds or (GPU_STEP_SECONDS if facts.device == "cuda" else CPU_STEP_SECONDS)
    return SchedulingConfig(
        step_seconds=step_seconds,
        interactive_ttft_seconds=config.interactive_ttft_seconds,
        long_ttft_seconds=config.long_ttft_seconds,
        interactive_itl_seconds=config.interactive_itl_seconds or ITL_FACTOR * step_seconds,
        long_itl_seconds=config.long_itl_seconds or ITL_FACTOR * step_seconds,
        long_prompt_tokens=config.long_prompt_tokens,
        long_prefill_share=config.long_prefill_share,
        long_page_share=config.long_page_share,
        output_quantile=config.output_quantile,
    )


def host_places(host_bytes: int, layout: KVLayout) -> tuple[int, int]:
    """(host pages, snapshots) that a host budget holds.

    A snapshot saves a replay, some 3,000 tokens of work for the bytes of 900 tokens of history, but nothing without
    that history: a quarter of the budget keeps about three snapshots for each 10,000 tokens spilled. At least one
    snapshot where one fits, for a request hibernates only with its slot.
    """
    snapshots = host_bytes // SNAPSHOT_SHARE // layout.bytes_per_snapshot
    if snapshots == 0 and host_bytes >= layout.bytes_per_snapshot:
        snapshots = 1
    return (host_bytes - snapshots * layout.bytes_per_snapshot) // layout.bytes_per_page, snapshots


def _check_ranges(config: EngineConfig, facts: MachineFacts) -> None:
    if config.device not in ("auto", facts.device):
        raise EngineConfigError(f"device: {config.device} was asked for, but this machine offers {facts.device}")
    for field in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_bytes", "num_threads"):
        value: int | None = getattr(config, field)
        if value is not None and value < 1:
            raise EngineConfigError(f"{field}: expected at least 1, found {value}")
    if config.host_cache_bytes is not None and config.host_cache_bytes < 0:
        raise EngineConfigError(f"host_cache_bytes: expected at least 0, found {config.host_cache_bytes}")
    if not 0.0 < config.gpu_memory_utilization <= 1.0:
        raise EngineConfigError(
            f"gpu_memory_utilization: expected more than 0 and at most 1, found {config.gpu_memory_utilization}"
        )
    for field in _SECONDS:
        seconds: float | None = getattr(config, field)
        if seconds is not None and not 0.0 < seconds < float("inf"):
            raise EngineConfigError(f"{field}: expected more than 0 seconds, found {seconds}")
    if config.long_prompt_tokens < 1:
        raise EngineConfigError(f"long_prompt_tokens: expected at least 1, found {config.long_prompt_tokens}")
    if not 0.0 <= config.long_prefill_share < 1.0:
        raise EngineConfigError(
            f"long_prefill_share: expected at least 0 and less than 1, found {config.long_prefill_share}"
        )
    if not 0.0 < config.long_page_share <= 1.0:
        raise EngineConfigError(f"long_page_share: expected more than 0 and at most 1, found {config.long_page_share}")
    if not 0.0 < config.output_quantile <= 1.0:
        raise EngineConfigError(f"output_quantile: expected more than 0 and at most 1, found {config.output_quantile}")
    if config.num_threads is not None and config.num_threads > facts.num_cores:
        raise EngineConfigError(f"num_threads: {config.num_threads} is more than the {facts.num_cores} cores there are")


def _kv_budget(config: EngineConfig, facts: MachineFacts, workspace: int) -> int:
    """Bytes for pages and slots."""
    left = facts.free_bytes - workspace
    if config.kv_cache_bytes is not None:
        if config.kv_cache_bytes > left:
            raise EngineConfigError(
                f"kv_cache_bytes: {config.kv_cache_bytes} bytes do not fit: {facts.free_bytes} bytes are free and a "
                f"step needs {workspace} of them; at most {max(0, left)} fit"
            )
        return config.kv_cache_bytes
    if left <= 0:
        raise EngineConfigError(
            f"no memory is left for the KV cache: {facts.free_bytes} bytes are free and a step needs {workspace}; "
            f"lower max_num_batched_tokens or max_num_seqs"
        )
    return left if facts.device == "cuda" else min(left // CPU_KV_SHARE, CPU_KV_MOST_BYTES)


def _host_budget(config: EngineConfig, facts: MachineFacts, taken: int) -> int:
    """Bytes for snapshots and spilled pages; `taken` is what the device's memory gives to the rest."""
    on_cpu = facts.device == "cpu"
    left = max(0, facts.free_bytes - taken if on_cpu else facts.host_free_bytes)
    if config.host_cache_bytes is not None:
        if config.host_cache_bytes > left:
            raise EngineConfigError(
                f"host_cache_bytes: {config.host_cache_bytes} bytes do not fit: {left} bytes of host memory are left"
            )
        return config.host_cache_bytes
    if on_cpu:
        return min(left // CPU_HOST_SHARE, CPU_HOST_MOST_BYTES)
    return min(left // CUDA_HOST_SHARE, CUDA_HOST_MOST_BYTES)


def _max_model_len(config: EngineConfig, model: ModelConfig, kv_tokens: int) -> int:
    if config.max_model_len is None:
        return min(model.max_position_embeddings, kv_tokens)
    if config.max_model_len > model.max_position_embeddings:
        raise EngineConfigError(
            f"max_model_len: {config.max_model_len} is more than the model's {model.max_position_embeddings} positions"
        )
    if config.max_model_len > kv_tokens:
        raise EngineConfigError(
            f"max_model_len: {config.max_model_len} tokens do not fit the KV cache, which holds {kv_tokens}; "
            f"raise kv_cache_bytes, lower max_num_seqs, or use max_model_len {kv_tokens} or less"
        )
    return config.max_model_len
