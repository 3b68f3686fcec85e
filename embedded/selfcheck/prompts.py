"""What selfcheck asks: a prompt of every kind. The answers of the shipped model stand in a file beside it."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedded.data.tasks import make
from embedded.evaluation.client import Reply

EXPECTED_FILE = "expected.json"
FORMAT = 1
NUM_RANDOM_TOKENS = 12
"""Of each answer of a model whose answers mean nothing,"""
MOST_TOKENS = 256
"""and of one whose answers end."""
SEED = (1 << 31) + 9
_TASKS: tuple[tuple[str, int | None], ...] = (
    # Some prompts span several pages and many steps.
    ("recall_haystack", 400),
    ("recall_list", 200),
    ("recall_list_turns", 128),
    ("unknown", 100),
    ("arithmetic", None),
    ("repeat", None),
    ("tool_call", None),
    ("tool_calls", None),
    ("tool_result", None),
    ("json", None),
    ("chat", None),
    ("chat_system", None),
)


@dataclass(frozen=True, slots=True)
class SuitePrompt:
    name: str
    body: Mapping[str, Any]
    """Of a chat completion, `max_tokens` included."""
    expected: Mapping[str, Any] | None = None
    """`answer_of` the right reply; None where the model's answers mean nothing."""

    @property
    def is_plain(self) -> bool:
        """No grammar may say what comes next."""
        return not self.body.get("tools") and "response_format" not in self.body


def built_in_prompts(max_tokens: int = NUM_RANDOM_TOKENS) -> list[SuitePrompt]:
    """One held-out example of each task."""
    return [
        SuitePrompt(task, {**make(task, SEED, n, num_tokens=num_tokens).body(), "max_tokens": max_tokens})
        for n, (task, num_tokens) in enumerate(_TASKS)
    ]


def answer_of(reply: Reply) -> dict[str, Any]:
    """What a person sees of a reply; arguments as values."""
    return {
        "content": reply.content,
        "reasoning": reply.reasoning,
        "calls": [[name, json.loads(arguments)] for name, arguments in reply.calls],
    }


def load_prompts(model_dir: Path | None) -> list[SuitePrompt]:
    """The prompts of the model's file of expected answers, else the built-in ones, which expect nothing.

    Raises:
        ValueError: the file is not one that `save_prompts` has written.
    """
    path = None if model_dir is None else model_dir / EXPECTED_FILE
    if path is None or not path.exists():
        return built_in_prompts()
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']}")
        return [SuitePrompt(entry["name"], dict(entry["body"]), dict(entry["answer"])) for entry in raw["prompts"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a file of expected answers ({error!r})") from None


def save_prompts(model_dir: Path, prompts: Sequence[SuitePrompt], replies: Sequence[Reply]) -> Path:
    """Write the prompts with these replies as the expected ones; returns the file."""
    path = model_dir / EXPECTED_FILE
    entries = [
        {"name": prompt.name, "body": dict(prompt.body), "answer": answer_of(reply)}
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    temporary = path.with_name(path.name + ".new")
    text = json.dumps({"format": FORMAT, "prompts": entries}, ensure_ascii=False, indent=1)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path
