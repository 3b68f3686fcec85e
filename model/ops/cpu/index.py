"""Index scores as matrix products over all heads of a tile of queries; the same top-k as the reference.

Keys are read once for each request, in blocks; of each block the scores of a tile of queries are made piece by piece,
so that the products of all heads stay near the cores, in memory that all pieces share. Scores are rounded to the
model's dtype, as torch's products return them. Workspace: KEYS keys, PRODUCTS products and the scores of a block,
whatever the context.
"""

import torch
from torch import Tensor

from model.kv_cache import RowStore
from model.ops.cpu.topk import GroupedTopK
from model.ops.reference.index import weighted_heads
from model.step import EntryPlan, Step

PRODUCTS = 1 << 20
QUERIES = 128
LEAST_KEYS = 128
ENTRY_BLOCK = 8192
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
    best = GroupedTopK(tokens.shape[0], topk, out.device)
    most = int(visible.max())
    for start in range(0, most, ENTRY_BLOCK):
        entry = torch.arange(start, min(start + ENTRY_BLOCK, most), device=out.device).expand(tokens.shape[0], -1)
        unseen = entry >= visible.unsqueeze(1)
        rows = entries.rows(request, entry.masked_fill(unseen, 0))
        products = torch.bmm(q, keys.read(rows).transpose(1, 2))
        scores = _weigh(products, weights, low_precision)
        best.merge(scores.masked_fill_(unseen, float("-inf")), start)
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
    position_0, heads = step.start_positions[request], q_TIJ.shape[1]
    count = entries.visible_after[request]
    rows = entries.request_rows(request, count)
    size = min(QUERIES, max(1, PRODUCTS // (heads * LEAST_KEYS)))
    tiles = [slice(first, min(first + size, token_0 + length)) for first in range(token_0, token_0 + length, size)]
    best = [GroupedTopK(tile.stop - tile.start, topk, out.device) for tile in tiles]
    scratch = _Scratch(q_TIJ, num_queries=min(size, length), num_keys=min(ENTRY_BLOCK, count))
    for start in range(0, count, ENTRY_BLOCK):
        keys_NJ = keys.read(rows[start : start + ENTRY_BLOCK])
        for tile, found in zip(tiles, best, strict=True):
            # The first query of the tile sees this many entries of the block, and the last one so many.
            all_see, seen = (
                min((position_0 + token - token_0) // entries.ratio - start, keys_NJ.shape[0])
                for token in (tile.start + 1, tile.stop)
            )
            if seen <= 0:
                continue
            scores_TN = scratch.scores(q_TIJ[tile], weights_TI[tile], keys_NJ[:seen], low_precision)
            if all_see < seen:
                low = max(0, all_see)
                entry = torch.arange(start + low, start + seen, device=out.device)
                scores_TN[:, low:].masked_fill_(entry >= entries.visible_T[tile].unsqueeze(1), float("-inf"))
            found.merge(scores_TN, start)
    for tile, found in zip(tiles, best, strict=True):
        out[tile, : found.entries.shape[1]] = found.entries


class _Scratch:
    """Memory for the products of a piece and the scores of a block: fresh pages for each would cost much time."""

    def __init__(self, q_TIJ: Tensor, *, num_queries: int, num_keys: int) -> None:
        heads = q_TIJ.shape[1]
        products = max(PRODUCTS, num_queries * heads * LEAST_KEYS)
        self._products = q_TIJ.new_empty(min(products, num_queries * heads * num_keys))
        self._scores = q_TIJ.new_empty(num_queries * num_keys, dtype=torch.float32)

    def scores(self, q_TIJ: Tensor, weights_TI: Tensor, keys_NJ: Tensor, low_precision: bool) -> Tensor:
        """fp32 [T, N], until the next call."""
        queries, heads, channels = q_TIJ.shape
        count = keys_NJ.shape[0]
        q = q_TIJ.reshape(-1, channels)
        scores_TN = self._scores[: queries * count].view(queries, count)
        size = max(LEAST_KEYS, PRODUCTS // (queries * heads))
        for first in range(0, count, size):
            keys = keys_NJ[first : first + size]
            products = self._products[: queries * heads * keys.shape[0]].view(queries * heads, -1)
            products_TIN = torch.mm(q, keys.t(), out=products).view(queries, heads, -1)
            scores_TN[:, first : first + size] = _weigh(products_TIN, weights_TI, low_precision)
        return scores_TN


def _weigh(products_TIN: Tensor, weights_TI: Tensor, low_precision: bool) -> Tensor:
    if low_precision:
        return weighted_heads(products_TIN, weights_TI, low_precision)
    return torch.bmm(weights_TI.unsqueeze(1), products_TIN.relu_()).squeeze(1)
