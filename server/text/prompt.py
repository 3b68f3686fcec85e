"""A conversation to the ids the model reads.

DeepSeek's own library validates and renders; what it marks as special tokens are looked up by name here, and all text
between them is encoded without the added vocabulary. A user who types `<｜User｜>` sends ordinary tokens.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import deepseek_recipe
import numpy as np

from server.text.calls import DSML
from server.text.effort import RENDERED_TIERS, TIERS, EffortTable, PromptError
from server.text.tokenizer import Tokenizer

__all__ = ["Prompt", "PromptError", "render_chat"]

_MODEL = "DeepSeek-V4-Pro"  # the library's name for the V4 format, of Flash and Pro alike
ASSISTANT = "<｜Assistant｜>"
EOS = "<｜end▁of▁sentence｜>"
_ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")
_MOST_MESSAGE_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: np.ndarray
    """int32, one dimension."""
    text: str
    """The rendered prompt, special tokens spelled out. Where turns stand as they were sampled, or the ids were
    truncated, theirs is another text."""
    thinking: bool
    starts_in: Literal["reasoning", "content", "calls"]
    """What the first generated token belongs to."""
    continues: bool = False
    """The prompt ends inside a message (`prefix`), so leading newlines of the answer are part of it."""
    turn_start: int = 0
    """Position of the token that opens the last assistant turn: the next prompt of the conversation begins with the
    tokens before it, whatever becomes of this turn's reasoning."""


class FindsTurns(Protocol):
    """Knows how turns of the history were sampled (server.turns)."""

    def find(self, message: Mapping[str, Any], opening: int, prefix: bytes) -> np.ndarray | None: ...


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: bool,
    reasoning_effort: str | None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: Any = None,
    response_format: Any = None,
    effort_table: EffortTable = "release",
    turns: FindsTurns | None = None,
) -> Prompt:
    """Render and encode `messages` (OpenAI's shape) for generation.

    Contents are strings or lists of text parts, which two newlines join. `developer` messages are system messages, and
    all system messages stand at the top. An assistant's earlier thinking is read from `reasoning_content`, `reasoning`
    or `thinking`. `prefix: true` on the last assistant message continues it. `name` has no effect.
    `reasoning_effort` counts when thinking (None: high). An assistant's turn that `turns` knows stands in the ids as it
    was sampled. Raises PromptError with `param`.
    """
    if reasoning_effort is not None and reasoning_effort not in TIERS:
        raise PromptError(f"reasoning_effort must be one of {', '.join(TIERS)}", "reasoning_effort")
    tier = TIERS[reasoning_effort or "high"]
    body: dict[str, Any] = {
        "model": _MODEL,
        "messages": [_message(message, f"messages[{n}]") for n, message in enumerate(messages)],
        "thinking": {"type": "enabled" if thinking else "disabled"},
        "reasoning_effort": RENDERED_TIERS[effort_table][tier],
        "tools": None if tools is None else [_lenient(tool) for tool in tools],
        "tool_choice": tool_choice,
        "response_format": response_format,
    }
    present = {key: value for key, value in body.items() if value is not None}
    request = _convert(present)
    rendered = deepseek_recipe.DeepseekV4Encoding().render_conversation(request.conversation)
    options = request.parsing_options
    stage = options.thinking_initial_stage
    starts_in: Literal["reasoning", "content", "calls"] = "content"
    if options.starts_in_tool_calls:
        starts_in = "calls"
    elif stage is not None and stage.starts_in_reasoning():
        starts_in = "reasoning"
    names, plain = _parts(rendered.prompt, rendered.special_ranges)
    history = [] if turns is None else [m for m in body["messages"] if m["role"] == "assistant" and not m.get("prefix")]
    token_ids = _encode(tokenizer, names, plain, history, turns)
    opened = np.flatnonzero(token_ids == tokenizer.required_id(ASSISTANT))
    return Prompt(
        token_ids=token_ids,
        text=rendered.prompt,
        thinking=thinking,
        starts_in=starts_in,
        continues=_continues(body["messages"][-1], thinking),
        turn_start=int(opened[-1]) if len(opened) else 0,
    )


