"""Runs step plans on the model: news to the table, copies, replays, one forward pass, one sampler call, snapshots."""

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.config import SAMPLER_ELEMENTS
from engine.grammar.masks import TokenMasks
from engine.plan import PromptLogprobs, StepPlan, StepResult, TokenLogprobs
from engine.runner.copy_clock import CopyClock
from engine.runner.host_store import HostPages, SnapshotArena
from engine.runner.inputs import StepInputs, build_inputs, rows_of
from engine.runner.prompt_logprobs import prompt_logprobs
from engine.runner.request_table import RequestTable
from engine.runner.sampler import Sampled, SamplingBatch, sample
from model.kv_cache import KVCache
from model.kv_layout import replay_rows
from model.transformer import Transformer


class ModelRunner:
    """One model, its cache and its requests, on one device."""

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        table: RequestTable,
        host_pages: HostPages,
        snapshots: SnapshotArena,
        *,
        replay_tokens: int,
    ) -> None:
        """`replay_tokens`: most rows of a replay that are computed at once."""
        self.model = model
        self.cache = cache
        self.table = table
        self.host_pages = host_pages
        self.snapshots = snapshots
        self.device = cache.device
        self._replay_tokens = replay_tokens

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run a plan, in the order that `StepPlan` states. An exception may leave pages and slots of the plan's own
        requests half written, and of no others."""
        started = time.perf_counter()
        clock = CopyClock(self.device)
        for request_id in plan.finished:
            self.table.remove(request_id)
        self._learn(plan)
        self._move(plan, clock)
        kept = {(slot, position): snapshot for slot, position, snapshot in plan.slot_snapshots}
        for request_id, slot, position in plan.replays:
            assert self.table.slot(request_id) == slot, f"{request_id} is not in slot {slot}"
            self._replay(slot, position)
            if (slot, position) in kept:
                with clock.timing("save"):
                    self.snapshots.save(slot, position, kept.pop((slot, position)))
        result = self._compute(plan)
        for (slot, position), snapshot in kept.items():
            assert self.table.num_computed_S[slot] == position, (
                f"slot {slot} stands at {self.table.num_computed_S[slot]}, not at {position}"
            )
            with clock.timing("save"):
                self.snapshots.save(slot, position, snapshot)
        copying = clock.read()
        return replace(
            result,
            seconds=time.perf_counter() - started,
            load_seconds=copying["load"],
            save_seconds=copying["save"],
        )

    def _learn(self, plan: StepPlan) -> None:
        """New requests and new pages."""
        for new in plan.new:
            self.table.add(new)
        for rows in plan.scheduled:
            if rows.new_page_ids:
                self.table.append_pages(self.table.slot(rows.request_id), rows.new_page_ids)

    def _move(self, plan: StepPlan, clock: CopyClock) -> None:
        """Everything that is copied before the first row is computed."""
        if plan.page_spills:
            with clock.timing("save"):
                for page, host_page in plan.page_spills:
                    self.host_pages.spill(page, host_page)
        if plan.page_loads:
            with clock.timing("load"):
                for host_page, page in plan.page_loads:
                    self.host_pages.load(host_page, page)
        if plan.page_copies:
            self.cache.copy_pages(
                self._ids([copy.source for copy in plan.page_copies]),
                self._ids([copy.target for copy in plan.page_copies]),
            )
        cold = [new.slot for new in plan.new if new.num_computed_tokens == 0]
        if cold:
            self.cache.reset_slots(self._ids(cold))
        for slot, snapshot, position in plan.slot_restores:
            with clock.timing("load"):
                self.snapshots.restore(slot, snapshot, position)
            self.table.num_computed_S[slot] = position

    def _replay(self, slot: int, position: int) -> None:
        self.cache.reset_slots(self._ids([slot]))
        first = position - replay_rows(self.model.config, position)
        for start in range(first, position, self._replay_tokens):
            stop = min(start + self._replay_tokens, position)
            self.model.replay(rows_of(self.table, slot, start, stop, self.device), self.cache, position)
        self.table.num_computed_S[slot] = position

    def _compute(self, plan: StepPlan) -> StepResult:
        if not plan.scheduled:
            return StepResult(step_id=plan.step_id)
        inputs = build_inputs(plan.scheduled, self.table, self.device)
        for rows in plan.scheduled:
            slot = self.table.slot(rows.request_id)
            assert self.table.num_computed_S[slot] == rows.start, (
                f"{rows.request_id}: row {rows.start}, but its slot stands at {self.table.num_computed_S[slot]}"
            )
            self.table.num_computed_S[slot] += rows.num_tokens
        hidden_LD = self._forward(inputs)
        if hidden_LD is None:
            return StepResult(step_id=plan.step_id)
        num_sampling = len(inputs.request_ids)
        scores: dict[str, PromptLogprobs] = {}
        unsound: dict[str, str] = {}
        if inputs.prompt_rows:
            scores, unsound = prompt_logprobs(
                hidden_LD[num_sampling:], inputs.prompt_rows, self.model.logits, tile_rows=self._block_rows
            )
        token_ids, logprobs, failed = self._sample(hidden_LD[:num_sampling], inputs, plan.masks)
        sampled = [i for i in inputs.request_ids if i not in failed]
        sound = [n for n, request_id in enumerate(sampled) if request_id not in unsound]
        return StepResult(
            step_id=plan.step_id,
            request_ids=tuple(sampled[n] for n in sound),
            token_ids=tuple(token_ids[n] for n in sound),
            logprobs=tuple(logprobs[n] for n in sound),
            prompt_logprobs=scores,
            failed=unsound | failed,
        )

    @property
    def _block_rows(self) -> int:
        """Rows of logits that are computed at once, so that they never take more than a fixed workspace."""
        return max(1, SAMPLER_ELEMENTS // self.model.config.vocab_size)

    def _forward(self, inputs: StepInputs) -> Tensor | None:
        """Hidden states of the rows whose logits are wanted; None without any (then the head is not computed)."""
        if len(inputs.batch.logits_index_L):
            hidden_LD: Tensor = self.model(inputs.batch, self.cache)
            return hidden_LD
        self.model.streams(inputs.batch, self.cache)
        return None

    def _sample(
        self, hidden_LD: Tensor, inputs: StepInputs, masks: TokenMasks | None
    ) -> tuple[tuple[int, ...], tuple[TokenLogprobs | None, ...], dict[str, str]]:
        """Tokens and log probabilities of the rows that have one, and the requests that failed."""
        if not len(hidden_LD):
            return (), (), {}
        batch = self.table.sampling(inputs.slots_L)
        unmasked: dict[int, str] = {}
        if masks is not None:
            batch, unmasked = self._masked(batch, inputs, masks)
        blocks = list(self._sample_blocks(hidden_LD, batch))
        token_ids_L = np.concatenate([block.token_ids_L for _, block in blocks])
        logprobs_L = [logprobs for _, block in blocks for logprobs in block.logprobs_L]
        failed_rows = {first + row: why for first, block in blocks for row, why in block.failed.items()} | unmasked
        sound_L = np.array([row not in failed_rows for row in range(len(batch))])
        self.table.append_tokens(inputs.slots_L[sound_L], token_ids_L[sound_L])
        return (
            tuple(token_ids_L[sound_L].tolist()),
            tuple(logprobs_L[row] for row in np.flatnonzero(sound_L)),
            {inputs.request_ids[row]: why for row, why in failed_rows.items()},
        )

    def _sample_blocks(self, hidden_LD: Tensor, batch: SamplingBatch) -> Iterator[tuple[int, Sampled]]:
        """(first row, its block)."""
        size = self._block_rows
        for first in range(0, len(batch), size):
            logits_LV = self.model.logits(hidden_LD[first : first + size])
            yield first, sample(logits_LV, batch.rows(first, first + size), self.table.counts)

    def _masked(
        self, batch: SamplingBatch, inputs: StepInputs, masks: TokenMasks
    ) -> tuple[SamplingBatch, dict[int, str]]:
        """The batch with its masks, which may still have to be waited for, and the rows whose grammar failed."""
        mask_NW, failed = masks.wait()
        places = {request_id: row for row, request_id in enumerate(inputs.request_ids)}
        rows_N = np.array([places[request_id] for request_id in masks.request_ids], dtype=np.int64)
        order_N = np.argsort(rows_N)
        vocab_size, end = self.model.config.vocab_size, self.model.config.eos_token_id
        masked = batch.masked(rows_N[order_N], mask_NW[order_N], vocab_size=vocab_size, end=end)
        return masked, {int(rows_N[n]): f"no mask ({why})" for n, why in failed.items()}

    def _ids(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.device)
