"""The grammar of tool calls, exactly as a prompt renders them, so that an answer replayed as history is the same text.

    <D tool_calls> LF  invoke (LF invoke)*  LF </D tool_calls>                           D is the token ｜DSML｜
    invoke     <D invoke name="NAME"> LF (parameter LF)* </D invoke>
    parameter  <D parameter name="KEY" string="true">raw text</D parameter>
               <D parameter name="KEY" string="false">JSON</D parameter>

A parameter comes once at most, the required ones all come, and the order is free up to 60 parameters; beyond that it is
the schema's. JSON has the separators of a rendered prompt, `", "` and `": "`, and within it the schema's order.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from server.grammar.content import written_grammar
from server.grammar.schema import Reading, SchemaError, completed, resolve, standalone
from server.grammar.strings import ANY_TEXT, literal, text_terminal

MOST_UNORDERED = 60
"""Parameters that may come in any order: the library counts them in the bits of one number."""
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_OTHER_TYPES = ["null", "boolean", "integer", "number", "array", "object"]
_KEY = r"/[^\"\n]{1,128}/"
_MOST_REFS = 32

Compiles = Callable[[str], str | None]
"""A grammar's text to why it cannot be used; None: it can."""


@dataclass(slots=True, kw_only=True)
class Parameter:
    """One parameter of a tool: its values as raw text and as JSON."""

    key: str | None
    """None: any key that the tool does not declare."""
    required: bool
    text: str | None
    """A terminal, None: never a string."""
    json: Any = None
    """A schema that stands alone, None: never anything but a string."""
    grammar: str | None = None
    """Instead of both: the grammar of this name holds the raw text."""


