"""Attention over window rows, entries and a sink: each query reads its own list of rows (architecture, 2.3).

Rows are read in blocks of fixed size, in a fixed order (window, then entries ascending), with an online softmax that
starts from the sink. A block without rows for a query leaves its state as it is, to the bit, so neither neighbours
nor padding change a result. Workspace: QUERY_TILE * KEY_BLOCK rows, whatever the context.
"""

import torch
from torch import Tensor

from model.kv_cache import RowStore
from model.step import EntryPlan, Step

QUERY_TILE = 16
KEY_BLOCK = 64


def attention(
    q_THC: Tensor,
    window_NC: Tensor,
    step: Step,
    sink_H: Tensor,
    scale: float,
    store: RowStore | None = None,
    entries: EntryPlan | None = None,
    selected_TS: Tensor | None = None,
) -> Tensor:
    out_THC = torch.empty_like(q_THC)
    request_T = step.batch.request_index_T
    for first in range(0, q_THC.shape[0], QUERY_TILE):
        tile = slice(first, first + QUERY_TILE)
        online = _OnlineSoftmax(q_THC[tile], sink_H, scale)
        for index in _key_blocks(step.window.index_TW[tile]):
            online.add(window_NC[index.clamp_min(0)], index)
        if store is not None and entries is not None:
            listed = listed_entries(entries.visible_T[tile]) if selected_TS is None else selected_TS[tile]
            rows = entries.rows(request_T[tile].unsqueeze(1), listed)
            for index in _key_blocks(rows):
                online.add(store.read(index.clamp_min(0)), index)
        out_THC[tile] = online.result()
    return out_THC


def listed_entries(visible_T: Tensor) -> Tensor:
    """All visible entries of each token, ascending; -1 absent. [T, largest visible]."""
    entry = torch.arange(int(visible_T.max()), device=visible_T.device)
    return torch.where(entry < visible_T.unsqueeze(1), entry, -1)


def _key_blocks(index_TS: Tensor) -> tuple[Tensor, ...]:
    """[QUERY_TILE, KEY_BLOCK] pieces of the lists; missing rows and queries are -1."""
    if index_TS.shape[1] == 0:
        return ()
    padding = (0, -index_TS.shape[1] % KEY_BLOCK, 0, QUERY_TILE - index_TS.shape[0])
    return torch.split(torch.nn.functional.pad(index_TS, padding, value=-1), KEY_BLOCK, dim=1)


class _OnlineSoftmax:
    """Running maximum, sum and weighted rows of a tile of queries, fp32."""

    def __init__(self, q_THC: Tensor, sink_H: Tensor, scale: float) -> None:
        self.present = q_THC.shape[0]
        padding = (0, 0, 0, 0, 0, QUERY_TILE - self.present)
        self.q_THC = torch.nn.functional.pad(q_THC.float(), padding)
        self.scale = scale
        self.maximum_TH1 = sink_H.expand(QUERY_TILE, -1).unsqueeze(2).contiguous()
        self.sum_TH1 = torch.ones_like(self.maximum_TH1)
        self.weighted_THC = torch.zeros_like(self.q_THC)

    def add(self, rows_TKC: Tensor, index_TK: Tensor) -> None:
        # What stands in for an absent row may be anything, and 0 * NaN is NaN.
        rows_TKC = rows_TKC.float().masked_fill((index_TK < 0).unsqueeze(2), 0.0)
        scores_THK = torch.bmm(self.q_THC, rows_TKC.transpose(1, 2)) * self.scale
        scores_THK = scores_THK.masked_fill((index_TK < 0).unsqueeze(1), float("-inf"))
        maximum_TH1 = torch.maximum(self.maximum_TH1, scores_THK.amax(-1, keepdim=True))
        keep_TH1 = torch.exp(self.maximum_TH1 - maximum_TH1)
        p_THK = torch.exp(scores_THK - maximum_TH1)
        self.sum_TH1 = self.sum_TH1 * keep_TH1 + p_THK.sum(-1, keepdim=True)
        self.weighted_THC = self.weighted_THC * keep_TH1 + torch.bmm(p_THK, rows_TKC)
        self.maximum_TH1 = maximum_TH1

    def result(self) -> Tensor:
        return (self.weighted_THC / self.sum_TH1)[: self.present]
