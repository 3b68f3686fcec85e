"""How hard a request asks the model to think: three spellings in, one answer out.

Source: DeepSeek's API and its reference encoder. Thinking is on by default, and an unset effort is `high`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Tier = Literal["low", "high", "max"]
EffortTable = Literal["release", "preview"]

TIERS: Mapping[str, Tier] = {
    "minimal": "low",
    "low": "low",
    "medium": "high",
    "high": "high",
    "xhigh": "high",
    "max": "max",
    "ultra": "max",
}
"""`reasoning_effort` as requested to the tier whose text the prompt carries; `none` turns thinking off."""

RENDERED_TIERS: Mapping[EffortTable, Mapping[Tier, Tier]] = {
    "release": {"low": "low", "high": "high", "max": "max"},
    # The preview weights know one text only, for `max`; the release weights call that text `high`.
    "preview": {"low": "low", "high": "low", "max": "high"},
}

_RELEASES = ("0731", "0813")
"""In the names of checkpoints with release weights,"""
_REPACKED = "dspark"
"""and in those of preview weights with the release's drafter."""
_NAMING_PARTS = 3
"""Last parts of a path that may name a checkpoint: a hub cache ends in `models--NAME/snapshots/REVISION`."""

_SWITCHES = {"enabled": True, "adaptive": True, "disabled": False}


class PromptError(ValueError):
    """A request that cannot become a prompt; `param` names the field in the words of the request."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


def table_of(model_dir: str, *, is_preview: bool) -> EffortTable:
    """The table of a checkpoint: by its name where that says it, else by its shape (`EngineInfo.is_preview`)."""
    name = "/".join(Path(model_dir).parts[-_NAMING_PARTS:]).lower()
    if any(release in name for release in _RELEASES):
        return "release"
    return "preview" if is_preview or _REPACKED in name else "release"


def resolve_thinking(
    thinking: Any, reasoning_effort: Any, chat_template_kwargs: Any = None
) -> tuple[bool, Tier | None]:
    """(thinking, tier): whether the model thinks and, if it does, how hard.

    `thinking` is DeepSeek's {"type": "enabled" | "adaptive" | "disabled"}; `chat_template_kwargs` may hold `thinking`
    or `enable_thinking` (booleans) and `reasoning_effort`. None is absent. The request's own fields win over
    `chat_template_kwargs`, and a switch wins over an effort: disabled ignores the effort, enabled with effort `none`
    thinks at `high`. Raises PromptError.
    """
    kwargs = chat_template_kwargs if chat_template_kwargs is not None else {}
    if not isinstance(kwargs, Mapping):
        raise PromptError("chat_template_kwargs must be an object", "chat_template_kwargs")
    effort, effort_param = reasoning_effort, "reasoning_effort"
    if effort is None:
        effort, effort_param = kwargs.get("reasoning_effort"), "chat_template_kwargs.reasoning_effort"
    if effort is not None and (not isinstance(effort, str) or (effort != "none" and effort not in TIERS)):
        choices = ", ".join(["none", *TIERS])
        raise PromptError(f"{effort_param} must be one of {choices}; found {effort!r:.80}", effort_param)
    switch = _switch(thinking, kwargs)
    if switch is False or (switch is None and effort == "none"):
        return False, None
    return True, "high" if effort is None or effort == "none" else TIERS[effort]


def _switch(thinking: Any, kwargs: Mapping[str, Any]) -> bool | None:
    if thinking is not None:
        kind = thinking.get("type") if isinstance(thinking, Mapping) else None
        if not isinstance(kind, str) or kind not in _SWITCHES:
            raise PromptError('thinking must be {"type": "enabled"} or {"type": "disabled"}', "thinking")
        return _SWITCHES[kind]
    for name in ("thinking", "enable_thinking"):
        value = kwargs.get(name)
        if value is None:
            continue
        if not isinstance(value, bool):
            raise PromptError(f"chat_template_kwargs.{name} must be true or false", f"chat_template_kwargs.{name}")
        return value
    return None
