"""What one step may hold: rows, which are memory, and predicted seconds; and where a prompt is cut."""

from engine.cost_model import CostModel, StepFeatures
from engine.policy import LEAST_CHUNK
from model.config import HCA_RATIO


class StepBudget:
    """Rows and seconds left in the step under construction. Decode rows are added first and always."""

    def __init__(self, costs: CostModel, num_rows: int) -> None:
        assert num_rows >= 1
        self.rows_left = num_rows
        self.features = StepFeatures()
        self.prefill_seconds = 0.0
        """What prompts may take in all; set by `open_prefill`."""
        self._costs = costs
        self._predicted = 0.0
        self._limit = 0.0

    @property
    def predicted_seconds(self) -> float:
        """Of the step as it stands."""
        return self._predicted

    @property
    def seconds_left(self) -> float:
        return self._limit - self._predicted

    def add_decodes(self, num_rows: int, context: int) -> float:
        """Add one row of each of `num_rows` requests that see `context` tokens together; returns their seconds."""
        assert num_rows <= self.rows_left, "more decode rows than a step holds"
        self.rows_left -= num_rows
        self.features.num_requests += num_rows
        self.features.num_decode_rows += num_rows
        self.features.decode_context += context
        self._predicted = self._costs.predict(self.features)
        return self._predicted

    def open_prefill(self, seconds: float) -> None:
        """Prompts may take `seconds` more than what the step holds now."""
        self.prefill_seconds = seconds
        self._limit = self._predicted + seconds

    def rows_for(self, start: int, wanted: int, *, seconds_kept: float = 0.0, rows_kept: int = 0) -> int:
        """Rows that a prompt whose next position is `start` can have of the `wanted` ones, leaving what is kept.

        A chunk that is not the last one ends at a multiple of 128 where one is within reach: there the HCA
        accumulators are empty and a saved state is smallest. A chunk is never less than `LEAST_CHUNK` rows unless it
        is the last one: others wait for a better step, and the first one of a step gets them even if the model
        despairs, so that a step gets somewhere.
        """
        most = min(wanted, self.rows_left - rows_kept)
        if most <= 0 or seconds_kept >= self.seconds_left:
            return 0
        first = self.features.num_prefill_rows == 0
        granted = self._costs.rows_within(self.features, start, most, self._limit - seconds_kept)
        if first:
            granted = max(granted, min(most, LEAST_CHUNK))
        if granted < wanted:
            aligned = (start + granted) // HCA_RATIO * HCA_RATIO - start
            if aligned > 0:
                return aligned
            return granted if first or granted >= LEAST_CHUNK else 0
        return granted

    def add_replay(self, position: int) -> None:
        """A slot is rebuilt before the rows."""
        self.features.add_replay(self._costs.replay_rows(position), position)
        self._predicted = self._costs.predict(self.features)

    def spend(self, seconds: float) -> None:
        """Something beside rows takes a part of the prompts' seconds."""
        self._limit -= seconds

    def take(self, start: int, num_rows: int) -> float:
        """Add a chunk; returns the seconds by which it lengthens the step."""
        assert 0 < num_rows <= self.rows_left
        before = self._predicted
        self.rows_left -= num_rows
        self.features.add_prefill(start, num_rows)
        self._predicted = self._costs.predict(self.features)
        return self._predicted - before
