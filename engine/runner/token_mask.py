"""Token masks on logits. The reference: plain torch, any device.

A mask is int32 words, 32 tokens each: bit b of word w is token 32 w + b, as the grammar library fills them.
"""

import numpy as np
import torch
from torch import Tensor


def apply_token_mask(logits_LV: Tensor, rows_N: Tensor, mask_NW: Tensor) -> None:
    """Set the logits of tokens whose bit is 0 to -inf, in place; rows that `rows_N` does not name stay as they are.

    logits_LV: float [L, V]; rows_N: int64 [N], each row once; mask_NW: int32 [N, ceil(V / 32)].
    """
    vocab = logits_LV.shape[-1]
    assert mask_NW.shape == (len(rows_N), (vocab + 31) // 32), f"a mask of {tuple(mask_NW.shape)} for {vocab} tokens"
    shifts = torch.arange(32, dtype=torch.int32, device=mask_NW.device)
    allowed_NV = ((mask_NW.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :vocab].bool()
    logits_LV[rows_N] = logits_LV[rows_N].masked_fill(~allowed_NV, float("-inf"))


def leaves_a_token(mask_W: np.ndarray, banned_ids: np.ndarray) -> bool:
    """Whether a mask, int32 [words], allows any token but these."""
    left_W = mask_W.copy()
    np.bitwise_and.at(left_W, banned_ids >> 5, ~np.left_shift(np.int32(1), (banned_ids & 31).astype(np.int32)))
    return bool(left_W.any())
