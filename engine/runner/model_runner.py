"""Runs step plans on the model: apply the plan's news to the table, one forward pass, one sampler call."""

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from engine.config import SAMPLER_ELEMENTS
from engine.plan import StepPlan, StepResult, TokenLogprobs
from engine.runner.inputs import StepInputs, build_inputs
from engine.runner.request_table import RequestTable
from engine.runner.sampler import Sampled, SamplingBatch, sample
from model.kv_cache import KVCache
from model.transformer import Transformer

_LATER_FIELDS = ("slot_restores", "slot_snapshots", "page_loads", "page_spills", "layer_row_starts")
"""Parts of a plan that no scheduler fills yet."""


class ModelRunner:
    """One model, its cache and its requests, on one device."""

    def __init__(self, model: Transformer, cache: KVCache, table: RequestTable, device: torch.device) -> None:
        self.model = model
        self.cache = cache
        self.table = table
        self.device = device

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run a plan. An exception may leave rows of the scheduled requests half written, and of no others.

        Raises:
            RuntimeError: the plan asks for something that this runner does not do.
        """
        started = time.perf_counter()
        for request_id in plan.finished:
            self.table.remove(request_id)
        for field in _LATER_FIELDS:
            if getattr(plan, field):
                raise RuntimeError(f"StepPlan.{field}: this runner cannot do that")
        self._apply(plan)
        if not plan.scheduled:
            return StepResult(step_id=plan.step_id, seconds=time.perf_counter() - started)
        inputs = build_inputs(plan.scheduled, self.table, self.device)
        token_ids, logprobs, failed = self._sample(self._forward(inputs), inputs)
        return StepResult(
            step_id=plan.step_id,
            request_ids=tuple(i for i in inputs.request_ids if i not in failed),
            token_ids=token_ids,
            logprobs=logprobs,
            failed=failed,
            seconds=time.perf_counter() - started,
        )

    def _apply(self, plan: StepPlan) -> None:
        for new in plan.new:
            self.table.add(new)
        if plan.new:
            self.cache.reset_slots(self._ids([new.slot for new in plan.new]))
        for rows in plan.scheduled:
            if rows.new_page_ids:
                self.table.append_pages(self.table.slot(rows.request_id), rows.new_page_ids)
        if plan.page_copies:
            self.cache.copy_pages(
                self._ids([copy.source for copy in plan.page_copies]),
                self._ids([copy.target for copy in plan.page_copies]),
            )

    def _forward(self, inputs: StepInputs) -> Tensor | None:
        """Hidden states of the rows that sample; None when no row does (then the head is not computed)."""
        if inputs.request_ids:
            hidden_LD: Tensor = self.model(inputs.batch, self.cache)
            return hidden_LD
        self.model.streams(inputs.batch, self.cache)
        return None

    def _sample(
        self, hidden_LD: Tensor | None, inputs: StepInputs
    ) -> tuple[tuple[int, ...], tuple[TokenLogprobs | None, ...], dict[str, str]]:
        """Tokens and log probabilities of the rows that have one, and the requests that failed."""
        if hidden_LD is None:
            return (), (), {}
        batch = self.table.sampling(inputs.slots_L)
        blocks = list(self._sample_blocks(hidden_LD, batch))
        token_ids_L = np.concatenate([block.token_ids_L for _, block in blocks])
        logprobs_L = [logprobs for _, block in blocks for logprobs in block.logprobs_L]
        failed_rows = {first + row: why for first, block in blocks for row, why in block.failed.items()}
        sound_L = np.array([row not in failed_rows for row in range(len(batch))])
        self.table.append_tokens(inputs.slots_L[sound_L], token_ids_L[sound_L])
        return (
            tuple(token_ids_L[sound_L].tolist()),
            tuple(logprobs_L[row] for row in np.flatnonzero(sound_L)),
            {inputs.request_ids[row]: why for row, why in failed_rows.items()},
        )

    def _sample_blocks(self, hidden_LD: Tensor, batch: SamplingBatch) -> Iterator[tuple[int, Sampled]]:
        """(first row, its block), so that logits never take more than a fixed workspace."""
        size = max(1, SAMPLER_ELEMENTS // self.model.config.vocab_size)
        for first in range(0, len(batch), size):
            logits_LV = self.model.logits(hidden_LD[first : first + size])
            yield first, sample(logits_LV, batch.rows(first, first + size), self.table.counts)

    def _ids(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.device)
