"""What a stage of the training reads: tasks in what shares, and how long the long ones are."""

from collections.abc import Mapping
from dataclasses import dataclass

from embedded.data.example import Example
from embedded.data.seeds import check_training_seed, generator
from embedded.data.tasks import LONG_TASKS, make


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    """Part of what examples are drawn by."""
    row_tokens: int
    weights: Mapping[str, float]
    """By task; shares of examples, not of tokens."""
    lengths: tuple[int, int]
    """`num_tokens` of LONG_TASKS: an octave, then evenly within it."""


_SHORT_TASKS: Mapping[str, float] = {
    "arithmetic": 14,
    "arithmetic_direct": 4,
    "repeat": 7,
    "transform": 7,
    "tool_call": 9,
    "tool_calls": 6,
    "tool_none": 3,
    "tool_result": 6,
    "tool_results": 3,
    "json": 8,
    "chat": 6,
    "chat_system": 4,
    "world": 2,
}


def _weights(short: float, lists: float, haystacks: float, unknown: float) -> dict[str, float]:
    weights = {task: weight * short for task, weight in _SHORT_TASKS.items()}
    return weights | {
        "recall_list": lists / 3,
        "recall_list_turns": lists * 2 / 3,
        "recall_haystack": haystacks / 3,
        "recall_haystack_turns": haystacks * 2 / 3,
        "unknown": unknown,
    }


STAGES: Mapping[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("short", 1024, _weights(1.0, 14, 8, 4), (96, 767)),
        Stage("medium", 4096, _weights(0.6, 14, 18, 4), (128, 3800)),
        Stage("long", 8192, _weights(0.5, 14, 24, 4), (128, 7900)),
    )
}


def example_at(stage: Stage, seed: int, index: int) -> Example:
    """Example `index` of a stage. Raises ValueError for a seed of the evaluations."""
    check_training_seed(seed)
    rng = generator(f"mixture:{stage.name}:{seed}:{index}")
    (task,) = rng.choices(list(stage.weights), list(stage.weights.values()))
    if task not in LONG_TASKS:
        return make(task, seed, index)
    low, high = stage.lengths
    # In whole numbers: a logarithm may differ between machines.
    octave = rng.randrange((high // low).bit_length())
    num_tokens = rng.randint(low << octave, min(high, (low << octave + 1) - 1))
    return make(task, seed, index, num_tokens=num_tokens)
