"""The text of a grammar from what is asked of it. Runs where it can be killed."""

import json
from collections.abc import Callable
from typing import Any

from server.grammar.calls import CallGrammar
from server.grammar.content import content_grammar
from server.grammar.messages import GrammarJob, GrammarText, Refusal
from server.grammar.schema import SchemaError

FREE_TEXT = "/(?s:.*)/"
# Text up to a call: as a prompt renders it, two line feeds end the content, which ends with none itself.
_UP_TO_CALL = r"/((?s:.*)[^\n])?\n\n</"


class RefusedError(ValueError):
    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.refusal = Refusal(message=message, param=param)


def write_grammar(job: GrammarJob, compiles: Callable[[str], str | None]) -> GrammarText:
    """The grammar of a job. `compiles` says why a text cannot be used, None when it can.

    Raises RefusedError.
    """
    calls = _calls(job, compiles) if job.calls != "none" else None
    content = _content(job) if job.format is not None else None
    grammars: list[dict[str, Any]] = [{"lark_grammar": _start(job, calls)}, *([] if calls is None else calls.named)]
    if content is not None and job.calls not in ("required", "opened"):
        grammars.append({"name": "content", **content})
    text = json.dumps({"grammars": grammars}, ensure_ascii=False)
    why = compiles(text)
    if why is not None:
        param = job.format_param if content is not None else "tools"
        raise RefusedError(f"{param}: {why}", param)
    return GrammarText(text=text, left_out=tuple(calls.left_out) if calls is not None else ())


def _calls(job: GrammarJob, compiles: Callable[[str], str | None]) -> CallGrammar:
    assert job.marker is not None and job.tools
    calls = CallGrammar(marker=job.marker, compiles=compiles)
    for tool in job.tools:
        try:
            if tool.grammar is not None:
                (key,) = tool.parameters["properties"]
                calls.add_text(tool.name, key, tool.grammar)
            else:
                calls.add(tool.name, tool.parameters, strict=tool.strict)
        except SchemaError as error:
            raise RefusedError(f"tools: function `{tool.name}`: {error}", "tools") from None
    return calls


def _content(job: GrammarJob) -> dict[str, Any]:
    try:
        return content_grammar(job.format or "", job.value)
    except SchemaError as error:
        raise RefusedError(f"{job.format_param}: {error}", job.format_param) from None


def _start(job: GrammarJob, calls: CallGrammar | None) -> str:
    if calls is None:
        return "start: @content\n"
    rules = calls.rules(parallel=job.parallel)
    opening = f'<[{job.marker}]> "tool_calls>\\n" calls'
    if job.calls == "opened":
        return f"start: calls\n{rules}"
    if job.calls == "required":
        return f'start: "\\n\\n<" {opening}\n{rules}'
    if job.format is not None:
        return f'start: @content | "\\n\\n<" {opening}\n{rules}'
    return f"start: TEXT | UP_TO_CALL {opening}\nTEXT: {FREE_TEXT}\nUP_TO_CALL: {_UP_TO_CALL}\n{rules}"
