"""`create_executor`: from a directory to a warm engine, with every byte counted."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import EngineConfig, EngineConfigError
from engine.messages import SamplingParams
from engine.plan import NewRequest, ScheduledTokens, StepPlan
from engine.runner import memory
from engine.runner.executor import create_executor
from model.checkpoint import CheckpointError
from model.tools.make_checkpoint import make_checkpoint


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "nano"
    make_checkpoint("nano", 0, "fp4", path)
    return path


@pytest.fixture(autouse=True)
def _keep_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def flags(model_dir: Path, **changes: Any) -> EngineConfig:
    settings = {"device": "cpu", "kv_cache_bytes": 32 << 20, "max_num_seqs": 4, "num_threads": 1, **changes}
    return EngineConfig(model_dir=str(model_dir), **settings)


def greedy_tokens(executor: Any, count: int) -> list[int]:
    prompt = np.arange(5, 205, dtype=np.int32)
    new = NewRequest(
        request_id="a",
        slot=0,
        token_ids=prompt,
        num_prompt_tokens=200,
        sampling=SamplingParams(temperature=0.0, max_tokens=50),
    )
    rows = ScheduledTokens(request_id="a", start=0, num_tokens=200, new_page_ids=(1,), samples=True)
    result = executor.execute(StepPlan(step_id=1, new=(new,), scheduled=(rows,)))
    tokens = [*result.token_ids]
    for i in range(count - 1):
        rows = ScheduledTokens(request_id="a", start=200 + i, num_tokens=1, new_page_ids=(), samples=True)
        tokens += executor.execute(StepPlan(step_id=2 + i, scheduled=(rows,))).token_ids
    return tokens


@pytest.mark.parametrize(
    ("changes", "formats"),
    [
        ({}, ("float32", "float32", "float32")),
        ({"numerics": "official"}, ("float32", "fp8", "fp4")),
        ({"dtype": "bfloat16", "kv_cache_dtype": "fp8"}, ("bfloat16", "fp8", "fp8")),
    ],
    ids=str,
)
def test_a_directory_becomes_a_warm_executor(
    model_dir: Path, changes: dict[str, Any], formats: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="engine.runner.executor"):
        executor = create_executor(flags(model_dir, **changes))
    config, layout = executor.config, executor.config.layout(executor.model)
    assert (config.dtype, config.row_format, config.index_format) == formats
    assert executor.eos_token_id == executor.model.eos_token_id < executor.model.vocab_size
    assert torch.get_num_threads() == 1 and config.num_threads == 1
    cache = executor._runner.cache
    assert cache.allocated_bytes == config.num_pages * layout.bytes_per_page + 4 * layout.bytes_per_slot
    assert (32 << 20) - layout.bytes_per_page < cache.allocated_bytes <= 32 << 20
    line = next(r.getMessage() for r in caplog.records if r.name == "engine.runner.executor")
    for number in (config.num_pages, layout.bytes_per_page, layout.bytes_per_slot, config.num_pages * 256):
        assert str(number) in line
    assert len(executor._runner.table) == 0, "the warm-up request is forgotten"
    tokens = greedy_tokens(executor, 6)
    assert len(tokens) == 6 and all(0 <= t < executor.model.vocab_size for t in tokens)
    executor.close()
    with pytest.raises(AssertionError, match="closed"):
        executor.execute(StepPlan(step_id=99))


def test_two_executors_of_one_directory_agree(model_dir: Path) -> None:
    first, second = (
        greedy_tokens(create_executor(flags(model_dir, deterministic=True)), 6),
        greedy_tokens(create_executor(flags(model_dir, deterministic=True, max_num_seqs=1)), 6),
    )
    assert first == second


def test_the_smallest_engine_starts(model_dir: Path) -> None:
    """One slot, one page, steps of one token, a context of one."""
    executor = create_executor(
        flags(model_dir, kv_cache_bytes=600_000, max_num_seqs=1, max_num_batched_tokens=1, max_model_len=1)
    )
    assert executor.config.num_pages == 1 and executor.config.max_model_len == 1


def test_flags_that_cannot_work_fail_before_the_weights_are_read(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.runner.executor.load_model", lambda *a, **k: pytest.fail("the weights were read"))
    with pytest.raises(EngineConfigError, match="kv_cache_bytes: 1000 bytes hold no page"):
        create_executor(flags(model_dir, kv_cache_bytes=1000))
    with pytest.raises(EngineConfigError, match="max_model_len: 2000000"):
        create_executor(flags(model_dir, max_model_len=2_000_000))
    monkeypatch.setattr(memory, "free_bytes", lambda *_: 1 << 20)
    with pytest.raises(EngineConfigError, match="no memory is left"):
        create_executor(flags(model_dir, kv_cache_bytes=None))


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        create_executor(flags(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(model_dir: Path) -> None:
    with pytest.raises(EngineConfigError, match="device: cuda"):
        create_executor(flags(model_dir, device="cuda"))


def test_free_memory_keeps_a_margin_and_respects_the_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_meminfo_available", lambda: 10 << 30)
    limits = {"memory.max": "max", "memory.current": str(3 << 30)}
    monkeypatch.setattr(memory, "_read_text", lambda path: limits.get(path.name))
    config = EngineConfig(model_dir="")
    assert memory.free_bytes(config, "cpu") == (10 << 30) - memory.CPU_MARGIN_BYTES
    limits["memory.max"] = str(7 << 30)
    assert memory.free_bytes(config, "cpu") == (4 << 30) - memory.CPU_MARGIN_BYTES
    limits["memory.max"] = str(2 << 30)
    assert memory.free_bytes(config, "cpu") == 0


def test_cores_respect_affinity_and_the_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.os, "sched_getaffinity", lambda _: set(range(8)))
    for text, cores in ((None, 8), ("max 100000", 8), ("250000 100000", 3), ("5000 100000", 1), ("9900000 100000", 8)):
        monkeypatch.setattr(memory, "_read_text", lambda _, text=text: text)
        assert memory.num_cores() == cores
