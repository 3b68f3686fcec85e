"""Running totals of one engine, and the frame of gauges made of them."""

from dataclasses import dataclass

from engine.messages import EngineStats


@dataclass(slots=True, kw_only=True)
class Totals:
    """Counted since the engine started."""

    prompt_tokens: int = 0
    """Prompt rows computed."""
    generation_tokens: int = 0
    num_dropped_results: int = 0
    """Tokens that came back for requests that had ended meanwhile."""
    step_id: int = 0
    step_seconds: float = 0.0
    step_tokens: int = 0

    def frame(self, *, num_running: int, num_waiting: int, num_free_pages: int, num_free_slots: int) -> EngineStats:
        return EngineStats(
            step_id=self.step_id,
            num_running=num_running,
            num_waiting=num_waiting,
            num_free_pages=num_free_pages,
            num_free_slots=num_free_slots,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            step_seconds=self.step_seconds,
            step_tokens=self.step_tokens,
        )
