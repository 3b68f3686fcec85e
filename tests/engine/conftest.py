"""Small engines of books only: configurations, requests and a core around the simulated executor.

Helpers beside the tests of a folder are a package of its name: `symbolic`, `runner`.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import ResolvedConfig, SchedulingConfig
from engine.messages import AddRequest, SamplingParams, pack_ids
from engine.request import Request
from engine.scheduler import Scheduler
from model.presets import preset

_HERE = str(Path(__file__).resolve().parent)
if _HERE not in sys.path:
    sys.path.append(_HERE)

BASE = ResolvedConfig(
    model_dir="",
    device="cpu",
    dtype="float32",
    numerics="plain",
    row_format="float32",
    index_format="float32",
    deterministic=True,
    max_model_len=4096,
    max_num_seqs=8,
    max_num_batched_tokens=512,
    num_pages=64,
    num_threads=1,
    # Rows bound a step, not seconds; tests of time set their own.
    scheduling=SchedulingConfig(step_seconds=1e6, interactive_itl_seconds=1e6, long_itl_seconds=1e6),
)


@pytest.fixture
def make_config() -> Callable[..., ResolvedConfig]:
    return lambda **changes: replace(BASE, **changes)


@pytest.fixture
def make_message() -> Callable[..., AddRequest]:
    """message(id, prompt length or ids, **fields of the request and of its sampling)."""

    def make(request_id: str, prompt: int | list[int] = 8, **fields: Any) -> AddRequest:
        own = {
            k: fields.pop(k)
            for k in ("priority", "deadline", "arrival_time", "tenant", "snapshot_positions")
            if k in fields
        }
        fields.setdefault("seed", 7)
        if isinstance(prompt, int):
            prompt = np.random.default_rng(prompt).integers(2, 2048, prompt).tolist()
        return AddRequest(
            request_id=request_id, prompt_token_ids=pack_ids(prompt), sampling=SamplingParams(**fields), **own
        )

    return make


@pytest.fixture
def make_scheduler() -> Callable[..., Scheduler]:
    def make(**changes: Any) -> Scheduler:
        config = replace(BASE, **changes)
        return Scheduler(config, config.layout(preset("nano")), eos_token_id=1)

    return make


@pytest.fixture
def make_request(make_message: Callable[..., AddRequest]) -> Callable[..., Request]:
    order = iter(range(1, 1_000_000))

    def make(request_id: str, prompt: int | list[int] = 8, **fields: Any) -> Request:
        return Request(make_message(request_id, prompt, **fields), vocab_size=2048, order=next(order), seed=0)

    return make
