"""Input items of /v1/responses: to messages of a chat, and to the form in which they are listed.

The rules are those of DeepSeek's own endpoint: `developer` is a user, reasoning joins the message and the calls that
follow it into one turn of the assistant.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from server.errors import ApiError, bad_request, echo
from server.protocol.members import as_object, member, not_supported, one_of, required
from server.protocol.responses_tools import custom_arguments, flat_name
from server.protocol.sealed import unseal

DROPPED_ITEMS = frozenset({"web_search_call", "image_generation_call"})
"""Traces of tools that other servers ran; the model is not told of them."""
_TOOL_ITEMS = ("additional_tools", "tool_search_output")
_TEXT_OF = {"input_text": "text", "output_text": "text", "text": "text"}
"""Types of parts to the member that holds their text."""
_UNSEEN = {"input_image": "[Unsupported Image]", "input_file": "[Unsupported File]"}
"""What stands in a tool's result for what the model cannot see: a refusal would end an agent's whole conversation."""


def to_messages(items: Sequence[Any], *, num_earlier: int = 0) -> list[dict[str, Any]]:
    """Messages in the shape of chat completions. The first `num_earlier` items come from a stored response.

    Raises:
        ApiError: 400 with `param`.
    """
    turns = _Turns()
    for n, item in enumerate(items):
        turns.add(item, f"input[{n - num_earlier}]" if n >= num_earlier else "previous_response_id")
    turns.close()
    return turns.messages


def later_tools(items: Sequence[Any]) -> list[Any]:
    """Tools that items bring into the conversation."""
    return [
        tool
        for item in items
        if isinstance(item, Mapping) and item.get("type") in _TOOL_ITEMS and isinstance(item.get("tools"), list)
        for tool in item["tools"]
    ]


def listed(items: Sequence[Any], suffix: str) -> list[dict[str, Any]]:
    """Checked items with everything that a listing shows: an id, a status, content as parts."""
    return [_listed(dict(item), f"{suffix}_{n}") for n, item in enumerate(items)]


def _listed(item: dict[str, Any], suffix: str) -> dict[str, Any]:
    kind = item.get("type") or "message"
    item["type"] = kind
    if not isinstance(item.get("id"), str):
        item["id"] = f"{_ID_PREFIX.get(kind, 'item')}_{suffix}"
    if kind == "message":
        item.setdefault("status", "completed")
        if isinstance(item["content"], str):
            text = item["content"]
            part = (
                {"type": "output_text", "text": text, "annotations": []}
                if item["role"] == "assistant"
                else {"type": "input_text", "text": text}
            )
            item["content"] = [part]
    elif kind != "reasoning":
        item.setdefault("status", "completed")
    return item


_ID_PREFIX = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "local_shell_call": "lsh",
    "tool_search_call": "tsc",
    "tool_search_output": "tso",
}


class _Turns:
    """Messages, and the assistant's turn that is still growing."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._turn: dict[str, Any] | None = None
        self._shells: dict[str, str] = {}
        """Ids of local shell calls to their call ids: some clients answer the one, some the other."""

    def add(self, value: Any, param: str) -> None:
        item = as_object(value, param)
        kind = member(item, "type", str, param, "message")
        match kind:
            case "message":
                self._message(item, param)
            case "reasoning":
                self._reasoning(item, param)
            case "function_call":
                arguments = required(item, "arguments", str, param)
                self._call(item, required(item, "name", str, param), arguments, param)
            case "custom_tool_call":
                arguments = custom_arguments(required(item, "input", str, param))
                self._call(item, required(item, "name", str, param), arguments, param)
            case "local_shell_call":
                action = dict(required(item, "action", dict, param))
                kept = {k: v for k, v in action.items() if v is not None and k not in ("type", "env", "user")}
                self._shells[member(item, "id", str, param, "")] = required(item, "call_id", str, param)
                self._call(item, "local_shell", _json(kept), param)
            case "tool_search_call":
                if item.get("execution") == "client":
                    self._call(item, "tool_search", _json(item.get("arguments") or {}), param)
            case "function_call_output" | "custom_tool_call_output":
                self._result(required(item, "call_id", str, param), _output(item, param))
            case "local_shell_call_output":
                given = member(item, "call_id", str, param, "") or required(item, "id", str, param)
                self._result(self._shells.get(given, given), _output(item, param))
            case "tool_search_output":
                if item.get("execution") == "client":
                    tools = required(item, "tools", list, param)
                    self._result(required(item, "call_id", str, param), _json({"tools": _names(tools)}))
            case "additional_tools":
                required(item, "tools", list, param)
            case _ if kind in DROPPED_ITEMS:
                return
            case _:
                raise not_supported(kind, f"{param}.type")

    def close(self) -> None:
        """The assistant's turn is over."""
        if self._turn is not None:
            self.messages.append(self._turn)
            self._turn = None

    def _message(self, item: Mapping[str, Any], param: str) -> None:
        role = one_of(item.get("role"), ("user", "system", "developer", "assistant"), f"{param}.role")
        content = _content(item, param)
        if role == "assistant":
            turn = self._open()
            # Consecutive messages are one turn; reasoning between them would have begun another.
            turn["content"] = f"{turn['content']}\n\n{content}" if turn["content"] else content
            return
        self.close()
        self.messages.append({"role": "system" if role == "system" else "user", "content": content})

    def _reasoning(self, item: Mapping[str, Any], param: str) -> None:
        text = _reasoning(item, param)
        if self._turn is not None and self._turn["content"] and not self._turn.get("tool_calls"):
            self.close()
        turn = self._open()
        if text is not None:
            earlier = turn.get("reasoning_content")
            turn["reasoning_content"] = text if earlier is None else f"{earlier}\n{text}"

    def _call(self, item: Mapping[str, Any], name: str, arguments: str, param: str) -> None:
        call = {
            "id": required(item, "call_id", str, param),
            "type": "function",
            "function": {
                "name": flat_name(name, member(item, "namespace", str, param, "") or None),
                "arguments": arguments,
            },
        }
        self._open().setdefault("tool_calls", []).append(call)

    def _result(self, call_id: str, text: str) -> None:
        self.close()
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def _open(self) -> dict[str, Any]:
        if self._turn is None:
            self._turn = {"role": "assistant", "content": ""}
        return self._turn


