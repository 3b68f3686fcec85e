"""`resolve`: the table of formats, sizes from the budget, and what it refuses."""

from dataclasses import replace
from typing import Any

import pytest

from engine.config import (
    CPU_HOST_MOST_BYTES,
    CPU_KV_MOST_BYTES,
    CUDA_HOST_MOST_BYTES,
    EngineConfig,
    EngineConfigError,
    MachineFacts,
    host_places,
    resolve,
    resolve_formats,
    workspace_bytes,
)
from model.presets import preset

GIB = 1 << 30
CPU = MachineFacts(device="cpu", has_bf16=True, free_bytes=12 * GIB, num_cores=4)
GPU = MachineFacts(device="cuda", has_bf16=True, free_bytes=100 * GIB, num_cores=16)


def flags(**changes: Any) -> EngineConfig:
    return EngineConfig(model_dir="/models/x", **changes)


@pytest.mark.parametrize(
    ("dtype", "numerics", "kv", "rows", "index"),
    [
        ("bfloat16", "plain", "auto", "bfloat16", "bfloat16"),
        ("bfloat16", "plain", "bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "plain", "fp8", "fp8", "fp8"),
        ("bfloat16", "official", "auto", "fp8", "fp4"),
        ("bfloat16", "official", "bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "official", "fp8", "fp8", "fp4"),
        ("float32", "plain", "auto", "float32", "float32"),
        ("float32", "plain", "float32", "float32", "float32"),
        ("float32", "plain", "bfloat16", "bfloat16", "bfloat16"),
        ("float32", "plain", "fp8", "fp8", "fp8"),
        ("float32", "official", "auto", "fp8", "fp4"),
        ("float32", "official", "float32", "float32", "float32"),
        ("float32", "official", "bfloat16", "bfloat16", "bfloat16"),
        ("float32", "official", "fp8", "fp8", "fp4"),
    ],
)
def test_format_table(dtype: Any, numerics: Any, kv: Any, rows: str, index: str) -> None:
    resolved = resolve(flags(dtype=dtype, numerics=numerics, kv_cache_dtype=kv), preset("flash"), GPU)
    assert (resolved.dtype, resolved.row_format, resolved.index_format) == (dtype, rows, index)
    assert resolved.numerics == numerics


@pytest.mark.parametrize("numerics", ["plain", "official"])
def test_float32_rows_of_a_bfloat16_model_are_refused(numerics: Any) -> None:
    config = flags(dtype="bfloat16", numerics=numerics, kv_cache_dtype="float32")
    with pytest.raises(EngineConfigError, match=r"kv_cache_dtype: float32 .* use kv_cache_dtype auto"):
        resolve(config, preset("flash"), GPU)


@pytest.mark.parametrize(
    ("model", "device", "has_bf16", "dtype"),
    [
        ("flash", "cuda", True, "bfloat16"),
        ("nano", "cuda", True, "bfloat16"),
        ("mini", "cpu", True, "bfloat16"),
        ("mini", "cpu", False, "float32"),
        ("nano", "cpu", True, "float32"),
    ],
)
def test_dtype_auto(model: str, device: Any, has_bf16: bool, dtype: str) -> None:
    assert resolve_formats(flags(), preset(model), device=device, has_bf16=has_bf16).dtype == dtype


@pytest.mark.parametrize("model", ["nano", "mini", "flash", "pro"])
@pytest.mark.parametrize("facts", [CPU, GPU], ids=["cpu", "gpu"])
def test_defaults_fill_the_budget_and_no_more(model: str, facts: MachineFacts) -> None:
    shape = preset(model)
    if facts is CPU and model == "pro":
        facts = replace(CPU, free_bytes=64 * GIB)
    resolved = resolve(flags(), shape, facts)
    layout = resolved.layout(shape)
    slots, pages = resolved.max_num_seqs * layout.bytes_per_slot, resolved.num_pages * layout.bytes_per_page
    workspace = workspace_bytes(
        shape,
        dtype=resolved.dtype,
        max_num_seqs=resolved.max_num_seqs,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        max_model_len=resolved.max_model_len,
    )
    assert slots + pages + workspace <= facts.free_bytes
    assert 1 <= resolved.max_num_seqs <= 256 and slots <= (slots + pages) // 4 + layout.bytes_per_page
    assert resolved.max_model_len == min(1048576, resolved.num_pages * 256)
    assert resolved.max_num_batched_tokens == (8192 if facts.device == "cuda" else 1024)
    assert resolved.num_threads == facts.num_cores and resolved.device == facts.device
    if facts.device == "cpu":
        assert CPU_KV_MOST_BYTES // 2 < slots + pages <= CPU_KV_MOST_BYTES or model == "flash"
    else:
        assert slots + pages + layout.bytes_per_page > facts.free_bytes - workspace - GIB


def test_explicit_values_are_kept() -> None:
    shape = preset("nano")
    config = flags(
        max_model_len=5000,
        max_num_seqs=7,
        max_num_batched_tokens=300,
        kv_cache_bytes=64 << 20,
        num_threads=3,
        deterministic=True,
        dtype="bfloat16",
    )
    resolved = resolve(config, shape, CPU)
    layout = resolved.layout(shape)
    assert (resolved.max_model_len, resolved.max_num_seqs, resolved.max_num_batched_tokens) == (5000, 7, 300)
    assert resolved.num_threads == 3 and resolved.deterministic and resolved.model_dir == "/models/x"
    assert resolved.num_pages == ((64 << 20) - 7 * layout.bytes_per_slot) // layout.bytes_per_page


def test_equal_inputs_give_equal_results() -> None:
    assert resolve(flags(), preset("flash"), GPU) == resolve(flags(), preset("flash"), GPU)


def test_a_small_step_lowers_the_automatic_number_of_requests() -> None:
    assert resolve(flags(max_num_batched_tokens=16), preset("nano"), CPU).max_num_seqs == 16


def test_model_len_that_fits_exactly() -> None:
    shape = preset("nano")
    layout = resolve(flags(), shape, CPU).layout(shape)
    budget = 2 * layout.bytes_per_slot + 4 * layout.bytes_per_page
    resolved = resolve(flags(kv_cache_bytes=budget, max_num_seqs=2, max_model_len=1024), shape, CPU)
    assert resolved.num_pages == 4 and resolved.max_model_len == 1024
    with pytest.raises(EngineConfigError, match=r"max_model_len: 1025 tokens .* holds 1024; .* 1024 or less"):
        resolve(flags(kv_cache_bytes=budget, max_num_seqs=2, max_model_len=1025), shape, CPU)


@pytest.mark.parametrize(
    ("changes", "facts", "message"),
    [
        ({"max_model_len": 2_000_000}, CPU, r"max_model_len: 2000000 is more than the model's 1048576"),
        ({"max_num_seqs": 65, "max_num_batched_tokens": 64}, CPU, r"max_num_seqs: 65 .* max_num_batched_tokens 64"),
        (
            {"kv_cache_bytes": 1000},
            CPU,
            r"kv_cache_bytes: 1000 bytes hold no page .* one page takes \d+ .* at least \d+",
        ),
        ({"kv_cache_bytes": 50 * GIB}, CPU, r"kv_cache_bytes: 53687091200 bytes do not fit: .* at most \d+ fit"),
        ({}, replace(CPU, free_bytes=1 << 20), r"no memory is left for the KV cache: 1048576 bytes are free"),
        ({}, replace(CPU, free_bytes=-5), r"no memory is left for the KV cache"),
        ({"device": "cuda"}, CPU, r"device: cuda was asked for, but this machine offers cpu"),
        ({"num_threads": 5}, CPU, r"num_threads: 5 is more than the 4 cores"),
        ({"gpu_memory_utilization": 1.5}, GPU, r"gpu_memory_utilization: .* found 1.5"),
        ({"gpu_memory_utilization": 0.0}, GPU, r"gpu_memory_utilization: .* found 0.0"),
        *[
            ({field: 0}, CPU, rf"{field}: expected at least 1, found 0")
            for field in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_bytes", "num_threads")
        ],
    ],
)
def test_refusals_name_the_flag_and_the_numbers(changes: dict[str, Any], facts: MachineFacts, message: str) -> None:
    with pytest.raises(EngineConfigError, match=message):
        resolve(flags(**changes), preset("nano"), facts)


def host_bytes(resolved: Any, shape: Any) -> int:
    layout = resolved.layout(shape)
    return resolved.num_host_pages * layout.bytes_per_page + resolved.num_snapshots * layout.bytes_per_snapshot


@pytest.mark.parametrize(
    ("facts", "most"),
    [
        (CPU, 5 * GIB // 4),
        (replace(CPU, free_bytes=100 * GIB), CPU_HOST_MOST_BYTES),
        (replace(GPU, host_free_bytes=40 * GIB), 10 * GIB),
        (replace(GPU, host_free_bytes=1000 * GIB), CUDA_HOST_MOST_BYTES),
        (GPU, 0),
    ],
)
def test_default_of_host_memory(facts: MachineFacts, most: int) -> None:
    """An eighth of what a CPU engine leaves, a quarter of a GPU's host; both bounded."""
    shape = preset("nano")
    resolved = resolve(flags(kv_cache_bytes=2 * GIB, max_num_seqs=8), shape, facts)
    assert most - most // 4 < host_bytes(resolved, shape) + 1 <= most + 1
    assert (resolved.num_snapshots > 0) == (most > 0)
    if facts.device == "cpu":
        assert host_bytes(resolved, shape) <= (facts.free_bytes - 2 * GIB) // 8


def test_host_memory_as_asked_for() -> None:
    shape = preset("flash")
    facts = replace(GPU, host_free_bytes=64 * GIB)
    resolved = resolve(flags(host_cache_bytes=64 * GIB, kv_cache_dtype="fp8"), shape, facts)
    layout = resolved.layout(shape)
    assert 64 * GIB - layout.bytes_per_page < host_bytes(resolved, shape) <= 64 * GIB
    assert resolved.num_snapshots == 16 * GIB // layout.bytes_per_snapshot
    none = resolve(flags(host_cache_bytes=0), shape, facts)
    assert (none.num_host_pages, none.num_snapshots) == (0, 0)
    with pytest.raises(EngineConfigError, match=r"host_cache_bytes: 68719476737 bytes do not fit: 68719476736 bytes"):
        resolve(flags(host_cache_bytes=64 * GIB + 1), shape, facts)
    with pytest.raises(EngineConfigError, match=r"host_cache_bytes: expected at least 0, found -1"):
        resolve(flags(host_cache_bytes=-1), shape, facts)


def test_host_memory_of_a_cpu_engine_comes_from_the_same_memory() -> None:
    config = flags(kv_cache_bytes=4 * GIB, host_cache_bytes=8 * GIB, max_num_seqs=4)
    with pytest.raises(EngineConfigError, match=r"host_cache_bytes: 8589934592 bytes do not fit: \d+ bytes"):
        resolve(config, preset("nano"), CPU)
    assert resolve(replace(config, host_cache_bytes=7 * GIB), preset("nano"), CPU).num_host_pages > 0


def test_host_places_at_the_edges() -> None:
    layout = resolve(flags(), preset("nano"), CPU).layout(preset("nano"))
    snapshot, page = layout.bytes_per_snapshot, layout.bytes_per_page
    assert host_places(0, layout) == (0, 0)
    assert host_places(snapshot - 1, layout) == ((snapshot - 1) // page, 0)
    assert host_places(snapshot, layout) == (0, 1)
    assert host_places(snapshot + page, layout) == (1, 1)
    assert host_places(8 * snapshot, layout) == (6 * snapshot // page, 2)
