"""Attention as two matrix products over all heads of a tile of queries (a row is key and value of every head).

    prefill   one request, a tile of consecutive queries: [window rows of the tile | entries | zero row]
    decode    one query of each of many requests, each with its own gathered list of rows

The sink is the score of a zero row at the end: its value adds nothing. Scores are rounded to the model's dtype, as
torch's products return them; the softmax is computed in fp32 inside. Workspace: at most WORKSPACE_ROWS gathered rows,
and SCORES scores.
"""

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from model.kv_cache import RowStore
from model.ops.reference.attention import listed_entries
from model.step import EntryPlan, Step

WORKSPACE_ROWS = 16384
SCORES = 1 << 19
LEAST_QUERIES = 16
DENSE_FACTOR = 4
"""Up to this many times the selected entries, masking all of them is cheaper than gathering the selected ones."""


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
    sink_H = sink_H.to(q_THC.dtype)
    singles = step.single_tokens
    if singles is not None and singles.shape[0] == step.num_tokens:
        return _gathered(q_THC, window_NC, step, sink_H, scale, store, entries, selected_TS, None)
    out_THC = torch.empty_like(q_THC)
    if singles is not None:
        out_THC[singles] = _gathered(
            q_THC[singles], window_NC, step, sink_H, scale, store, entries, selected_TS, singles
        )
    for request in step.long_requests:
        _dense(out_THC, q_THC, window_NC, step, sink_H, scale, store, entries, selected_TS, request)
    return out_THC