@dataclass(slots=True, kw_only=True)
class CallGrammar:
    """Rules of the calls of some tools; the first one is `calls`."""

    marker: int
    compiles: Compiles
    left_out: list[str] = field(default_factory=list)
    """What tools that are not strict say and the grammar does not keep."""
    named: list[dict[str, str]] = field(default_factory=list)
    """Grammars of the library's top level that the rules refer to: a client's rules cannot meet ours."""
    _rules: list[str] = field(default_factory=list)
    _values: dict[str, str] = field(default_factory=dict)
    """Bodies of values to the names of their rules: tools say the same again and again."""

    def add_text(self, name: str, key: str, grammar: str) -> None:
        """The next tool, whose one parameter is text that follows a client's grammar. Raises SchemaError."""
        lark, number = written_grammar(grammar), len(self._rules)
        why = self.compiles(lark)
        if why is not None:
            raise SchemaError(f"its grammar is not supported: {why}")
        self.named.append({"name": f"text{number}", "lark_grammar": lark})
        parameter = Parameter(key=key, required=True, text=None, grammar=f"@text{number}")
        self._rules.append(self._tool(number, name, [parameter]))

    def add(self, name: str, schema: Any, *, strict: bool) -> None:
        """The next tool. Raises SchemaError."""
        reading = Reading(lenient=not strict)
        read = reading.read(schema)
        if strict:
            read = completed(read)
        number = len(self._rules)
        parameters = [self._usable(p, read, strict, reading) for p in _parameters(read, reading)]
        self.left_out += [f"{name}: {place}" for place in reading.left_out]
        self._rules.append(self._tool(number, name, [p for p in parameters if p is not None]))

    def rules(self, *, parallel: bool) -> str:
        """Rule `calls`: what follows the opening tag and its line feed, up to the end of the closing one."""
        d = f"<[{self.marker}]>"
        tools = " | ".join(f"tool{n}" for n in range(len(self._rules)))
        more = f'("\\n<" {d} ({tools}))*' if parallel else ""
        head = f'calls: "<" {d} ({tools}) {more} "\\n</" {d} "tool_calls>"\n'
        values = "".join(f"{name}: {body}\n" for body, name in self._values.items())
        return head + "".join(self._rules) + values

    def _usable(self, parameter: Parameter, root: Any, strict: bool, reading: Reading) -> Parameter | None:
        """The parameter with only the kinds of values that there can be. Raises SchemaError."""
        where = f"#/properties/{parameter.key}"
        if parameter.json is not None and not _is_plain(parameter.json):
            why = self.compiles(json_grammar(parameter.json))
            if why is not None and "nsatisfiable" in why:
                parameter.json = None
            elif why is not None and strict:
                raise SchemaError(f"the schema at {where} is not supported: {why}")
            elif why is not None:
                reading.left_out.append(where)
                parameter.json = {"type": _OTHER_TYPES}
        # Without a pattern in it, a terminal is made of literals.
        if parameter.text is not None and parameter.text != ANY_TEXT and "/" in parameter.text:
            why = self.compiles(f'start: TEXT\nTEXT: ({parameter.text}) "</"')
            if why is not None and strict:
                raise SchemaError(f"the schema at {where} is not supported: {why}")
            if why is not None:
                reading.left_out.append(where)
                parameter.text = ANY_TEXT
        if parameter.text is not None or parameter.json is not None:
            return parameter
        if parameter.required:
            raise SchemaError(f"the required property at {where} cannot have any value")
        return None

    def _tool(self, number: int, name: str, parameters: list[Parameter]) -> str:
        d = f"<[{self.marker}]>"
        declared = [p for p in parameters if p.key is not None]
        # Required parameters have the lowest bits, so that one test tells whether all have come.
        ordered = sorted(declared, key=lambda p: not p.required)
        num_required = sum(p.required for p in declared)
        free = [p for p in parameters if p.key is None]
        begin = literal(f'invoke name="{name}">\n')
        end = f'"</" {d} "invoke>"\n'
        lines: list[str] = []
        pieces = {id(p): f"p{number}_{n}" for n, p in enumerate([*declared, *free])}
        if 0 < len(declared) <= MOST_UNORDERED:
            head = f"tool{number}: {begin} args{number}::0x0 {end}"
            done = f" %if is_ones([0:{num_required}])" if num_required else ""
            choices = [f'args{number}::_ : ""{done}']
            for bit, p in enumerate(ordered):
                choices.append(f"  | {pieces[id(p)]} args{number}::set_bit({bit}) %if bit_clear({bit})")
            choices += [f"  | {pieces[id(p)]} args{number}::_" for p in free]
            lines += choices
        else:
            row = [pieces[id(p)] + ("" if p.required else "?") for p in declared] + [f"{pieces[id(p)]}*" for p in free]
            head = f"tool{number}: {begin} {' '.join(row)} {end}"
        for p in (*declared, *free):
            lines += self._parameter(pieces[id(p)], p, [q.key for q in declared if q.key is not None])
        return head + "\n".join(lines) + "\n"

    def _parameter(self, rule: str, parameter: Parameter, declared: list[str]) -> list[str]:
        d = f"<[{self.marker}]>"
        if parameter.key is not None:
            begin = literal(f'parameter name="{parameter.key}" string="')
            lines = []
        else:
            others = " | ".join(literal(key) for key in declared)
            key = f"{_KEY} & ~({others})" if others else _KEY
            begin = f"{rule.upper()}_KEY"
            lines = [f'{begin}: "parameter name=\\"" ({key}) "\\" string=\\""']
        values = []
        if parameter.text is not None:
            # With the closing bracket in the terminal, text that could never be closed cannot begin.
            values.append(self._value("TEXT", f'"true\\">" ({parameter.text}) "</"'))
        if parameter.grammar is not None:
            values.append(self._value("text", f'"true\\">" {parameter.grammar} "</"'))
        if parameter.json is not None:
            style = {**parameter.json, "x-guidance": JSON_STYLE}
            values.append(self._value("json", f'"false\\">" %json {json.dumps(style, ensure_ascii=False)} "</"'))
        return [f'{rule}: "<" {d} {begin} ({" | ".join(values)}) {d} "parameter>\\n"', *lines]

    def _value(self, kind: str, body: str) -> str:
        """The name of the rule (or the terminal, in capitals) with this body."""
        return self._values.setdefault(body, f"{kind}{len(self._values)}")


def json_grammar(schema: Any) -> str:
    """A whole grammar of one JSON value in the style of calls."""
    return f"start: %json {json.dumps({**schema, 'x-guidance': JSON_STYLE}, ensure_ascii=False)}"


