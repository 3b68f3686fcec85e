"""A small random model behind an executor, and requests driven by plans made by hand."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from runner.long_run import LongRun, decoded, in_one_piece

from engine.config import EngineConfig, MachineFacts, ResolvedConfig, resolve
from engine.messages import SamplingParams
from engine.plan import NewRequest, ScheduledTokens, StepPlan, StepResult
from engine.runner.executor import ModelExecutor
from model.checkpoint import load_model
from model.config import ModelConfig
from model.ops.table import resolve_ops
from model.presets import preset
from model.quant import WeightFormat
from model.tools.make_checkpoint import make_checkpoint
from model.transformer import Transformer

GREEDY = SamplingParams(temperature=0.0, max_tokens=10_000)


def small_config() -> ModelConfig:
    """All layer kinds, an index that drops entries, and little arithmetic."""
    return replace(
        preset("nano"),
        vocab_size=320,
        hidden_size=64,
        num_attention_heads=4,
        head_dim=64,
        qk_rope_head_dim=16,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=16,
        index_head_dim=32,
        index_topk=16,
        moe_intermediate_size=32,
    )


def random_transformer(config: ModelConfig, *, deterministic: bool) -> Transformer:
    """Weights large enough that greedy tokens depend on the whole context."""
    model = Transformer(
        config,
        weights=WeightFormat(dense="float32", experts="float32", scale=None),
        dtype=torch.float32,
        ops=resolve_ops("cpu", deterministic=deterministic),
        device="cpu",
    )
    generator = torch.Generator().manual_seed(20)
    for record in model.checkpoint_tensors():
        noise = torch.randn(record.destination.shape, generator=generator)
        if record.name.endswith("tid2eid"):
            order = torch.rand(config.vocab_size, config.n_routed_experts, generator=generator).argsort(1)
            record.destination.copy_(order[:, : config.num_experts_per_tok])
        elif "norm" in record.name:
            record.destination.copy_(1 + 0.2 * noise)
        elif record.name.startswith(("embed", "hc_")) or ".hc_" in record.name or noise.ndim == 1:
            record.destination.copy_(0.5 * noise)
        else:
            record.destination.copy_(1.5 * noise * noise.shape[-1] ** -0.5)
    model.finish_loading()
    return model


@dataclass(eq=False)
class Sequence:
    """One request of a test."""

    request_id: str
    slot: int
    tokens: list[int]
    num_prompt: int
    sampling: SamplingParams
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def missing(self) -> int:
        return len(self.tokens) - self.computed


class Hand:
    """Makes plans by hand and keeps pages, slots and tokens the way an engine would."""

    def __init__(self, executor: ModelExecutor, page_order: list[int] | None = None) -> None:
        self.executor = executor
        self.free_pages = page_order or list(range(executor.config.num_pages))
        self.free_slots = list(range(executor.config.max_num_seqs))
        self.step_id = 0
        self._count = 0
        self._new: list[NewRequest] = []
        self._finished: list[str] = []

    def start(self, prompt: list[int], sampling: SamplingParams = GREEDY) -> Sequence:
        self._count += 1
        sequence = Sequence(f"r{self._count}", self.free_slots.pop(0), list(prompt), len(prompt), sampling)
        self._new.append(
            NewRequest(
                request_id=sequence.request_id,
                slot=sequence.slot,
                token_ids=np.array(prompt, dtype=np.int32),
                num_prompt_tokens=len(prompt),
                sampling=sampling,
            )
        )
        return sequence

    def finish(self, *sequences: Sequence) -> None:
        """Pages and slots are free at once; the next plan says so."""
        for sequence in sequences:
            self._finished.append(sequence.request_id)
            self.free_pages[:0] = sequence.pages
            self.free_slots.insert(0, sequence.slot)

    def step(self, *rows: tuple[Sequence, int]) -> StepResult:
        """One step: `n` tokens of each sequence."""
        self.step_id += 1
        scheduled = tuple(self._rows(sequence, count) for sequence, count in rows)
        named = {s.request_id for s in scheduled}
        plan = StepPlan(
            step_id=self.step_id,
            new=tuple(n for n in self._new if n.request_id in named),
            scheduled=scheduled,
            finished=tuple(self._finished),
        )
        self._new = [n for n in self._new if n.request_id not in named]
        self._finished = []
        result = self.executor.execute(plan)
        assert result.step_id == self.step_id and result.seconds >= 0
        by_id = {sequence.request_id: sequence for sequence, _ in rows}
        sampling = tuple(s.request_id for s in scheduled if s.samples and s.request_id not in result.failed)
        assert result.request_ids == sampling
        for request_id, token, logprobs in zip(result.request_ids, result.token_ids, result.logprobs, strict=True):
            by_id[request_id].tokens.append(token)
            by_id[request_id].logprobs.append(logprobs)
        return result

    def _rows(self, sequence: Sequence, count: int) -> ScheduledTokens:
        start = sequence.computed
        sequence.computed += count
        pages = tuple(self.free_pages.pop(0) for _ in range(-(-sequence.computed // 256) - len(sequence.pages)))
        sequence.pages += pages
        return ScheduledTokens(
            request_id=sequence.request_id,
            start=start,
            num_tokens=count,
            new_page_ids=pages,
            samples=sequence.computed == len(sequence.tokens),
        )

    def generate(
        self, prompt: list[int], count: int, sampling: SamplingParams = GREEDY, chunk: int = 10**6
    ) -> Sequence:
        """One request alone: its prompt in chunks, then token by token."""
        sequence = self.start(prompt, sampling)
        while len(sequence.output) < count:
            self.step((sequence, min(chunk, sequence.missing)))
        self.finish(sequence)
        return sequence


@dataclass(frozen=True)
class Lab:
    """Makes executors around one random model; deterministic ops unless asked otherwise."""

    models: dict[bool, Transformer]

    def resolved(self, **flags: Any) -> ResolvedConfig:
        merged = {"max_num_seqs": 8, "max_num_batched_tokens": 4096, "kv_cache_bytes": 6 << 20, **flags}
        config = EngineConfig(model_dir="", deterministic=True, **merged)
        facts = MachineFacts(device="cpu", has_bf16=False, free_bytes=4 << 30, num_cores=1)
        return resolve(config, self.models[True].config, facts)

    def hand(self, *, deterministic: bool = True, page_order: list[int] | None = None, **flags: Any) -> Hand:
        return Hand(ModelExecutor(self.resolved(**flags), self.models[deterministic]), page_order)

    def executor(self, resolved: ResolvedConfig) -> ModelExecutor:
        return ModelExecutor(resolved, self.models[True])

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        return np.random.default_rng(seed).integers(2, self.models[True].config.vocab_size, length).tolist()


@pytest.fixture(scope="session")
def lab() -> Lab:
    config = small_config()
    return Lab({flag: random_transformer(config, deterministic=flag) for flag in (True, False)})


@pytest.fixture(scope="session")
def short_lab() -> Lab:
    """A model of all layer kinds whose window is short, so that a replay is a triangle of some dozen rows."""
    config = replace(
        small_config(),
        hidden_size=32,
        head_dim=32,
        qk_rope_head_dim=8,
        num_hidden_layers=4,
        compress_ratios=(0, 4, 128, 4),
        num_hash_layers=1,
        sliding_window=16,
        index_n_heads=8,
    )
    return Lab({True: random_transformer(config, deterministic=True)})


@pytest.fixture
def make_hand(lab: Lab) -> Callable[..., Hand]:
    return lab.hand


@pytest.fixture(scope="session")
def nano_lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The preset `nano` as it is made and loaded for a user, in fp32."""
    directory = tmp_path_factory.mktemp("nano") / "f32"
    make_checkpoint("nano", 0, "f32", directory)
    return Lab(
        {
            flag: load_model(
                directory,
                dtype=torch.float32,
                numerics="plain",
                ops=resolve_ops("cpu", deterministic=flag),
                progress=False,
            )
            for flag in (True, False)
        }
    )


@pytest.fixture(scope="session")
def nano_fast_run(nano_lab: Lab) -> LongRun:
    return decoded(nano_lab)


@pytest.fixture(scope="session")
def nano_run(nano_lab: Lab, nano_fast_run: LongRun) -> LongRun:
    return in_one_piece(nano_lab, nano_fast_run.tokens)
