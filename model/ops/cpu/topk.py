"""The k best entries of each row out of wide blocks of scores, mostly by looking at the maxima of small groups.

Once some entries have been seen, hardly any later one is among the best k. A block is therefore read once, for the
maximum of each group of GROUP entries, and only groups that may hold one of the best are looked into.
"""

import torch
from torch import Tensor

from model.ops.reference.index import TopK

GROUP = 32


class GroupedTopK:
    """As `TopK`, for blocks of consecutive entries; the same entries to the last tie."""

    def __init__(self, rows: int, k: int, device: torch.device) -> None:
        self.k = k
        self._best = TopK(rows, k, device)

    @property
    def entries(self) -> Tensor:
        """int64 [T, at most k]: ascending, -1 absent."""
        return self._best.entries

    def merge(self, scores_TN: Tensor, first: int) -> None:
        """Scores of the entries first .. first + N, above all earlier ones; a score of -inf is no candidate."""
        rows, count = scores_TN.shape
        columns = self._columns(scores_TN)
        if columns is None:
            entries = torch.arange(first, first + count, device=scores_TN.device).expand(rows, -1)
            self._best.merge(scores_TN, entries)
        elif columns.shape[1]:
            self._best.merge(scores_TN.gather(1, columns), columns + first)

    def _columns(self, scores_TN: Tensor) -> Tensor | None:
        """Ascending columns [T, C] that hold all candidates of each row; None: not worth choosing."""
        rows, count = scores_TN.shape
        num_groups = count // GROUP
        if num_groups < 2:
            return None
        grouped = scores_TN[:, : num_groups * GROUP].view(rows, num_groups, GROUP)
        maxima_TG = grouped.amax(2)
        # Who stands beside a NaN has to be looked at.
        most_TG = _numbers(maxima_TG, nan=float("inf"))
        floor_T1 = most_TG.new_full((rows, 1), float("-inf"))
        if self._best.scores.shape[1] == self.k:
            # Equal scores go to the lower entry, so a later one must be above the least of k earlier ones.
            floor_T1 = _numbers(self._best.scores, nan=float("-inf")).amin(1, keepdim=True)
        candidates_TG = most_TG > floor_T1
        most = int(candidates_TG.sum(1).max())
        if self.k < most:
            # The k best groups hold k scores of at least their least maximum.
            least_TG = _numbers(maxima_TG, nan=float("-inf"))
            candidates_TG &= most_TG >= least_TG.topk(self.k, dim=1, sorted=False).values.amin(1, keepdim=True)
            most = int(candidates_TG.sum(1).max())
        if 2 * most > num_groups:
            return None
        chosen = most_TG.topk(most, dim=1, sorted=False).indices.sort(1).values
        offsets = torch.arange(GROUP, device=chosen.device)
        columns = (chosen.unsqueeze(2) * GROUP + offsets).flatten(1)
        rest = torch.arange(num_groups * GROUP, count, device=chosen.device).expand(rows, -1)
        return torch.cat([columns, rest], dim=1)


def _numbers(x: Tensor, *, nan: float) -> Tensor:
    return x.nan_to_num(nan=nan, posinf=float("inf"), neginf=float("-inf"))