def _is_plain(schema: Any) -> bool:
    """A schema that says no more than a type or some values."""
    return isinstance(schema, dict) and schema.keys() <= {"type", "enum", "const"} and len(schema) == 1


def _parameters(schema: Any, reading: Reading) -> list[Parameter]:
    """What the arguments of a tool may hold."""
    root, refs = schema, 0
    while isinstance(schema, dict) and "$ref" in schema and refs < _MOST_REFS:
        schema, refs = resolve(schema["$ref"], root), refs + 1
    if schema is True:
        schema = {}
    types = schema.get("type", "object") if isinstance(schema, dict) else None
    if "object" not in ((types,) if isinstance(types, str) else types or ()):
        raise SchemaError("the parameters of a function must be a schema of type object")
    for keyword in ("anyOf", "oneOf", "allOf", "patternProperties", "minProperties", "maxProperties", "enum", "const"):
        if keyword in schema:
            if not reading.lenient:
                raise SchemaError(f"the keyword `{keyword}` at # is not supported for the arguments of a function")
            reading.left_out.append(f"#/{keyword}")
    properties = schema.get("properties")
    required = schema.get("required", [])
    # Without a word about it, only an object of no declared properties is an open one.
    additional = schema.get("additionalProperties", not properties and properties != {})
    declared = {**dict.fromkeys(required, additional), **(properties or {})}
    declared = {**(properties or {}), **{k: v for k, v in declared.items() if k not in (properties or {})}}
    parameters = []
    for key, value in declared.items():
        if '"' in key or "\n" in key:
            raise SchemaError(f"the property name {json.dumps(key[:40])} cannot stand in a call")
        parameters.append(_parameter(key, key in required, value, root, reading))
    if additional is not False:
        parameters.append(_parameter(None, False, additional, root, reading))
    return parameters


def _parameter(key: str | None, required: bool, schema: Any, root: Any, reading: Reading) -> Parameter:
    where = f"#/properties/{key}" if key is not None else "#/additionalProperties"
    try:
        text = text_terminal(schema, root)
        others = without_strings(schema, root)
        alone = None if others is None else standalone(others, root)
    except SchemaError as error:
        if not reading.lenient:
            raise SchemaError(f"{error}, at {where}") from None
        reading.left_out.append(where)
        text, alone = ANY_TEXT, {"type": _OTHER_TYPES}
    return Parameter(key=key, required=required, text=text, json=alone)


def without_strings(schema: Any, root: Any, refs: int = 0) -> Any:
    """The schema of the same values but strings; None when there are none, as far as types can tell."""
    if isinstance(schema, bool):
        return {"type": _OTHER_TYPES} if schema else None
    if refs > _MOST_REFS:
        raise SchemaError("the keyword `$ref` refers to itself")
    rest = {k: v for k, v in schema.items() if k not in ("$ref", "anyOf", "oneOf", "allOf")}
    types = rest.get("type", _OTHER_TYPES)
    left = [name for name in ([types] if isinstance(types, str) else types) if name != "string"]
    if not left:
        return None
    if "const" in rest and isinstance(rest["const"], str):
        return None
    if "enum" in rest:
        rest["enum"] = [value for value in rest["enum"] if not isinstance(value, str)]
        if not rest["enum"]:
            return None
    if "type" in rest or not {"const", "enum"} & rest.keys():
        rest["type"] = left[0] if len(left) == 1 else left
    parts = []
    if "$ref" in schema:
        parts.append(without_strings(resolve(schema["$ref"], root), root, refs + 1))
    for branch in schema.get("allOf", ()):
        parts.append(without_strings(branch, root, refs + 1))
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            branches = [without_strings(branch, root, refs + 1) for branch in schema[keyword]]
            kept = [branch for branch in branches if branch is not None]
            parts.append({keyword: kept} if len(kept) > 1 else kept[0] if kept else None)
    if any(part is None for part in parts):
        return None
    if not parts:
        return rest
    plain = set(rest) <= {"type", "title", "description", "default", "$defs", "definitions"} and "type" not in schema
    return parts[0] if plain and len(parts) == 1 else {**({} if plain else rest), "allOf": parts}
