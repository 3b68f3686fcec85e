"""Tools of /v1/responses: functions, namespaces of them, custom tools and those that the client runs itself.

The model knows functions only. Everything else becomes a function in the prompt, and its calls become items of the
tool's own kind again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from server.chat_request import Tool, ToolChoice
from server.errors import bad_request, echo
from server.protocol.members import as_object, member, not_supported, one_of, required
from server.protocol.tools import MOST_TOOLS, checked_name

Kind = Literal["function", "custom", "local_shell", "tool_search"]

DROPPED = frozenset(
    {
        *("web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11"),
        "image_generation",
    }
)
"""Tools that a server would run. Agents send them always and do without; the answer's `tools` lacks them."""

_LOCAL_SHELL = Tool(
    name="local_shell",
    description="Runs a command on the user's machine and returns its output.",
    parameters={
        "type": "object",
        "properties": {
            "command": {"type": "array", "items": {"type": "string"}, "description": "Program and arguments."},
            "working_directory": {"type": "string", "description": "Where to run it."},
            "timeout_ms": {"type": "integer", "description": "Milliseconds after which it is stopped."},
        },
        "required": ["command"],
    },
)
_SEARCH = "Finds further tools by what they do; the tools it finds can be called afterwards."
_SEARCH_PARAMETERS = {
    "type": "object",
    "properties": {"query": {"type": "string", "description": "What the tool should do."}},
    "required": ["query"],
}


@dataclass(frozen=True, slots=True)
class Called:
    """What a function name in the prompt stands for."""

    kind: Kind
    name: str
    namespace: str | None = None


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools of one request."""

    tools: tuple[Tool, ...]
    by_name: Mapping[str, Called]
    """Function names in the prompt to what they stand for."""
    shown: list[dict[str, Any]]
    """The request's own tools without dropped ones, as the answer repeats them."""

    def called(self, name: str) -> Called:
        return self.by_name.get(name) or Called("function", name)


def flat_name(name: str, namespace: str | None) -> str:
    """The name of a function of a namespace in the prompt."""
    return f"{namespace}__{name}" if namespace else name


def read_toolbox(tools: Sequence[Any], later: Sequence[Any] = ()) -> Toolbox:
    """`tools` of the request, and the ones that its input items brought `later`.

    With a `tool_search` that the client runs, tools with `defer_loading` stay out until an item brings them.

    Raises:
        ApiError: 400 with `param`.
    """
    reader = _Reader(searches=any(_is_client_search(tool) for tool in tools))
    for n, tool in enumerate(tools):
        reader.add(tool, f"tools[{n}]")
    shown = list(reader.shown)
    reader.loads = True
    for tool in later:
        reader.add(tool, "input")
    if len(reader.found) > MOST_TOOLS:
        raise bad_request(f"tools: at most {MOST_TOOLS} tools, found {len(reader.found)}.", param="tools")
    return Toolbox(tuple(reader.found.values()), reader.called, shown)


def _is_client_search(tool: Any) -> bool:
    return isinstance(tool, Mapping) and tool.get("type") == "tool_search" and tool.get("execution") == "client"


class _Reader:
    def __init__(self, *, searches: bool) -> None:
        self.found: dict[str, Tool] = {}
        self.called: dict[str, Called] = {}
        self.shown: list[dict[str, Any]] = []
        self.loads = False
        """Tools come from items: deferred ones are meant, and one that is there already is no mistake."""
        self._searches = searches

    def add(self, value: Any, param: str) -> None:
        tool = as_object(value, param)
        kind = required(tool, "type", str, param)
        if kind in DROPPED:
            return
        match kind:
            case "function" | "custom":
                self._add_one(tool, param, None)
                self.shown.append(_echoed(tool))
            case "namespace":
                namespace = checked_name(tool.get("name"), f"{param}.name")
                inner = required(tool, "tools", list, param)
                for n, part in enumerate(inner):
                    self._add_one(as_object(part, f"{param}.tools[{n}]"), f"{param}.tools[{n}]", namespace)
                self.shown.append({"description": "", **tool, "tools": [_echoed(part) for part in inner]})
            case "local_shell":
                self._put(_LOCAL_SHELL, Called("local_shell", "local_shell"), param)
                self.shown.append(dict(tool))
            case "tool_search":
                if _is_client_search(tool):
                    search = Tool(
                        name="tool_search",
                        description=member(tool, "description", str, param, _SEARCH),
                        parameters=member(tool, "parameters", dict, param, _SEARCH_PARAMETERS),
                    )
                    self._put(search, Called("tool_search", "tool_search"), param)
                    self.shown.append(dict(tool))
            case _:
                raise not_supported(kind, f"{param}.type")

    def _add_one(self, tool: Mapping[str, Any], param: str, namespace: str | None) -> None:
        kind = one_of(tool.get("type"), ("function", "custom"), f"{param}.type")
        name = checked_name(tool.get("name"), f"{param}.name")
        if member(tool, "defer_loading", bool, param, False) and self._searches and not self.loads:
            return
        description = member(tool, "description", str, param, "")
        flat = checked_name(flat_name(name, namespace), f"{param}.name")
        if kind == "function":
            parameters = member(tool, "parameters", dict, param, {})
            strict = member(tool, "strict", bool, param, False)
            made = Tool(name=flat, description=description, parameters=parameters, strict=strict)
            self._put(made, Called("function", name, namespace), param)
        else:
            self._put(_custom(flat, description, tool, param), Called("custom", name, namespace), param)

    def _put(self, tool: Tool, called: Called, param: str) -> None:
        if tool.name in self.found:
            if self.loads:
                return
            raise bad_request(f"{param}: Tool names must be unique.", param=param)
        self.found[tool.name] = tool
        self.called[tool.name] = called


