"""Index scores as matrix products over all heads of a tile of queries; the same top-k as the reference.

Scores are rounded to the model's dtype, as torch's products return them. Workspace: SCORES products and ENTRY_BLOCK
keys of each query tile, whatever the context.
"""

import torch
from torch import Tensor

from model.kv_cache import RowStore
from model.ops.reference.index import TopK, weighted_heads
from model.step import EntryPlan, Step

SCORES = 1 << 21
ENTRY_BLOCK = 4096
KEYS = 1 << 17


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
    width = min(topk, entries.most_visible)
    out = torch.full((step.num_tokens, width), -1, dtype=torch.int64, device=q_TIJ.device)
    if step.single_tokens is not None:
        tokens = step.single_tokens
        tile = max(1, KEYS // min(ENTRY_BLOCK, entries.most_visible))
        for part in torch.split(tokens, tile):
            _decode(out, part, q_TIJ, weights_TI, keys, step, entries, topk, low_precision)
    for request in step.long_requests:
        _prefill(out, request, q_TIJ, weights_TI, keys, step, entries, topk, low_precision)
    return out


def _decode(
    out: Tensor,
    tokens: Tensor,
    q_TIJ: Tensor,
    weights_TI: Tensor,
    keys: RowStore,
    step: Step,
    entries: EntryPlan,
    topk: int,
    low_precision: bool,
) -> None:
    q, weights = q_TIJ.index_select(0, tokens), weights_TI.index_select(0, tokens)
    visible = entries.visible_T.index_select(0, tokens)
    request = step.batch.request_index_T.index_select(0, tokens).unsqueeze(1)
    best = TopK(tokens.shape[0], topk, out.device)
    most = int(visible.max())
    for start in range(0, most, ENTRY_BLOCK):
        entry = torch.arange(start, min(start + ENTRY_BLOCK, most), device=out.device).expand(tokens.shape[0], -1)
        unseen = entry >= visible.unsqueeze(1)
        rows = entries.rows(request, entry.masked_fill(unseen, 0))
        products = torch.bmm(q, keys.read(rows).transpose(1, 2))
        scores = _weigh(products, weights, low_precision)
        best.merge(scores.masked_fill_(unseen, float("-inf")), entry)
    out[tokens, : best.entries.shape[1]] = best.entries


def _prefill(
    out: Tensor,
    request: int,
    q_TIJ: Tensor,
    weights_TI: Tensor,
    keys: RowStore,
    step: Step,
    entries: EntryPlan,
    topk: int,
    low_precision: bool,
) -> None:
    token_0, length = step.query_starts[request], step.query_lens[request]
    heads, channels = q_TIJ.shape[1:]
    count = entries.visible_after[request]
    rows = entries.request_rows(request, count)
    block = min(ENTRY_BLOCK, max(count, 1))
    tile = max(16, SCORES // (heads * block))
    whole = keys.read(rows) if count <= ENTRY_BLOCK else None
    for first in range(token_0, token_0 + length, tile):
        part = slice(first, min(first + tile, token_0 + length))
        visible = entries.visible_T[part]
        seen = (step.start_positions[request] + part.stop - token_0) // entries.ratio
        best = TopK(part.stop - first, topk, out.device)
        for start in range(0, seen, ENTRY_BLOCK):
            stop = min(start + ENTRY_BLOCK, seen)
            block_NJ = whole[:stop] if whole is not None else keys.read(rows[start:stop])
            products = torch.mm(q_TIJ[part].reshape(-1, channels), block_NJ.t()).view(-1, heads, stop - start)
            entry = torch.arange(start, stop, device=out.device).expand(products.shape[0], -1)
            scores = _weigh(products, weights_TI[part], low_precision)
            best.merge(scores.masked_fill_(entry >= visible.unsqueeze(1), float("-inf")), entry)
        out[part, : best.entries.shape[1]] = best.entries


def _weigh(products_TIN: Tensor, weights_TI: Tensor, low_precision: bool) -> Tensor:
    if low_precision:
        return weighted_heads(products_TIN, weights_TI, low_precision)
    return torch.bmm(weights_TI.unsqueeze(1), products_TIN.relu_()).squeeze(1).float()
