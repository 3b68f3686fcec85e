"""What the embedded model learns and is measured on: a request and the answer that is right.

    Example   what a client sends (`body()`: /v1/chat/completions without model and sampling) and the Answer
    make      (task, seed, index) -> Example, the same on every machine: nothing but these numbers decides

Training reads examples as token ids with weights (`embedded.data.render`), the evaluation sends their bodies over HTTP.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A tool call."""

    name: str
    arguments: Mapping[str, Any]
    """In the order in which they are written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the assistant should say."""

    content: str = ""
    reasoning: str | None = None
    """None exactly where the example does not think."""
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One request and its answer. Messages have OpenAI's shape; earlier assistant turns are right as well."""

    task: str
    messages: tuple[Mapping[str, Any], ...]
    answer: Answer
    tools: tuple[Mapping[str, Any], ...] = ()
    response_format: Mapping[str, Any] | None = None
    thinking: bool = False
    effort: str | None = None
    """`reasoning_effort`; None leaves it out, and the server takes its own."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What an evaluation groups by, such as `depth` (0 .. 1 of the haystack)."""

    def body(self) -> dict[str, Any]:
        """The fields of a request."""
        body: dict[str, Any] = {
            "messages": [dict(message) for message in self.messages],
            "thinking": {"type": "enabled" if self.thinking else "disabled"},
        }
        if self.tools:
            body["tools"] = [dict(tool) for tool in self.tools]
        if self.response_format is not None:
            body["response_format"] = dict(self.response_format)
        if self.effort is not None:
            body["reasoning_effort"] = self.effort
        return body
