"""Messages of the Anthropic API to messages of a chat.

The rules are those of DeepSeek's own endpoint, but for a final assistant message: it is continued, as Anthropic does.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from server.errors import bad_request, echo
from server.protocol.members import as_object, member, not_supported, one_of, required
from server.protocol.sealed import unseal

_BILLING = "x-anthropic-billing-header:"
"""Agents put a block that begins so, and changes with every request, before their system prompt: it would cost the
prefix cache."""
_UNSEEN = {"image": "[Unsupported Image]", "document": "[Unsupported Document]"}
"""What stands in a tool's result for what the model cannot see: a refusal would end an agent's whole conversation."""


def system_text(system: str | list[Any] | None) -> str | None:
    """The system prompt. Raises ApiError 400 with `param`."""
    if system is None or isinstance(system, str):
        return system
    texts = [_text_of(block, f"system[{n}]") for n, block in enumerate(system)]
    return "\n\n".join(text for text in texts if not text.startswith(_BILLING))


def to_messages(given: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages in the shape of chat completions; a final assistant message has `prefix`.

    Raises:
        ApiError: 400 with `param`.
    """
    messages: list[dict[str, Any]] = []
    waiting: list[str] = []
    for n, value in enumerate(given):
        param = f"messages[{n}]"
        message = as_object(value, param)
        role = one_of(message.get("role"), ("user", "assistant", "system"), f"{param}.role")
        blocks = _blocks(message.get("content"), param)
        if role == "user":
            found, answered = _user(blocks, param, waiting)
            _check_answered(waiting, answered, n)
            waiting = []
        else:
            _check_answered(waiting, [], n)
            found = [_assistant(blocks, param)] if role == "assistant" else [_reminder(blocks, param)]
            waiting = [call["id"] for call in found[0].get("tool_calls", ())]
        messages += found
    _check_answered(waiting, [], len(given))
    if messages and messages[-1]["role"] == "assistant":
        messages[-1]["prefix"] = True
    return messages


def _check_answered(waiting: Sequence[str], answered: Sequence[str], n: int) -> None:
    missing = [call_id for call_id in waiting if call_id not in answered]
    if missing:
        message = (
            f"messages.{n}: `tool_use` ids were found without `tool_result` blocks immediately after: "
            f"{echo(', '.join(missing))}. Each `tool_use` block must have a corresponding `tool_result` block in the "
            "next message."
        )
        raise bad_request(message, param=f"messages[{n}]")