def _convert(body: dict[str, Any]) -> deepseek_recipe.ConversationRequest:
    try:
        return deepseek_recipe.ChatCompletionRequest(body).convert(deepseek_recipe.ConversionOptions())
    except UnicodeEncodeError as error:
        raise PromptError("The text holds half of a surrogate pair, which is not Unicode.", "messages") from error
    except (deepseek_recipe.ConversionError, ValueError, TypeError) as error:
        message = str(error).removeprefix("invalid request body: ")
        raise PromptError(_shortened(message), _blamed_param(message)) from error


def _parts(text: str, special_ranges: Sequence[tuple[int, int]]) -> tuple[list[str], list[str]]:
    """Special tokens, and the plain texts in front of each and behind the last."""
    names, plain = [], []
    end = 0
    for start, stop in special_ranges:
        plain.append(text[end:start])
        names.append(text[start:stop])
        end = stop
    return names, [*plain, text[end:]]


def _encode(
    tokenizer: Tokenizer,
    names: Sequence[str],
    plain: Sequence[str],
    history: Sequence[Mapping[str, Any]],
    turns: FindsTurns | None,
) -> np.ndarray:
    """int32 ids: special tokens where the renderer put them, plain text between, and known turns as they were sampled.

    `history` are the assistant's messages, each of which is rendered from `<｜Assistant｜>` to EOS.
    """
    special = [_special_id(tokenizer, name) for name in names]
    encoded = tokenizer.encode_plain_batch(plain)
    closed = [n for n, name in enumerate(names) if name == EOS]
    ids: list[int] = []
    prefix, num_hashed = hashlib.blake2b(digest_size=16), 0
    message = n = 0
    while n < len(special):
        ids += encoded[n]
        ids.append(special[n])
        if names[n] == ASSISTANT and turns is not None and message < len(history):
            prefix.update(np.asarray(ids[num_hashed:], dtype="<i4").tobytes())
            num_hashed = len(ids)
            sampled = turns.find(history[message], special[n + 1], prefix.digest())
            if sampled is not None:
                ids += sampled.tolist()
                n = closed[message]
            message += 1
        n += 1
    return np.array(ids + encoded[-1], dtype=np.int32)


def _special_id(tokenizer: Tokenizer, name: str) -> int:
    token_id = tokenizer.special_id(name)
    if token_id is None:
        raise PromptError(f"This model's tokenizer has no {name} token.", "tools" if name == DSML else "messages")
    return token_id


def _message(message: Any, param: str) -> dict[str, Any]:
    """The fields the library knows, types checked."""
    if not isinstance(message, Mapping):
        raise PromptError(f"{param} must be an object", param)
    role = message.get("role")
    if role not in _ROLES:
        raise PromptError(f"{param}.role must be one of {', '.join(_ROLES)}; found {role!r:.80}", f"{param}.role")
    cleaned: dict[str, Any] = {"role": "system" if role == "developer" else role}
    content = message.get("content")
    if content is not None:
        cleaned["content"] = _text(content, f"{param}.content", thoughts=role == "assistant")
    elif role != "assistant":
        raise PromptError(f"{param}.content is required", f"{param}.content")
    elif not message.get("tool_calls"):
        raise PromptError("Invalid assistant message: content or tool_calls must be set", f"{param}.content")
    if role == "assistant":
        _assistant_fields(message, cleaned, param)
    if role == "tool":
        cleaned["tool_call_id"] = message.get("tool_call_id")
        if not isinstance(cleaned["tool_call_id"], str):
            raise PromptError(f"{param}.tool_call_id must be a string", f"{param}.tool_call_id")
    return cleaned


def _assistant_fields(message: Mapping[str, Any], cleaned: dict[str, Any], param: str) -> None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        reasoning = message.get(name)
        if reasoning is None:
            continue
        if not isinstance(reasoning, str):
            raise PromptError(f"{param}.{name} must be a string", f"{param}.{name}")
        cleaned["reasoning_content"] = _unicode(reasoning, f"{param}.{name}")
        break
    else:
        blocks = [part for part in _blocks(message) if _thought(part) is not None]
        if blocks:
            thoughts = [_unicode(_thought(part) or "", param) for part in blocks]
            cleaned["reasoning_content"] = "".join(thoughts)
    prefix = message.get("prefix")
    if prefix is not None:
        if not isinstance(prefix, bool):
            raise PromptError(f"{param}.prefix must be true or false", f"{param}.prefix")
        cleaned["prefix"] = prefix
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            raise PromptError(f"{param}.tool_calls must be a list", f"{param}.tool_calls")
        cleaned["tool_calls"] = calls


