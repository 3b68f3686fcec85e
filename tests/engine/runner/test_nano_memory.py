"""Bytes on `nano`, measured: pools have the bytes of the sizing function, and no step takes more than the workspace.

Measured is torch's CPU allocator: every tensor, temporaries inside operators included. Pools and host places are
numpy's and are counted by themselves. What Python and the libraries' own threads take is in neither.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from engine.config import workspace_bytes
from engine.messages import SamplingParams
from engine.plan import NewRequest, ScheduledTokens, SlotRestore, SlotSnapshot, StepPlan
from engine.runner.executor import ModelExecutor
from model.kv_layout import PAGE_TOKENS

ROWS = 256
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, seed=1, logprobs=5)


class Far:
    """An executor whose requests begin anywhere: the slot is restored, and pages nobody has written are zeros."""

    def __init__(self, lab: Any, *, deterministic: bool = False, num_tokens: int) -> None:
        self.config = replace(
            lab.resolved(max_num_batched_tokens=ROWS),
            num_pages=-(-num_tokens // PAGE_TOKENS),
            max_model_len=num_tokens,
            num_snapshots=2,
        )
        self.executor = ModelExecutor(self.config, lab.models[deterministic])
        self.workspace = workspace_bytes(
            self.executor.model,
            dtype=self.config.dtype,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=ROWS,
        )
        self.step_id = 0

    def step(self, start: int, rows: int) -> None:
        """`rows` tokens behind `start` others, the last of which samples; the slot is kept."""
        runner = self.executor._runner
        assert runner is not None
        self.step_id += 1
        name, num_tokens = f"far{self.step_id}", start + rows
        ids = np.random.default_rng(start).integers(2, 300, num_tokens).astype(np.int32)
        runner.snapshots._positions[0] = start
        plan = StepPlan(
            step_id=self.step_id,
            new=(
                NewRequest(
                    request_id=name,
                    slot=0,
                    token_ids=ids,
                    num_prompt_tokens=num_tokens,
                    sampling=GREEDY,
                    num_computed_tokens=start,
                ),
            ),
            scheduled=(
                ScheduledTokens(
                    request_id=name,
                    start=start,
                    num_tokens=rows,
                    new_page_ids=tuple(range(-(-num_tokens // PAGE_TOKENS))),
                    samples=True,
                ),
            ),
            slot_restores=(SlotRestore(0, 0, start),) if start else (),
            slot_snapshots=(SlotSnapshot(0, num_tokens, 1),),
        )
        assert len(self.executor.execute(plan).token_ids) == 1
        self.executor.execute(StepPlan(step_id=self.step_id, finished=(name,)))
