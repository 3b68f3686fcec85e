"""Engine configuration: what the user may say, and the one pure function that settles every "auto"."""

from dataclasses import dataclass
from typing import Literal

from model.config import ModelConfig
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
    dtype: DType = "auto"
    numerics: Numerics = "plain"
    kv_cache_dtype: KVCacheDType = "auto"
    deterministic: bool = False
    """Fixed-shape, fixed-order arithmetic: a request's tokens do not depend on its neighbours or on chunking."""
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    """Requests that run at once: the number of slots."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step."""
    kv_cache_bytes: int | None = None
    """Budget for pages and slots; None: a share of the memory that is free when the weights are loaded."""
    gpu_memory_utilization: float = 0.9
    num_threads: int | None = None
    """CPU threads of the engine; None: all cores but none more than there are."""
    simulate: bool = False
    """Run without a model (deterministic tokens and a cost model); for tests of everything around the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """What `resolve` may know about the machine; measured by the runner so that `resolve` stays pure."""

    device: Literal["cpu", "cuda"]
    has_bf16: bool
    """Fast bfloat16 arithmetic."""
    free_bytes: int
    """Memory free for pages and slots after the weights are loaded."""
    num_cores: int


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

    def layout(self, model: ModelConfig) -> KVLayout:
        return KVLayout(config=model, row_format=self.row_format, index_format=self.index_format)
