"""The executor that computes: makes a model runner from flags, counts every byte before it takes it, runs plans."""

import logging
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from engine.config import EngineConfig, ResolvedConfig, resolve, resolve_formats, workspace_bytes
from engine.executor import Executor, StepError
from engine.messages import SamplingParams
from engine.plan import NewRequest, ScheduledTokens, StepPlan, StepResult
from engine.runner import memory
from engine.runner.host_store import HostPages, SnapshotArena
from engine.runner.model_runner import ModelRunner
from engine.runner.penalties import PenaltyCounts
from engine.runner.request_table import RequestTable
from model.checkpoint import inspect_checkpoint, load_model
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.ops.table import resolve_ops
from model.transformer import Transformer

logger = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_WARM_UP_TOKENS = 160
"""More than a window and an HCA group, so that every path of the model runs once."""


def create_executor(config: EngineConfig) -> Executor:
    """Load the model of `config.model_dir`, size and allocate the KV cache, and run one step.

    Raises:
        EngineConfigError: flags that contradict each other, the model or the machine; before the weights are read
            where it can be known.
        CheckpointError, ConfigError: the model directory is not a model that Fathom can run.
    """
    began = time.monotonic()
    model_dir = Path(config.model_dir)
    device = memory.pick_device(config)
    stored = inspect_checkpoint(model_dir)
    facts = memory.measure(config, device)
    # Free memory only shrinks from here, so what fails now would fail after minutes of loading.
    resolve(config, stored.config, replace(facts, free_bytes=facts.free_bytes - stored.total_bytes))
    formats = resolve_formats(config, stored.config, device=device, has_bf16=facts.has_bf16)
    torch.set_num_threads(config.num_threads or facts.num_cores)
    transformer = load_model(
        model_dir,
        dtype=_DTYPES[formats.dtype],
        numerics=config.numerics,
        device=device,
        ops=resolve_ops(device, deterministic=config.deterministic),
    )
    resolved = resolve(config, stored.config, memory.measure(config, device))
    executor = ModelExecutor(resolved, transformer)
    executor.warm_up()
    logger.info("ready in %.1f s; %s", time.monotonic() - began, executor.describe_memory())
    return executor


class ModelExecutor:
    """Implements `engine.executor.Executor`."""

    def __init__(self, config: ResolvedConfig, transformer: Transformer) -> None:
        """Allocates pages, slots, their places in host memory and the penalties' counts for a loaded model."""
        self.config = config
        self.model: ModelConfig = transformer.config
        self.eos_token_id = self.model.eos_token_id
        device = torch.device(config.device)
        layout = config.layout(self.model)
        cache = KVCache(
            layout,
            num_pages=config.num_pages,
            num_slots=config.max_num_seqs,
            device=device,
            dtype=_DTYPES[config.dtype],
        )
        table = RequestTable(
            num_slots=config.max_num_seqs,
            max_pages=layout.pages_for(config.max_model_len),
            eos_token_id=self.eos_token_id,
            counts=PenaltyCounts(config.max_num_seqs, self.model.vocab_size, device),
        )
        self._runner: ModelRunner | None = ModelRunner(
            transformer,
            cache,
            table,
            HostPages(cache, config.num_host_pages),
            SnapshotArena(cache, config.num_snapshots),
            replay_tokens=config.max_num_batched_tokens,
        )

    def execute(self, plan: StepPlan) -> StepResult:
        """See `Executor.execute`. Running out of memory costs the step's requests, not the engine."""
        assert self._runner is not None, "the executor is closed"
        try:
            return self._runner.execute(plan)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if self.config.device == "cuda":
                torch.cuda.empty_cache()
            raise StepError(f"out of memory in a step of {plan.num_tokens} tokens") from error

    def warm_up(self) -> None:
        """One prompt and one decoded token through the real path."""
        config = self.config
        longest = min(config.max_model_len - 1, config.max_num_batched_tokens)
        length = max(1, longest if config.device == "cuda" else min(longest, _WARM_UP_TOKENS))
        prompt = NewRequest(
            request_id="warm-up",
            slot=0,
            token_ids=np.full(length, self.model.bos_token_id, dtype=np.int32),
            num_prompt_tokens=length,
            sampling=SamplingParams(seed=0, max_tokens=2, ignore_eos=True),
        )
        pages = tuple(range(config.layout(self.model).pages_for(min(length + 1, config.max_model_len))))
        rows = ScheduledTokens(request_id="warm-up", start=0, num_tokens=length, new_page_ids=pages, samples=True)
        first = self.execute(StepPlan(step_id=0, new=(prompt,), scheduled=(rows,)))
        if first.failed:
            raise RuntimeError(f"the first step of this model failed: {first.failed['warm-up']}")
        if length < config.max_model_len:
            rows = ScheduledTokens(request_id="warm-up", start=length, num_tokens=1, new_page_ids=(), samples=True)
            self.execute(StepPlan(step_id=0, scheduled=(rows,)))
        self.execute(StepPlan(step_id=0, finished=("warm-up",)))

    def describe_memory(self) -> str:
        """Every byte the engine holds or has planned for, in one line."""
        assert self._runner is not None, "the executor is closed"
        config, layout = self.config, self.config.layout(self.model)
        runner = self._runner
        transformer, counts = runner.model, runner.table.counts
        weights = sum(t.nbytes for t in (*transformer.parameters(), *transformer.buffers()))
        workspace = workspace_bytes(
            self.model,
            dtype=config.dtype,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
        )
        return (
            f"{config.device} {config.dtype}, rows {config.row_format}, index keys {config.index_format}: "
            f"weights {weights} bytes; {config.num_pages} pages x {layout.bytes_per_page} = "
            f"{config.num_pages * layout.bytes_per_page} bytes ({config.num_pages * layout.page_tokens} tokens); "
            f"{config.max_num_seqs} slots x {layout.bytes_per_slot} = "
            f"{config.max_num_seqs * layout.bytes_per_slot} bytes; workspace {workspace} bytes "
            f"({counts.allocated_bytes} of them for penalties); host: {config.num_snapshots} snapshots x "
            f"{layout.bytes_per_snapshot} = {runner.snapshots.allocated_bytes} bytes, {config.num_host_pages} pages = "
            f"{runner.host_pages.allocated_bytes} bytes, staged through "
            f"{runner.snapshots.staging_bytes + runner.host_pages.staging_bytes} bytes of the device"
        )

    def close(self) -> None:
        self._runner = None
        if self.config.device == "cuda":
            torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    """torch has no type of its own for a CPU allocation that fails."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
