"""From a request to the grammar of its answer."""

from engine.messages import Grammar
from server.chat_request import ChatRequest, OutputFormat
from server.errors import unsupported
from server.grammar.messages import GrammarJob, ToolSpec
from server.grammar.service import GrammarService
from server.text.calls import DSML
from server.text.tokenizer import Tokenizer
from server.validation import END_OF_REASONING


async def build_grammar(
    service: GrammarService, chat: ChatRequest, tokenizer: Tokenizer, *, left_out: list[str] | None = None
) -> Grammar | None:
    """The grammar of a chat answer; None when it may be anything.

    Offered tools always bind their calls; text is free up to one unless a call is required or a format asked for. With
    tools and a format the answer is one or the other. While the model thinks nothing is bound, but neither the end nor
    a call can come before the end of the reasoning. Keywords of tools that are not strict which cannot be kept are
    added to `left_out` (`tools.NAME.properties.KEY.KEYWORD`).

    Raises:
        ApiError: 400 with `param`; the message names the keyword that cannot be kept.
    """
    offered = bool(chat.tools) and chat.tool_choice.mode != "none"
    wanted = chat.output_format
    last = chat.messages[-1]
    continues = last.get("role") == "assistant" and last.get("prefix") is True
    if wanted is not None and continues:
        raise unsupported(wanted.param, f"`{wanted.param}` cannot be combined with a message that is continued.")
    after = tokenizer.required_id(END_OF_REASONING) if chat.thinking and not continues else None
    if not offered and wanted is None:
        # Tools that must not be called may tempt the model all the same.
        return Grammar(text="", after=after) if chat.tools else None
    marker = tokenizer.special_id(DSML) if offered else None
    if offered and marker is None:
        raise unsupported("tools", f"This model's tokenizer has no {DSML} token, so it cannot call tools.")
    choice = chat.tool_choice
    forced = offered and choice.mode == "required"
    shown = [tool for tool in chat.tools if choice.name is None or tool.name == choice.name] if offered else []
    job = GrammarJob(
        tools=tuple(ToolSpec(name=t.name, parameters=t.parameters, strict=t.strict, grammar=t.grammar) for t in shown),
        calls="none" if not offered else "auto" if not forced else "required" if chat.thinking else "opened",
        parallel=choice.parallel,
        format=None if wanted is None or forced else wanted.kind,
        value=None if wanted is None or forced else wanted.value,
        format_param="" if wanted is None or forced else wanted.param,
        marker=marker,
    )
    written = await service.write(job)
    if left_out is not None:
        left_out += [f"tools.{place.replace(': #', '').replace('/', '.')}" for place in written.left_out]
    return Grammar(text=written.text, after=after, markers=() if marker is None else (marker,))


async def build_format(service: GrammarService, wanted: OutputFormat, *, after: int | None = None) -> Grammar:
    """The grammar of an answer without tools; `after` is the token that ends its reasoning, if it begins there.

    Raises:
        ApiError: as `build_grammar`.
    """
    job = GrammarJob(format=wanted.kind, value=wanted.value, format_param=wanted.param)
    return Grammar(text=(await service.write(job)).text, after=after)
