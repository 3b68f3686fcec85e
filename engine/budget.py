"""How many rows one step may hold, and where a prompt is cut."""

from model.config import HCA_RATIO


class TokenBudget:
    """Rows left in the step under construction."""

    def __init__(self, num_tokens: int) -> None:
        assert num_tokens >= 1
        self.remaining = num_tokens

    def take(self, start: int, wanted: int) -> int:
        """Grant up to `wanted` rows of a request whose next position is `start`; 0 only when nothing is left.

        A chunk that is not the last one ends at a multiple of 128 where one is within reach: there the HCA
        accumulators are empty and a saved state is smallest. The rows that this leaves go to the next request.
        """
        granted = min(wanted, self.remaining)
        if granted < wanted:
            aligned = (start + granted) // HCA_RATIO * HCA_RATIO - start
            if aligned > 0:
                granted = aligned
        self.remaining -= granted
        return granted
