"""All tasks by name, and the one way to make an example of one."""

import random
from collections.abc import Callable, Mapping

from embedded.data import arithmetic, chat, recall, structured, tool_calls, tool_results, transform
from embedded.data.example import Example
from embedded.data.seeds import generator

Task = Callable[[random.Random, int | None], Example]

TASKS: Mapping[str, Task] = {
    "recall_list": recall.recall_list,
    "recall_list_turns": recall.recall_list_turns,
    "recall_haystack": recall.recall_haystack,
    "recall_haystack_turns": recall.recall_haystack_turns,
    "unknown": recall.unknown,
    "arithmetic": arithmetic.arithmetic,
    "arithmetic_direct": arithmetic.arithmetic_direct,
    "repeat": transform.repeat,
    "transform": transform.transform,
    "tool_call": tool_calls.tool_call,
    "tool_calls": tool_calls.tool_calls,
    "tool_none": tool_calls.tool_none,
    "tool_result": tool_results.tool_result,
    "tool_results": tool_results.tool_results,
    "json": structured.structured,
    "chat": chat.chat,
    "chat_system": chat.chat_system,
    "world": chat.world,
}

LONG_TASKS = ("recall_list", "recall_list_turns", "recall_haystack", "recall_haystack_turns", "unknown")
"""Tasks that follow `num_tokens`."""


def make(task: str, seed: int, index: int, *, num_tokens: int | None = None) -> Example:
    """Example `index` of a task, the same on every machine.

    `num_tokens` is about how long the messages are in tokens of the embedded tokenizer (96 .. 131072), for LONG_TASKS;
    the effort text of a thinking request comes on top. Raises KeyError for a task that is none and ValueError for a
    length out of range.
    """
    return TASKS[task](generator(f"{task}:{seed}:{index}"), num_tokens)
