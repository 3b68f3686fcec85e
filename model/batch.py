"""The tokens of one step as the model sees them. The engine's runner builds it; nothing about it is global."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(slots=True, kw_only=True)
class ForwardBatch:
    """Ragged batch of B requests and T tokens; a request's tokens are contiguous and in position order.

    Letters: T tokens in the step, B requests, P pages of the longest request, L rows that need logits.
    All tensors are int64 on the model's device unless said.
    """

    token_ids_T: "torch.Tensor"
    positions_T: "torch.Tensor"
    """Absolute, 0-based."""
    request_index_T: "torch.Tensor"
    """Row of each token in the per-request tensors."""
    query_start_B1: "torch.Tensor"
    """[B + 1]; tokens of request b are rows query_start[b] .. query_start[b + 1]."""
    seq_lens_B: "torch.Tensor"
    """Length after this step: last position + 1."""
    page_table_BP: "torch.Tensor"
    """Page ids; entries past a request's own pages are 0 and never read."""
    slot_B: "torch.Tensor"
    logits_index_L: "torch.Tensor"
    """Rows of T whose hidden state is returned."""
    query_lens: tuple[int, ...]
    """The same extents on the host, so that no layer has to wait for the device: tokens of each request,"""
    start_positions: tuple[int, ...]
    """and the position of its first token."""
    previous_hidden_TMD: "torch.Tensor | None" = None
    """Streams before hc_head of the token before each row; read by the MTP block only."""
