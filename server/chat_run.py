"""From a chat request to its running choices: admission, prompt, budget and one generator for each choice.

    ChatRequest ── admit ── render ── budget ── n jobs ── n generators of GenerationEvents

What the chat, responses and messages routes have in common; they translate into it and out of its events.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace
from typing import Any

from server.chat_prompt import chat_prompt, offers_tools
from server.chat_request import ChatRequest
from server.compat import as_deepseek
from server.errors import bad_request, echo
from server.generation import GenerationEvent
from server.grammar.build import build_grammar
from server.middleware import RequestContext
from server.routes.call import check_text_length, completion_budget, estimated_tokens, off_loop
from server.routes.generate import Job, run
from server.state import ServerState, Serving
from server.text.effort import PromptError
from server.text.prompt import Prompt
from server.turns import Turns
from server.validation import check_prompt_logprobs, for_answer, sampling_params, truncated

DEFAULT_TOKENS_CHAT = 8192
DEFAULT_TOKENS_THINKING = 65536
DEFAULT_TOKENS_MAX_EFFORT = 131072
"""max_tokens of a request that names none (DeepSeek's API); clipped to the room that the prompt leaves."""

Events = AsyncGenerator[GenerationEvent, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRun:
    """A chat request under way."""

    prompt: Prompt
    choices: list[Events]
    """One for each choice, to be read side by side (`routes.generate.merge`): the later ones begin when the first has
    its first token, so that they find the prompt in the prefix cache. Closing one aborts it."""
    thinking: bool
    tools: bool
    """The answer may hold tool calls."""


async def start_chat(
    state: ServerState,
    serving: Serving,
    context: RequestContext,
    chat: ChatRequest,
    num_bytes: int,
    stack: ExitStack,
) -> ChatRun:
    """Admit, render and prepare `chat`; nothing reaches the engine before a choice is read.

    `num_bytes` is the size of the request's body. The places in the queue are left when `stack` closes.

    Raises:
        ApiError: 400 with `param`, 429 or 503 as `Admission.enter` says.
    """
    if state.config.api_compat == "deepseek":
        chat = as_deepseek(chat)
    sampling = sampling_params(chat.fields, serving, chat.num_logprobs)
    shares = serving.info.enable_prefix_cache
    estimate = estimated_tokens(num_bytes)
    tickets = [
        stack.enter_context(state.admission.enter(context.key_id, estimate if n == 0 or not shares else 1))
        for n in range(chat.num_choices)
    ]
    turns = turns_of(state, context, chat)
    whole_prompt = await off_loop(num_bytes, lambda: render_request(serving, chat, turns))
    prompt = truncated_prompt(serving, chat, whole_prompt)
    num_prompt_tokens = len(prompt.token_ids)
    check_prompt_logprobs([num_prompt_tokens], sampling.prompt_logprobs, "prompt_logprobs")
    max_tokens = completion_budget(
        serving,
        num_prompt_tokens,
        chat.max_tokens,
        default_tokens(chat.tier, thinking=chat.thinking),
        param=chat.messages_param,
        limit_param=chat.max_tokens_param,
        lowers=chat.lowers_max_tokens,
    )
    grammar = await build_grammar(serving.grammars, chat, serving.tokenizer, left_out=context.ignored_fields)
    jobs = []
    for n, ticket in enumerate(tickets):
        ticket.count(num_prompt_tokens if n == 0 or not shares else 1)
        jobs.append(
            Job(
                prompt_ids=prompt.token_ids,
                sampling=for_answer(
                    sampling, max_tokens=max_tokens, reasoning=prompt.starts_in == "reasoning", choice=n
                ),
                ticket=ticket,
                parse="chat",
                starts_in=prompt.starts_in,
                continues=prompt.continues,
                tools=offers_tools(chat),
                grammar=grammar,
                turn_start=prompt.turn_start,
                recorder=turns.recorder(prompt, serving.tokenizer, tools=offers_tools(chat))
                if prompt is whole_prompt
                else None,
            )
        )
    choices = [run(state, serving, context, chat.fields, job) for job in jobs]
    return ChatRun(
        prompt=prompt,
        choices=after_the_first(choices) if shares else choices,
        thinking=chat.thinking,
        tools=offers_tools(chat),
    )


def turns_of(state: ServerState, context: RequestContext, chat: ChatRequest) -> Turns:
    """The turns that this request may meet again: as far apart from others' as its cached prefixes."""
    return Turns(state.turns, state.keys.cache_salt(context.key_id, chat.fields.salt))


def render_request(serving: Serving, chat: ChatRequest, turns: Turns | None = None) -> Prompt:
    """The whole prompt of a request, without running it; with `turns`, exactly the one that would run.

    Raises:
        ApiError: 400 with `param`.
    """
    truncates = chat.fields.truncate_prompt_tokens is not None
    check_text_length(serving, _contents(chat.messages), special=False, param=chat.messages_param, truncates=truncates)
    try:
        return chat_prompt(serving.tokenizer, chat, effort_table=serving.effort_table, turns=turns)
    except PromptError as error:
        param = error.param
        if param.startswith("messages") and chat.messages_param != "messages":
            param = chat.messages_param
        elif param.startswith("tool") and not offers_tools(chat):
            # No tools were passed on, so what the encoder blames on them stood in a message.
            param = chat.messages_param
        raise bad_request(echo(str(error)), param=param) from None


def truncated_prompt(serving: Serving, chat: ChatRequest, prompt: Prompt) -> Prompt:
    """What `truncate_prompt_tokens` leaves of the prompt; the same object when that is all of it."""
    kept = truncated(prompt.token_ids, chat.fields, serving.max_request_tokens, chat.max_tokens)
    if len(kept) == len(prompt.token_ids):
        return prompt
    dropped = len(prompt.token_ids) - len(kept) if chat.fields.truncation_side == "left" else 0
    turn_start = max(0, prompt.turn_start - dropped)
    turn_start = turn_start if turn_start <= len(kept) else 0
    return replace(prompt, token_ids=kept, turn_start=turn_start)


def default_tokens(tier: str | None, *, thinking: bool) -> int:
    """max_tokens of a request that names none."""
    if not thinking:
        return DEFAULT_TOKENS_CHAT
    return DEFAULT_TOKENS_MAX_EFFORT if tier == "max" else DEFAULT_TOKENS_THINKING


def _contents(messages: list[dict[str, Any]]) -> Iterator[str]:
    """Texts of the messages that are always rendered; shapes are checked later."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else [{"text": content}]:
            text = part.get("text") if isinstance(part, dict) else None
            if isinstance(text, str):
                yield text


def after_the_first(choices: list[Events]) -> list[Events]:
    """The same choices; all but the first wait for its first token, or its end."""
    if len(choices) == 1:
        return choices
    prefilled = asyncio.Event()

    async def first() -> Events:
        try:
            async with aclosing(choices[0]) as events:
                async for event in events:
                    if event.token_ids:
                        prefilled.set()
                    yield event
        finally:
            prefilled.set()

    async def later(choice: Events) -> Events:
        async with aclosing(choice) as events:
            await prefilled.wait()
            async for event in events:
                yield event

    return [first(), *(later(choice) for choice in choices[1:])]
