"""Index plans of one step: which rows each token reads and writes. Built once, used by every layer.

    window rows of a step   for each request: the rows before its chunk (from the ring), then the rows of its chunk
                            [ history of 0 | chunk of 0 | history of 1 | chunk of 1 | ... ]
    compress windows        for each request: the groups of m tokens that its chunk touches, in order

Letters: T tokens, B requests, N window rows, W window, G compress windows of the step, K tokens of a window that
are in this step, E entries completed by this step, P pages.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from model.batch import ForwardBatch
from model.config import CSA_RATIO, HCA_RATIO
from model.kv_layout import KVLayout
from model.rope import Rope, Rotation


def _offsets(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Owner of each element and its offset within the owner, for `counts` elements of each owner."""
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    first = torch.cumsum(counts, 0) - counts
    return owner, torch.arange(len(owner)) - first[owner]


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPlan:
    """Rows of the sliding window; the same for every layer."""

    num_rows: int
    base_rows: tuple[int, ...]
    """First window row of each request, on the host,"""
    history_lens: tuple[int, ...]
    """and how many of its rows stand before its chunk."""
    history_slot_rows: Tensor
    """Rows of the ring storage to read, and"""
    history_rows: Tensor
    """where they go among the N window rows."""
    chunk_rows_T: Tensor
    """Window row of each token of the step."""
    store_tokens: Tensor
    """Tokens whose rows survive in the ring, and"""
    store_slot_rows: Tensor
    """the rows of the ring storage that they overwrite."""
    index_TW: Tensor
    """Window rows that each token sees, oldest first; -1 before position 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressPlan:
    """Groups of `ratio` tokens that this step touches; the same for every layer of one kind."""

    ratio: int
    tokens_GK: Tensor
    """Tokens of each window that are in this step, in position order; -1 absent."""
    phase_T: Tensor
    """position mod ratio."""
    first_B: Tensor
    """First window of each request (it goes on from the slot's accumulator)."""
    last_B: Tensor
    completes_B: Tensor
    """Whether the last window of each request is completed by this step."""
    slot_B: Tensor
    emit_windows: Tensor
    """Windows that this step completes,"""
    emit_rows: Tensor
    """the rows of the paged storage where their entries go,"""
    emit_rotation: Rotation
    """and the rotation of their first token's position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryPlan:
    """Compressed entries that the tokens of the step may see; the same for every layer of one kind."""

    ratio: int
    rows_per_page: int
    page_table_BP: Tensor
    visible_T: Tensor
    """Entries visible to each token: all w < visible."""
    most_visible: int
    visible_after: tuple[int, ...]
    """Entries of each request after this step, on the host."""

    def rows(self, request: Tensor, entry: Tensor) -> Tensor:
        """Rows of the paged storage; shapes broadcast. -1 entries stay -1."""
        page = self.page_table_BP[request, torch.div(entry, self.rows_per_page, rounding_mode="floor").clamp_min(0)]
        rows = page * self.rows_per_page + entry.remainder(self.rows_per_page)
        return torch.where(entry < 0, entry, rows)

    def request_rows(self, request: int, count: int) -> Tensor:
        """Rows of the first `count` entries of one request."""
        entry = torch.arange(count, device=self.page_table_BP.device)
        page = self.page_table_BP[request].index_select(0, entry // self.rows_per_page)
        return page * self.rows_per_page + entry % self.rows_per_page


class Step:
    """A ForwardBatch with its index plans; each plan is made when a layer first asks for it."""

    def __init__(self, batch: ForwardBatch, layout: KVLayout, rope: Rope) -> None:
        self.batch = batch
        self.layout = layout
        self.rope = rope
        self.device = batch.token_ids_T.device
        self.num_tokens = batch.token_ids_T.shape[0]
        self.query_lens = batch.query_lens
        self.start_positions = batch.start_positions
        assert sum(batch.query_lens) == self.num_tokens and min(batch.query_lens) > 0
        self._lens = torch.tensor(batch.query_lens)
        self._starts = torch.tensor(batch.start_positions)
        self._query_starts = torch.cumsum(self._lens, 0) - self._lens

    @cached_property
    def query_starts(self) -> tuple[int, ...]:
        """First token of each request, on the host."""
        return tuple(self._query_starts.tolist())

    @cached_property
    def single_tokens(self) -> Tensor | None:
        """Tokens of the requests that bring one token only (decode), or None; computed together."""
        tokens = [t for t, n in zip(self.query_starts, self.query_lens, strict=True) if n == 1]
        return torch.tensor(tokens, device=self.device) if tokens else None

    @cached_property
    def long_requests(self) -> tuple[int, ...]:
        """Requests that bring more than one token; computed one by one."""
        return tuple(b for b, n in enumerate(self.query_lens) if n > 1)

    @cached_property
    def main_rotation(self) -> Rotation:
        return self.rope.rotation(self.batch.positions_T, compressed=False)

    @cached_property
    def compressed_rotation(self) -> Rotation:
        return self.rope.rotation(self.batch.positions_T, compressed=True)

    @cached_property
    def window(self) -> WindowPlan:
        size, ring = self.layout.config.sliding_window, self.layout.window_ring
        slots = self.batch.slot_B
        history = self._starts.clamp_max(size - 1)
        rows = history + self._lens
        base = torch.cumsum(rows, 0) - rows
        owner, offset = _offsets(history)
        position = (self._starts - history)[owner] + offset
        owner_d = owner.to(self.device)
        stored = self._lens.clamp_max(ring)
        owner_s, offset_s = _offsets(stored)
        owner_sd = owner_s.to(self.device)
        chunk_offset = (self._lens - stored)[owner_s] + offset_s
        request = self.batch.request_index_T
        own_row = (base + history - self._starts).to(self.device)[request] + self.batch.positions_T
        back = torch.arange(1 - size, 1, device=self.device)
        index = own_row.unsqueeze(1) + back
        index = index.masked_fill(self.batch.positions_T.unsqueeze(1) + back < 0, -1)
        return WindowPlan(
            num_rows=int(rows.sum()),
            base_rows=tuple(base.tolist()),
            history_lens=tuple(history.tolist()),
            history_slot_rows=slots[owner_d] * ring + (position % ring).to(self.device),
            history_rows=(base[owner] + offset).to(self.device),
            chunk_rows_T=own_row,
            store_tokens=(self._query_starts[owner_s] + chunk_offset).to(self.device),
            store_slot_rows=slots[owner_sd] * ring + ((self._starts[owner_s] + chunk_offset) % ring).to(self.device),
            index_TW=index,
        )

    @cached_property
    def csa_compress(self) -> CompressPlan:
        return self._compress(CSA_RATIO, self.csa_entries)

    @cached_property
    def hca_compress(self) -> CompressPlan:
        return self._compress(HCA_RATIO, self.hca_entries)

    @cached_property
    def csa_entries(self) -> EntryPlan:
        return self._entries(CSA_RATIO, self.layout.csa_rows_per_page)

    @cached_property
    def hca_entries(self) -> EntryPlan:
        return self._entries(HCA_RATIO, self.layout.hca_rows_per_page)

    def _entries(self, ratio: int, rows_per_page: int) -> EntryPlan:
        after = tuple((s + n) // ratio for s, n in zip(self.start_positions, self.query_lens, strict=True))
        return EntryPlan(
            ratio=ratio,
            rows_per_page=rows_per_page,
            page_table_BP=self.batch.page_table_BP,
            visible_T=(self.batch.positions_T + 1) // ratio,
            most_visible=max(after),
            visible_after=after,
        )

    def _compress(self, ratio: int, entries: EntryPlan) -> CompressPlan:
        starts, ends = self._starts, self._starts + self._lens
        group_0 = starts // ratio
        counts = (ends - 1) // ratio - group_0 + 1
        owner, offset = _offsets(counts)
        group = group_0[owner] + offset
        first = torch.maximum(group * ratio, starts[owner])
        last = torch.minimum((group + 1) * ratio, ends[owner])
        token_0 = self._query_starts[owner] + first - starts[owner]
        k = torch.arange(int((last - first).max()))
        tokens = torch.where(k < (last - first).unsqueeze(1), token_0.unsqueeze(1) + k, -1)
        complete = last == (group + 1) * ratio
        emit = torch.nonzero(complete).squeeze(1)
        last_window = torch.cumsum(counts, 0) - 1
        emit_group = group[emit].to(self.device)
        return CompressPlan(
            ratio=ratio,
            tokens_GK=tokens.to(self.device),
            phase_T=self.batch.positions_T % ratio,
            first_B=(last_window - counts + 1).to(self.device),
            last_B=last_window.to(self.device),
            completes_B=complete[last_window].to(self.device),
            slot_B=self.batch.slot_B,
            emit_windows=emit.to(self.device),
            emit_rows=entries.rows(owner[emit].to(self.device), emit_group),
            emit_rotation=self.rope.rotation(emit_group * ratio, compressed=True),
        )
