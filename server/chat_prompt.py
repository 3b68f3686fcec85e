"""What the model reads of a chat request: the tools, formats and choices that its prompt shows. Needs no server."""

from typing import Any

from server.chat_request import ChatRequest, OutputFormat
from server.text.effort import EffortTable
from server.text.prompt import FindsTurns, Prompt, render_chat
from server.text.tokenizer import Tokenizer


def chat_prompt(
    tokenizer: Tokenizer, chat: ChatRequest, *, effort_table: EffortTable = "release", turns: FindsTurns | None = None
) -> Prompt:
    """The whole prompt. Raises PromptError with `param`."""
    tools, choice = _rendered_tools(chat)
    return render_chat(
        tokenizer,
        chat.messages,
        thinking=chat.thinking,
        reasoning_effort=chat.tier,
        tools=tools,
        tool_choice=choice,
        response_format=_stated_format(chat.output_format),
        effort_table=effort_table,
        turns=turns,
    )


def offers_tools(chat: ChatRequest) -> bool:
    """Whether the model is told of tools, and its answer is searched for calls."""
    return bool(chat.tools) and chat.tool_choice.mode != "none"


def _stated_format(wanted: OutputFormat | None) -> dict[str, Any] | None:
    """The format as the prompt states it: a schema as it was sent, for the grammar keeps all of it. Strict ones would
    lose keywords and definitions in the encoder.
    """
    if wanted is None or wanted.rendered is None or wanted.rendered.get("type") != "json_schema":
        return None if wanted is None else wanted.rendered
    return {**wanted.rendered, "json_schema": {**wanted.rendered["json_schema"], "strict": False}}


def _rendered_tools(chat: ChatRequest) -> tuple[list[dict[str, Any]] | None, Any]:
    """(tools, tool_choice) as the encoder takes them.

    A named tool is the only one the prompt shows. A forced call without thinking opens the block in the prompt; with
    thinking the prompt is that of a free choice, and the grammar forces the call after `</think>`.
    """
    if not offers_tools(chat):
        return None, None
    choice = chat.tool_choice
    shown = [tool for tool in chat.tools if choice.name is None or tool.name == choice.name]
    functions = [
        {
            "type": "function",
            # The encoder takes absent parameters and refuses empty ones.
            "function": {
                "name": t.name,
                "description": t.description,
                **({"parameters": t.parameters} if t.parameters else {}),
                "strict": t.strict,
            },
        }
        for t in shown
    ]
    return functions, "required" if choice.mode == "required" and not chat.thinking else "auto"
