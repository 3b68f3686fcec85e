"""Index scores and their top-k (architecture, 2.5). Ties go to the lower entry, in every path.

Scores are made in blocks of entries; the best k so far are carried along, so memory does not grow with the context.
"""

import torch
from torch import Tensor

from model.kv_cache import RowStore
from model.ops.reference.topk import select
from model.step import EntryPlan, Step

QUERY_TILE = 16
ENTRY_BLOCK = 128


def index(
    q_TIJ: Tensor,
    weights_TI: Tensor,
    keys: RowStore,
    step: Step,
    entries: EntryPlan,
    topk: int,
    *,
    low_precision: bool,
) -> Tensor:
    request_T, visible_T = step.batch.request_index_T, entries.visible_T
    tiles = []
    for first in range(0, q_TIJ.shape[0], QUERY_TILE):
        tile = slice(first, first + QUERY_TILE)
        visible, request = visible_T[tile], request_T[tile]
        best = TopK(visible.shape[0], topk, q_TIJ.device)
        for start in range(0, int(visible.max()), ENTRY_BLOCK):
            entry = start + torch.arange(ENTRY_BLOCK, device=q_TIJ.device).expand(visible.shape[0], -1)
            seen = entry < visible.unsqueeze(1)
            rows = entries.rows(request.unsqueeze(1), torch.where(seen, entry, -1))
            scores = _scores(q_TIJ[tile], weights_TI[tile], keys.read(rows.clamp_min(0)), low_precision)
            best.merge(scores.masked_fill(~seen, float("-inf")), entry)
        tiles.append(best.entries)
    return torch.cat(tiles)


def _scores(q_TIJ: Tensor, weights_TI: Tensor, keys_TNJ: Tensor, low_precision: bool) -> Tensor:
    """fp32 [T, N]: sum over heads of weight * relu(q . key). The tile is filled up to a fixed shape."""
    count = q_TIJ.shape[0]
    fill = QUERY_TILE - count
    q, keys = q_TIJ.float(), keys_TNJ.float()
    if fill:
        q = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, fill))
        keys = torch.nn.functional.pad(keys, (0, 0, 0, 0, 0, fill))
    products_TIN = torch.bmm(q, keys.transpose(1, 2))[:count]
    return weighted_heads(products_TIN, weights_TI, low_precision)


def weighted_heads(products_TIN: Tensor, weights_TI: Tensor, low_precision: bool) -> Tensor:
    """Sum over heads, one head after the other. `low_precision` rounds products and sums to bfloat16 (2.10, OFF)."""
    if low_precision:
        terms = products_TIN.bfloat16().relu() * weights_TI.bfloat16().unsqueeze(2)
        return terms.float().sum(1).bfloat16().float()
    return (products_TIN.relu() * weights_TI.float().unsqueeze(2)).sum(1)


class TopK:
    """The best k entries of each row so far: entries ascending, -1 absent, with their scores."""

    def __init__(self, rows: int, k: int, device: torch.device) -> None:
        self.k = k
        self.entries = torch.empty(rows, 0, dtype=torch.int64, device=device)
        self.scores = torch.empty(rows, 0, dtype=torch.float32, device=device)

    def merge(self, scores_TN: Tensor, entries_TN: Tensor) -> None:
        """More candidates, ascending and above all earlier ones; a score of -inf is no candidate."""
        entries = torch.cat([self.entries, entries_TN.masked_fill(scores_TN == float("-inf"), -1)], dim=1)
        scores = torch.cat([self.scores, scores_TN], dim=1)
        if scores.shape[1] > self.k:
            chosen = select(scores, self.k)
            entries, scores = entries.gather(1, chosen), scores.gather(1, chosen)
        self.entries, self.scores = entries, scores
