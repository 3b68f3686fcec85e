"""The k best of a row under one tie rule, whatever the shape around it."""

from torch import Tensor


def select(scores_TN: Tensor, k: int) -> Tensor:
    """Columns [T, k] of the k highest scores, ascending; of equal scores the lower column. Needs N >= k."""
    # A NaN equals no threshold; its row, broken as it is, must still choose k columns or it breaks the whole step.
    scores_TN = scores_TN.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    threshold = scores_TN.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, level = scores_TN > threshold, scores_TN == threshold
    room = k - above.sum(1, keepdim=True)
    kept = above | (level & (level.cumsum(1) <= room))
    # Every row keeps exactly k columns, so the flat list of kept positions is a rectangle.
    return kept.nonzero()[:, 1].view(-1, k)