def _custom(name: str, description: str, tool: Mapping[str, Any], param: str) -> Tool:
    """A function with one string, whose format is told to the model and enforced."""
    place = f"{param}.format"
    given = member(tool, "format", dict, param, {"type": "text"})
    text: dict[str, Any] = {"type": "string"}
    grammar = None
    if one_of(given.get("type"), ("text", "grammar"), f"{place}.type") == "grammar":
        syntax = one_of(given.get("syntax"), ("lark", "regex"), f"{place}.syntax")
        definition = required(given, "definition", str, place)
        description += f"\n\n`input` must follow this {syntax} grammar:\n{definition}"
        if syntax == "regex":
            text["pattern"] = f"^(?:{definition})$"
        else:
            grammar = definition
    parameters = {
        "type": "object",
        "properties": {"input": text},
        "required": ["input"],
        "additionalProperties": False,
    }
    return Tool(name=name, description=description.lstrip("\n"), parameters=parameters, grammar=grammar)


def _echoed(tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        return dict(tool)
    return {"description": None, "parameters": None, "strict": None, **tool}


def read_choice(choice: Any, parallel: bool, box: Toolbox) -> tuple[ToolChoice, tuple[Tool, ...]]:
    """The choice and the tools it leaves: `allowed_tools` names some of them.

    Raises:
        ApiError: 400 with `param`.
    """
    if choice is None or isinstance(choice, str):
        mode = one_of(choice or "auto", ("none", "auto", "required"), "tool_choice")
        if mode == "required" and not box.tools:
            raise bad_request("tool_choice is required but there are no tools.", param="tool_choice")
        return ToolChoice(mode=mode, parallel=parallel), box.tools  # type: ignore[arg-type]
    given = as_object(choice, "tool_choice")
    if given.get("type") == "allowed_tools":
        mode = one_of(given.get("mode"), ("auto", "required"), "tool_choice.mode")
        names = set()
        for n, tool in enumerate(required(given, "tools", list, "tool_choice")):
            place = f"tool_choice.tools[{n}]"
            # Hosted tools are dropped from the tools, so naming them allows nothing.
            if as_object(tool, place).get("type") not in DROPPED:
                names |= _chosen(tool, box, place)
        if mode == "required" and not names:
            raise bad_request("tool_choice is required but allows no tool.", param="tool_choice.tools")
        left = tuple(tool for tool in box.tools if tool.name in names)
        return ToolChoice(mode=mode, parallel=parallel), left  # type: ignore[arg-type]
    names = _chosen(given, box, "tool_choice")
    if len(names) == 1:
        return ToolChoice(mode="required", name=names.pop(), parallel=parallel), box.tools
    left = tuple(tool for tool in box.tools if tool.name in names)
    return ToolChoice(mode="required", parallel=parallel), left


def _chosen(choice: Mapping[str, Any], box: Toolbox, param: str) -> set[str]:
    """Names in the prompt of the tool, or of the namespace, that `choice` means."""
    kind = one_of(
        choice.get("type"), ("function", "custom", "namespace", "local_shell", "tool_search"), f"{param}.type"
    )
    name = kind if kind in ("local_shell", "tool_search") else required(choice, "name", str, param)
    if kind == "namespace":
        names = {flat for flat, called in box.by_name.items() if called.namespace == name}
    else:
        namespace = member(choice, "namespace", str, param, "")
        names = {
            flat
            for flat, called in box.by_name.items()
            if called.kind == kind and (flat == name or (called.name == name and (called.namespace or "") == namespace))
        }
    if not names:
        raise bad_request(f"{param}: there is no {kind} tool named `{echo(name)}` in tools.", param=f"{param}.name")
    return names


def custom_arguments(text: str) -> str:
    """The arguments of the function that a custom tool is in the prompt."""
    return json.dumps({"input": text}, ensure_ascii=False)
