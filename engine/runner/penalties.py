"""Which tokens a request has seen and how often it produced them: the memory of the penalties.

One row for each slot, allocated with the engine so that no step allocates it; only the rows of requests that use a
penalty are ever read or written. A cell holds the count of generated tokens and, in one high bit, "stands in the
prompt".
"""

import numpy as np
import torch
from torch import Tensor

_IN_PROMPT = 1 << 30


class PenaltyCounts:
    """int32 [slots, V] on the model's device."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        # Not zeroed: a row is cleared when a request that needs it takes the slot, and untouched pages cost nothing.
        self._cells_SV = torch.empty((num_slots, vocab_size), dtype=torch.int32, device=device)

    @property
    def vocab_size(self) -> int:
        return self._cells_SV.shape[1]

    @property
    def allocated_bytes(self) -> int:
        return self._cells_SV.numel() * self._cells_SV.element_size()

    def start(self, slot: int, token_ids: np.ndarray, num_prompt_tokens: int) -> None:
        """Fill a slot's row from a request's tokens, int32 [prompt + tokens generated before]."""
        row = np.bincount(token_ids[num_prompt_tokens:], minlength=self._cells_SV.shape[1]).astype(np.int32)
        row[token_ids[:num_prompt_tokens]] |= _IN_PROMPT
        self._cells_SV[slot].copy_(torch.from_numpy(row))

    def add(self, slots: np.ndarray, token_ids: np.ndarray) -> None:
        """Count one generated token for each of these slots (int64 [N], all different)."""
        device = self._cells_SV.device
        index = torch.from_numpy(np.stack([slots, token_ids])).to(device)
        self._cells_SV[index[0], index[1]] += 1

    def apply(self, logits_NV: Tensor, slots_N: np.ndarray, penalties_3N: np.ndarray) -> Tensor:
        """Logits [N, V] with the penalties of their rows: repetition, presence, frequency.

        repetition  a token of the prompt or of the output: logit / r where positive, logit * r elsewhere (HF)
        presence    a token of the output: minus p                         (OpenAI)
        frequency   a token of the output: minus f times its count         (OpenAI)
        """
        device = logits_NV.device
        factors_31N = torch.from_numpy(penalties_3N.astype(np.float32)).to(device).unsqueeze(-1)
        repetition, presence, frequency = factors_31N
        cells_NV = self._cells_SV[torch.from_numpy(slots_N).to(device)]
        if (penalties_3N[0] != 1.0).any():
            repeated_NV = torch.where(logits_NV > 0, logits_NV / repetition, logits_NV * repetition)
            logits_NV = torch.where(cells_NV != 0, repeated_NV, logits_NV)
        counts_NV = cells_NV.bitwise_and_(_IN_PROMPT - 1)
        if penalties_3N[2].any():
            logits_NV = logits_NV - frequency * counts_NV
        if penalties_3N[1].any():
            logits_NV = logits_NV - presence * (counts_NV > 0)
        return logits_NV