def _blocks(content: Any, param: str) -> list[Mapping[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise bad_request(f"{param}.content must be a string or a list of blocks.", param=f"{param}.content")
    if not content:
        raise bad_request(f"{param}: all messages must have non-empty content.", param=f"{param}.content")
    return [as_object(block, f"{param}.content[{n}]") for n, block in enumerate(content)]


def _user(
    blocks: Sequence[Mapping[str, Any]], param: str, waiting: Sequence[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """(messages, ids of the results): results first, for they belong to the calls before them."""
    messages: list[dict[str, Any]] = []
    answered: list[str] = []
    texts: list[str] = []
    for n, block in enumerate(blocks):
        place = f"{param}.content[{n}]"
        kind = required(block, "type", str, place)
        if kind == "tool_result":
            call_id = required(block, "tool_use_id", str, place)
            if call_id not in waiting:
                message = (
                    f"{place}: unexpected `tool_use_id` found in `tool_result` blocks: {echo(call_id)}. Each "
                    "`tool_result` block must have a corresponding `tool_use` block in the previous message."
                )
                raise bad_request(message, param=f"{place}.tool_use_id")
            if texts:
                message = f"{place}: `tool_result` blocks must come before all other blocks of a message."
                raise bad_request(message, param=place)
            answered.append(call_id)
            messages.append({"role": "tool", "tool_call_id": call_id, "content": _result(block, place)})
        else:
            texts.append(_user_text(block, kind, place))
    if texts:
        messages.append({"role": "user", "content": _joined(texts)})
    return messages, answered


def _user_text(block: Mapping[str, Any], kind: str, place: str) -> str:
    match kind:
        case "text":
            return required(block, "text", str, place)
        case "document":
            return _document(block, place)
        case "search_result":
            head = [required(block, name, str, place) for name in ("title", "source")]
            parts = required(block, "content", list, place)
            return "\n".join([*head, *(_text_of(part, f"{place}.content[{n}]") for n, part in enumerate(parts))])
        case _:
            raise not_supported(kind, f"{place}.type")


def _document(block: Mapping[str, Any], place: str) -> str:
    """A document that is text, under its title; others are refused."""
    source = required(block, "source", dict, place)
    title = member(block, "title", str, place, "")
    context = member(block, "context", str, place, "")
    match source.get("type"):
        case "text":
            text = required(source, "data", str, f"{place}.source")
        case "content":
            content = source.get("content")
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if not isinstance(parts, list):
                raise bad_request(f"{place}.source.content must be a string or a list.", param=f"{place}.source")
            text = _joined([_text_of(part, f"{place}.source.content[{n}]") for n, part in enumerate(parts)])
        case kind:
            raise not_supported(kind, f"{place}.source.type")
    return "\n".join(part for part in (title, context, text) if part)


def _result(block: Mapping[str, Any], place: str) -> str:
    """Text of a tool's result; `is_error` changes nothing, for the text says so."""
    member(block, "is_error", bool, place, False)
    content = block.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise bad_request(f"{place}.content must be a string or a list of blocks.", param=f"{place}.content")
    texts = []
    for n, value in enumerate(content):
        inner = f"{place}.content[{n}]"
        part = as_object(value, inner)
        kind = required(part, "type", str, inner)
        source = part.get("source")
        is_text = isinstance(source, Mapping) and source.get("type") in ("text", "content")
        if kind in _UNSEEN and not (kind == "document" and is_text):
            texts.append(_UNSEEN[kind])
        elif kind == "tool_reference":
            texts.append(required(part, "tool_name", str, inner))
        else:
            texts.append(_user_text(part, kind, inner))
    return _joined(texts)


def _reminder(blocks: Sequence[Mapping[str, Any]], param: str) -> dict[str, Any]:
    """A system message amid the conversation: V4 has no place for one, so the user passes it on."""
    texts = [_text_of(block, f"{param}.content[{n}]") for n, block in enumerate(blocks)]
    return {"role": "user", "content": f"<system-reminder>\n{_joined(texts)}\n</system-reminder>"}


def _assistant(blocks: Sequence[Mapping[str, Any]], param: str) -> dict[str, Any]:
    thoughts: list[str] = []
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for n, block in enumerate(blocks):
        place = f"{param}.content[{n}]"
        match required(block, "type", str, place):
            case "text":
                texts.append(required(block, "text", str, place))
            case "thinking":
                text = required(block, "thinking", str, place)
                # Thinking that was asked to be omitted is in its signature.
                thoughts.append(text or unseal(member(block, "signature", str, place, "")) or "")
            case "tool_use":
                arguments = json.dumps(required(block, "input", dict, place), ensure_ascii=False)
                function = {"name": required(block, "name", str, place), "arguments": arguments}
                calls.append({"id": required(block, "id", str, place), "type": "function", "function": function})
            case kind:
                raise not_supported(kind, f"{place}.type")
    message: dict[str, Any] = {"role": "assistant", "content": _joined(texts)}
    if thoughts:
        message["reasoning_content"] = "\n\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _text_of(value: Any, place: str) -> str:
    block = as_object(value, place)
    if block.get("type") != "text":
        raise not_supported(block.get("type"), f"{place}.type")
    return required(block, "text", str, place)


def _joined(texts: Sequence[str]) -> str:
    return "\n\n".join(text for text in texts if text)
