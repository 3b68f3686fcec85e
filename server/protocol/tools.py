"""Tools and tool choice as chat completions spell them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from server.chat_request import Tool, ToolChoice
from server.errors import bad_request, echo

MOST_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
_NAME_RULE = "must be 1 to 128 letters, digits, underscores or dashes"


def read_tools(tools: Sequence[Any], param: str = "tools") -> tuple[Tool, ...]:
    """Function tools; members that nobody defines are dropped.

    Raises:
        ApiError: 400 with `param`.
    """
    read = tuple(_tool(tool, f"{param}[{n}]") for n, tool in enumerate(tools))
    if len({tool.name for tool in read}) != len(read):
        raise bad_request("Tool names must be unique.", param=param)
    return read


def _tool(tool: Any, param: str) -> Tool:
    if not isinstance(tool, Mapping):
        raise bad_request(f"{param} must be an object.", param=param)
    if tool.get("type") != "function":
        message = f"{param}.type: only function tools are supported, found {echo(repr(tool.get('type')))}."
        raise bad_request(message, param=f"{param}.type")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise bad_request(f"{param}.function must be an object.", param=f"{param}.function")
    return Tool(
        name=checked_name(function.get("name"), f"{param}.function.name"),
        description=_member(function, "description", str, "", f"{param}.function"),
        parameters=_member(function, "parameters", dict, {}, f"{param}.function"),
        strict=_member(function, "strict", bool, False, f"{param}.function"),
    )


def checked_name(name: Any, param: str) -> str:
    """A tool's name. Raises ApiError 400."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise bad_request(f"{param} {_NAME_RULE}.", param=param)
    return name


def _member(owner: Mapping[str, Any], name: str, kind: type, default: Any, param: str) -> Any:
    value = owner.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        words = {str: "a string", dict: "a JSON Schema object", bool: "true or false"}
        raise bad_request(f"{param}.{name} must be {words[kind]}.", param=f"{param}.{name}")
    return value


def read_tool_choice(
    choice: Any, parallel: bool, tools: tuple[Tool, ...], param: str = "tool_choice"
) -> tuple[ToolChoice, tuple[Tool, ...]]:
    """The choice and the tools it leaves: `allowed_tools` names some of them.

    `choice` is None, "none", "auto", "required", {"type": "function", "function": {"name"}} or
    {"type": "allowed_tools", "allowed_tools": {"mode", "tools"}}.

    Raises:
        ApiError: 400 with `param`.
    """
    if choice is None:
        return ToolChoice(parallel=parallel), tools
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise bad_request(f"{param} must be none, auto, required or an object.", param=param)
        if choice == "required" and not tools:
            raise bad_request(f"{param} is required but there are no tools.", param=param)
        return ToolChoice(mode=choice, parallel=parallel), tools  # type: ignore[arg-type]
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if kind == "function":
        name = _named(choice, tools, param)
        return ToolChoice(mode="required", name=name, parallel=parallel), tools
    if kind == "allowed_tools":
        return _allowed(choice.get("allowed_tools"), parallel, tools, f"{param}.allowed_tools")
    message = f'{param} must be "none", "auto", "required" or an object of type function or allowed_tools.'
    raise bad_request(message, param=param)


def _named(choice: Mapping[str, Any], tools: tuple[Tool, ...], param: str) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise bad_request(f"{param}.function.name must be a string.", param=f"{param}.function.name")
    if all(tool.name != name for tool in tools):
        message = f"{param}: there is no tool named `{echo(name)}` among the tools."
        raise bad_request(message, param=f"{param}.function.name")
    return name


def _allowed(allowed: Any, parallel: bool, tools: tuple[Tool, ...], param: str) -> tuple[ToolChoice, tuple[Tool, ...]]:
    if not isinstance(allowed, Mapping) or not isinstance(allowed.get("tools"), list) or not allowed["tools"]:
        raise bad_request(f"{param} must be an object with mode and a list of tools.", param=param)
    mode = allowed.get("mode")
    if mode not in ("auto", "required"):
        raise bad_request(f"{param}.mode must be auto or required.", param=f"{param}.mode")
    names = set()
    for n, tool in enumerate(allowed["tools"]):
        place = f"{param}.tools[{n}]"
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            raise bad_request(f"{place} must be an object of type function.", param=place)
        names.add(_named(tool, tools, place))
    return ToolChoice(mode=mode, parallel=parallel), tuple(tool for tool in tools if tool.name in names)
