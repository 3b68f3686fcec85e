"""StepPlan -> ForwardBatch: vectorised on the host, one transfer to the device.

Letters: T tokens of the step, B requests, P pages of the longest request, L rows that sample.
"""

from dataclasses import dataclass

import numpy as np
import torch

from engine.plan import ScheduledTokens
from engine.runner.request_table import RequestTable
from model.batch import ForwardBatch
from model.kv_layout import PAGE_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRows:
    """Rows of one request whose next token stands in its prompt, and whose log probability is wanted."""

    request_id: str
    first: int
    """Position of the first of these tokens."""
    token_ids_R: np.ndarray
    """int32: the tokens."""
    num_top: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    batch: ForwardBatch
    """Its logits rows are those that sample, then those of `prompt_rows`."""
    request_ids: tuple[str, ...]
    """Requests that sample, in plan order, and"""
    slots_L: np.ndarray
    """their slots, int64."""
    prompt_rows: tuple[PromptRows, ...] = ()


def build_inputs(scheduled: tuple[ScheduledTokens, ...], table: RequestTable, device: torch.device) -> StepInputs:
    """The batch of a plan with at least one row; the table already knows the plan's requests and pages."""
    slots_B = np.array([table.slot(s.request_id) for s in scheduled], dtype=np.int64)
    starts_B = np.array([s.start for s in scheduled], dtype=np.int64)
    lens_B = np.array([s.num_tokens for s in scheduled], dtype=np.int64)
    samples_B = np.array([s.samples for s in scheduled], dtype=bool)
    _check(scheduled, table, slots_B, starts_B + lens_B, samples_B)
    wanted_B = np.minimum(starts_B + lens_B, table.num_prompt_tokens(slots_B) - 1) - starts_B
    wanted_B = np.where(table.num_prompt_logprobs_S[slots_B] >= 0, wanted_B.clip(min=0), 0)
    batch = _batch(table, slots_B, starts_B, lens_B, samples_B, wanted_B, device)
    return StepInputs(
        batch=batch,
        request_ids=tuple(s.request_id for s in scheduled if s.samples),
        slots_L=slots_B[samples_B],
        prompt_rows=tuple(
            PromptRows(
                request_id=scheduled[i].request_id,
                first=int(starts_B[i]) + 1,
                token_ids_R=table.token_ids(slots_B[i], starts_B[i] + 1, starts_B[i] + wanted_B[i] + 1),
                num_top=int(table.num_prompt_logprobs_S[slots_B[i]]),
            )
            for i in np.flatnonzero(wanted_B).tolist()
        ),
    )


def rows_of(table: RequestTable, slot: int, start: int, stop: int, device: torch.device) -> ForwardBatch:
    """Tokens start .. stop of one request, none of which samples."""
    slots_B, starts_B, lens_B = (np.array([n], dtype=np.int64) for n in (slot, start, stop - start))
    return _batch(table, slots_B, starts_B, lens_B, np.array([False]), np.array([0]), device)


def _batch(
    table: RequestTable,
    slots_B: np.ndarray,
    starts_B: np.ndarray,
    lens_B: np.ndarray,
    samples_B: np.ndarray,
    wanted_B: np.ndarray,
    device: torch.device,
) -> ForwardBatch:
    """`wanted_B`: first rows of each request whose logits are wanted besides those that sample."""
    num_requests, ends_B = len(slots_B), starts_B + lens_B
    pages_B = -(-ends_B // PAGE_TOKENS)
    assert (pages_B <= table.num_pages_S[slots_B]).all(), "rows outside their request's pages"
    num_pages = int(pages_B.max())
    query_start_B1 = np.concatenate([[0], np.cumsum(lens_B)])
    request_index_T = np.repeat(np.arange(num_requests), lens_B)
    positions_T = np.arange(query_start_B1[-1]) + (starts_B - query_start_B1[:-1])[request_index_T]
    rows = zip(slots_B.tolist(), starts_B.tolist(), ends_B.tolist(), strict=True)
    token_ids_T = np.concatenate([table.token_ids(*row) for row in rows])
    fields = (
        token_ids_T,
        positions_T,
        request_index_T,
        query_start_B1,
        ends_B,
        table.page_ids_SP[slots_B, :num_pages].reshape(-1),
        slots_B,
        np.concatenate([query_start_B1[1:][samples_B] - 1, *_first_rows(query_start_B1, wanted_B)]),
    )
    tokens, positions, request_index, query_start, seq_lens, page_table, slots, logits_index = _transfer(fields, device)
    return ForwardBatch(
        token_ids_T=tokens,
        positions_T=positions,
        request_index_T=request_index,
        query_start_B1=query_start,
        seq_lens_B=seq_lens,
        page_table_BP=page_table.view(num_requests, num_pages),
        slot_B=slots,
        logits_index_L=logits_index,
        query_lens=tuple(lens_B.tolist()),
        start_positions=tuple(starts_B.tolist()),
    )


def _first_rows(query_start_B1: np.ndarray, wanted_B: np.ndarray) -> list[np.ndarray]:
    return [np.arange(query_start_B1[i], query_start_B1[i] + wanted_B[i]) for i in np.flatnonzero(wanted_B)]


def _check(
    scheduled: tuple[ScheduledTokens, ...],
    table: RequestTable,
    slots_B: np.ndarray,
    ends_B: np.ndarray,
    samples_B: np.ndarray,
) -> None:
    """Assert that a plan asks for what can be computed."""
    ids = [s.request_id for s in scheduled]
    assert len(set(ids)) == len(ids), "a request is scheduled twice"
    assert all(s.num_tokens > 0 for s in scheduled), "a request without rows"
    known_B = table.num_tokens_S[slots_B]
    assert (ends_B <= known_B).all(), "rows of tokens that are not known yet"
    assert (samples_B == (ends_B == known_B)).all(), "a token is sampled from the last known token and from no other"


def _transfer(fields: tuple[np.ndarray, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Integer arrays as int64 tensors on the device, through one buffer."""
    host = torch.from_numpy(np.concatenate(fields, dtype=np.int64, casting="safe"))
    if device.type == "cuda":
        host = host.pin_memory()
    return torch.split(host.to(device, non_blocking=True), [len(f) for f in fields])