def _content(item: Mapping[str, Any], param: str) -> str:
    return _texts(item, "content", param, {**_TEXT_OF, "refusal": "refusal"}, {})


def _output(item: Mapping[str, Any], param: str) -> str:
    return _texts(item, "output", param, _TEXT_OF, _UNSEEN)


def _texts(
    item: Mapping[str, Any], name: str, param: str, text_of: Mapping[str, str], unseen: Mapping[str, str]
) -> str:
    """`item[name]`, a string or a list of parts. By type, `text_of` says which member holds a part's text, and `unseen`
    what stands for it."""
    value = item.get(name)
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise bad_request(f"{param}.{name} must be a string or a list of parts.", param=f"{param}.{name}")
    texts = []
    for n, each in enumerate(value):
        place = f"{param}.{name}[{n}]"
        part = as_object(each, place)
        kind = part.get("type")
        if isinstance(kind, str) and kind in text_of:
            texts.append(required(part, text_of[kind], str, place))
        elif isinstance(kind, str) and kind in unseen:
            texts.append(unseen[kind])
        else:
            raise _not_a_text(kind, place)
    return "\n\n".join(texts)


def _not_a_text(kind: Any, place: str) -> ApiError:
    message = f"{place}.type: only input_text and output_text parts are supported, found {echo(repr(kind))}."
    return bad_request(message, param=f"{place}.type", code="unsupported_parameter")


def _reasoning(item: Mapping[str, Any], param: str) -> str | None:
    """The reasoning of an item: its text, else what this server sealed; a summary is none."""
    texts = []
    for n, value in enumerate(member(item, "content", list, param, [])):
        place = f"{param}.content[{n}]"
        part = as_object(value, place)
        one_of(part.get("type"), ("reasoning_text", "text"), f"{place}.type")
        texts.append(required(part, "text", str, place))
    if texts:
        return "\n".join(texts)
    return unseal(member(item, "encrypted_content", str, param, ""))


def _names(tools: Sequence[Any]) -> list[str]:
    """Names in the prompt of tools that were found; their shapes are checked where they become tools."""
    names: list[str] = []
    for tool in tools:
        if not isinstance(tool, Mapping):
            continue
        if tool.get("type") == "namespace" and isinstance(tool.get("tools"), list):
            inner = [part for part in tool["tools"] if isinstance(part, Mapping)]
            names += [flat_name(str(part.get("name")), str(tool.get("name"))) for part in inner]
        else:
            names.append(str(tool.get("name")))
    return names


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