def _gathered(
    q_THC: Tensor,
    window_NC: Tensor,
    step: Step,
    sink_H: Tensor,
    scale: float,
    store: RowStore | None,
    entries: EntryPlan | None,
    selected_TS: Tensor | None,
    tokens: Tensor | None,
) -> Tensor:
    """Queries with a list of rows each; `tokens` are their places in the step (None: all)."""

    def of(per_token: Tensor) -> Tensor:
        return per_token if tokens is None else per_token.index_select(0, tokens)

    window_TW = of(step.window.index_TW)
    entry_TS = None
    if store is not None and entries is not None:
        listed = listed_entries(of(entries.visible_T)) if selected_TS is None else of(selected_TS)
        entry_TS = entries.rows(of(step.batch.request_index_T).unsqueeze(1), listed) if listed.shape[1] else None
    most_rows = window_TW.shape[1] + (0 if entry_TS is None else entry_TS.shape[1])
    tile = max(1, WORKSPACE_ROWS // most_rows)
    outs = []
    for first in range(0, q_THC.shape[0], tile):
        index = window_TW[first : first + tile]
        rows = window_NC.index_select(0, index.clamp_min(0).flatten()).view(*index.shape, -1)
        if entry_TS is not None and store is not None:
            entry = entry_TS[first : first + tile]
            rows = torch.cat([rows, store.read(entry.clamp_min(0))], dim=1)
            index = torch.cat([index, entry], dim=1)
        absent = index < 0 if bool((index < 0).any()) else None
        if absent is not None:
            # What stands in for an absent row may be anything, and 0 * NaN is NaN.
            rows = rows.masked_fill_(absent.unsqueeze(2), 0.0)
        outs.append(_softmax_rows(q_THC[first : first + tile], rows, absent, sink_H, scale))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _softmax_rows(q_THC: Tensor, rows_TKC: Tensor, absent_TK: Tensor | None, sink_H: Tensor, scale: float) -> Tensor:
    tokens, heads, _ = q_THC.shape
    keys = rows_TKC.shape[1]
    scores = q_THC.new_empty(tokens, heads, keys + 1)
    products = torch.bmm(q_THC, rows_TKC.transpose(1, 2))
    torch.mul(products, scale, out=scores[..., :keys])
    scores[..., keys] = sink_H
    if absent_TK is not None:
        scores[..., :keys].masked_fill_(absent_TK.unsqueeze(1), float("-inf"))
    return torch.bmm(scores.softmax(-1)[..., :keys], rows_TKC)


def _dense(
    out_THC: Tensor,
    q_THC: Tensor,
    window_NC: Tensor,
    step: Step,
    sink_H: Tensor,
    scale: float,
    store: RowStore | None,
    entries: EntryPlan | None,
    selected_TS: Tensor | None,
    request: int,
) -> None:
    """Tiles of consecutive queries of one request, all rows that any of them may see, and a mask."""
    length, token_0 = step.query_lens[request], step.query_starts[request]
    heads, channels = q_THC.shape[1:]
    size = step.layout.config.sliding_window
    own_0 = step.window.base_rows[request] + step.window.history_lens[request]
    count = entries.visible_after[request] if entries is not None else 0
    listed = None
    if selected_TS is not None:
        listed = selected_TS[token_0 : token_0 + length]
        if count > DENSE_FACTOR * selected_TS.shape[1]:
            tokens = torch.arange(token_0, token_0 + length, device=q_THC.device)
            q = q_THC[token_0 : token_0 + length]
            out_THC[token_0 : token_0 + length] = _gathered(
                q, window_NC, step, sink_H, scale, store, entries, selected_TS, tokens
            )
            return
    entry_EC = None
    if entries is not None and store is not None and count:
        entry_EC = store.read(entries.request_rows(request, count))
    tile = max(LEAST_QUERIES, min(size // 2, SCORES // (heads * (size + count))))
    for first in range(0, length, tile):
        last = min(first + tile, length)
        low = max(own_0 + first - size + 1, step.window.base_rows[request])
        window = window_NC[low : own_0 + last]
        absent = [_band(first, last, own_0 - low, size, q_THC.device)]
        columns = [slice(0, window.shape[0])]
        parts = [window]
        if entry_EC is not None and entries is not None:
            all_see, seen = ((step.start_positions[request] + n) // entries.ratio for n in (first + 1, last))
            parts.append(entry_EC[:seen])
            # Without a list only the last entries are hidden from any query of the tile.
            hidden = all_see if listed is None else 0
            columns.append(slice(window.shape[0] + hidden, window.shape[0] + seen))
            if listed is None:
                visible = entries.visible_T[token_0 + first : token_0 + last]
                absent.append(torch.arange(hidden, seen, device=q_THC.device) >= visible.unsqueeze(1))
            else:
                absent.append(_unselected(listed[first:last], seen))
        q = q_THC[token_0 + first : token_0 + last].reshape(-1, channels)
        out = out_THC[token_0 + first : token_0 + last].view(-1, channels)
        _softmax_parts(out, q, parts, columns, absent, sink_H, scale)


def _softmax_parts(
    out_XC: Tensor,
    q_XC: Tensor,
    parts: list[Tensor],
    columns: list[slice],
    absent: list[Tensor],
    sink_H: Tensor,
    scale: float,
) -> None:
    """Queries of T tokens and H heads over the rows of all parts [N, C] and the sink, into `out_XC`.

    `absent` [T, columns] says which of these columns of all rows a query may not see.
    """
    heads = sink_H.shape[0]
    ends = [0, *accumulate(part.shape[0] for part in parts)]
    scores = q_XC.new_empty(q_XC.shape[0], ends[-1] + 1)
    spans = [slice(*span) for span in pairwise(ends)]
    for span, part in zip(spans, parts, strict=True):
        torch.addmm(q_XC.new_empty(()), q_XC, part.t(), beta=0, alpha=scale, out=scores[:, span])
    scores_THK = scores.view(-1, heads, scores.shape[1])
    scores_THK[..., -1] = sink_H
    for where, missing in zip(columns, absent, strict=True):
        scores_THK[..., where].masked_fill_(missing.unsqueeze(1), float("-inf"))
    p = scores.softmax(-1)
    out_XC.zero_()
    for span, part in zip(spans, parts, strict=True):
        out_XC.addmm_(p[:, span], part)


def _band(first: int, last: int, own: int, size: int, device: torch.device) -> Tensor:
    """Which of the rows low .. last a query may not see: later ones, and those `size` or more rows back."""
    query = own + torch.arange(first, last, device=device).unsqueeze(1)
    row = torch.arange(own + last, device=device)
    return (row > query) | (row <= query - size)


def _unselected(selected_TS: Tensor, count: int) -> Tensor:
    """[T, count]: True where an entry is not selected."""
    absent = torch.ones(selected_TS.shape[0], count + 1, dtype=torch.bool, device=selected_TS.device)
    # Absent list places fall on a column of their own, behind the entries.
    absent.scatter_(1, torch.where(selected_TS < 0, count, selected_TS), False)
    return absent[:, :count]