def _blocks(message: Mapping[str, Any]) -> list[Any]:
    """What may hold an assistant's thinking: `thinking_blocks` (LiteLLM's) and parts of the content."""
    found = []
    for name in ("thinking_blocks", "content"):
        parts = message.get(name)
        found += parts if isinstance(parts, list) else []
        if any(_thought(part) is not None for part in found):
            break
    return found


def _thought(part: Any) -> str | None:
    """The text of a block of type `thinking` or `reasoning`; None for any other part."""
    if not isinstance(part, Mapping) or part.get("type") not in ("thinking", "reasoning"):
        return None
    text = part.get("thinking", part.get("text", part.get("reasoning")))
    return text if isinstance(text, str) else ""


def _text(content: Any, param: str, *, thoughts: bool = False) -> str:
    """What is said; `thoughts`: parts that hold thinking are allowed, and are not said."""
    if isinstance(content, str):
        return _unicode(content, param)
    if not isinstance(content, list):
        raise PromptError(f"{param} must be a string or a list of text parts", param)
    texts = []
    for n, part in enumerate(content):
        place = f"{param}[{n}]"
        if not isinstance(part, Mapping):
            raise PromptError(f"{place} must be an object", place)
        if thoughts and _thought(part) is not None:
            continue
        if part.get("type") != "text":
            raise PromptError(f"{place}.type: only text parts are supported; found {part.get('type')!r:.80}", place)
        if not isinstance(part.get("text"), str):
            raise PromptError(f"{place}.text must be a string", f"{place}.text")
        texts.append(_unicode(part["text"], f"{place}.text"))
    return "\n\n".join(texts)


def _unicode(text: str, param: str) -> str:
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{param} holds half of a surrogate pair, which is not Unicode", param) from error
    return text


def _lenient(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A strict tool as a free one with the schema that a strict one shows.

    The library normalises strict schemas, and refuses a request with both kinds and keywords of its own choice; what is
    enforced is not its business. A schema that it would refuse is shown as it stands.
    """
    function = tool.get("function")
    if not isinstance(function, Mapping) or function.get("strict") is not True:
        return tool
    free = {key: value for key, value in function.items() if key != "strict"}
    strict = {**function, "parameters": _with_def(function.get("parameters"))}
    body = {
        "model": _MODEL,
        "messages": [{"role": "user", "content": ""}],
        "tools": [{"type": "function", "function": strict}],
    }
    try:
        (shown,) = _convert(body).conversation.tools
    except PromptError:
        return {**tool, "function": free}
    return {**tool, "function": {**free, "parameters": shown.parameters}}


def _with_def(schema: Any) -> Any:
    """`$defs` under the name that the library keeps."""
    if isinstance(schema, list):
        return [_with_def(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    renamed = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str):
            value = value.replace("#/$defs/", "#/$def/")
        renamed["$def" if key == "$defs" else key] = _with_def(value)
    return renamed


def _continues(last: Mapping[str, Any], thinking: bool) -> bool:
    """Whether a cleaned last message leaves the answer in the middle of a text."""
    if not last.get("prefix"):
        return False
    return bool(last["content"]) or (thinking and bool(last.get("reasoning_content")))


def _blamed_param(message: str) -> str:
    """The library reports no field; its texts name the tools, the format or else a message."""
    lowered = message.lower()
    if "tool_choice" in lowered or "'tool_call'" in lowered:
        return "tool_choice"
    if "response_format" in lowered:
        return "response_format"
    return "messages" if "message" in lowered or "tool" not in lowered else "tools"


def _shortened(message: str) -> str:
    return message if len(message) <= _MOST_MESSAGE_CHARACTERS else message[:_MOST_MESSAGE_CHARACTERS] + "..."
