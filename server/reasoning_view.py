"""How much of its reasoning an answer shows: `include_reasoning`, `separate_reasoning`, `stream_reasoning`.

    include_reasoning false     none of it (vLLM)
    separate_reasoning false    in the content, in front of `</think>` (SGLang)
    stream_reasoning false      in one piece, once it is complete (SGLang)

Tokens and usage are those of the answer as it was made.
"""

from contextlib import aclosing
from dataclasses import replace

import msgspec

from server.chat_run import ChatRun, Events
from server.generation import GenerationEvent
from server.protocol.common import ReasoningViewFields
from server.validation import END_OF_REASONING


def reasoning_view(run: ChatRun, fields: ReasoningViewFields) -> ChatRun:
    """The same run, its reasoning shown as `fields` ask for."""
    if not run.thinking:
        return run
    if not fields.include_reasoning:
        return _unthinking(run, [_hidden(choice) for choice in run.choices])
    if not fields.separate_reasoning:
        return _unthinking(run, [_joined(choice) for choice in run.choices])
    if not fields.stream_reasoning:
        return replace(run, choices=[_gathered(choice) for choice in run.choices])
    return run


def _unthinking(run: ChatRun, choices: list[Events]) -> ChatRun:
    """For the shape of the answer nobody thinks."""
    return replace(run, thinking=False, prompt=replace(run.prompt, thinking=False), choices=choices)


async def _hidden(events: Events) -> Events:
    async with aclosing(events):
        async for event in events:
            if event.reasoning or event.logprobs:
                rows = tuple(row for row in event.logprobs if not row.reasoning)
                event = msgspec.structs.replace(event, reasoning="", logprobs=rows)
            yield event


async def _joined(events: Events) -> Events:
    open_ = False
    async with aclosing(events):
        async for event in events:
            open_ = open_ or bool(event.reasoning)
            text = event.reasoning
            if open_ and _is_answer(event):
                open_ = False
                text += END_OF_REASONING
            rows = tuple(msgspec.structs.replace(row, reasoning=False) for row in event.logprobs)
            yield msgspec.structs.replace(event, reasoning="", content=text + event.content, logprobs=rows)


async def _gathered(events: Events) -> Events:
    held: list[str] = []
    async with aclosing(events):
        async for event in events:
            held.append(event.reasoning)
            if _is_answer(event) or event.finish_reason is not None:
                reasoning, held = "".join(held), []
                yield msgspec.structs.replace(event, reasoning=reasoning)
            else:
                yield msgspec.structs.replace(event, reasoning="")


def _is_answer(event: GenerationEvent) -> bool:
    """Whether reasoning is over with this event."""
    return bool(event.content or event.calls)
