"""Log probabilities of prompt tokens: the head over many rows, a tile of rows at a time.

A tile has as many logits as a block of the sampler, so a prompt of any length costs memory that was planned for when
the engine started (`workspace_bytes`). Like all log probabilities they are those of the raw logits, and a row's values
depend on that row only.

Letters: R rows of all requests, N rows of a tile or of a request, V vocabulary, K most tokens wanted.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.plan import PromptLogprobs
from engine.runner.inputs import PromptRows
from engine.runner.sampler import likeliest


def prompt_logprobs(
    hidden_RD: Tensor, rows: Sequence[PromptRows], head: Callable[[Tensor], Tensor], *, tile_rows: int
) -> tuple[dict[str, PromptLogprobs], dict[str, str]]:
    """By request: log probabilities, or why there are none. `hidden_RD` holds the rows of `rows` one after another."""
    token_ids_R = torch.from_numpy(np.concatenate([r.token_ids_R for r in rows]).astype(np.int64)).to(hidden_RD.device)
    most = max(r.num_top for r in rows)
    assert len(token_ids_R) == len(hidden_RD)
    tiles = [
        _tile(head(hidden_RD[first : first + tile_rows]), token_ids_R[first : first + tile_rows], most)
        for first in range(0, len(hidden_RD), tile_rows)
    ]
    logprobs_R, ranks_R, top_ids_RK, top_RK = (np.concatenate(columns) for columns in zip(*tiles, strict=True))
    found: dict[str, PromptLogprobs] = {}
    failed: dict[str, str] = {}
    first = 0
    for r in rows:
        span = slice(first, first + len(r.token_ids_R))
        first = span.stop
        if not np.isfinite(logprobs_R[span]).all():
            failed[r.request_id] = "the model's output is not finite"
            continue
        found[r.request_id] = PromptLogprobs(
            start=r.first,
            logprobs_N=logprobs_R[span],
            ranks_N=ranks_R[span],
            top_ids_NK=top_ids_RK[span, : r.num_top],
            top_logprobs_NK=top_RK[span, : r.num_top],
        )
    return found, failed


def _tile(logits_NV: Tensor, token_ids_N: Tensor, most: int) -> tuple[np.ndarray, ...]:
    """Columns of one tile on the host: log probabilities, ranks, likeliest ids and their log probabilities."""
    most = min(most, logits_NV.shape[-1])
    chosen_N1 = token_ids_N.unsqueeze(-1)
    ranks_N = (logits_NV > logits_NV.gather(-1, chosen_N1)).sum(-1) + 1
    top_ids_NK = likeliest(logits_NV, most)
    log_probs_NV = torch.log_softmax(logits_NV, dim=-1)
    return (
        log_probs_NV.gather(-1, chosen_N1).squeeze(-1).cpu().numpy(),
        ranks_N.to(torch.int32).cpu().numpy(),
        top_ids_NK.to(torch.int32).cpu().numpy(),
        log_probs_NV.gather(-1, top_ids_NK).cpu().numpy(),
    )
