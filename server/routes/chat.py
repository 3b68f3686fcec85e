"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.errors import ApiError, bad_request, echo
from server.generation import GenerationEvent, TokenLogprob, Usage
from server.middleware import context_of
from server.protocol import sse
from server.protocol.chat import (
    DEFAULT_TOKENS_CHAT,
    DEFAULT_TOKENS_MAX_EFFORT,
    DEFAULT_TOKENS_THINKING,
    ChatBody,
    ChatChunks,
    chat_answer,
    chat_logprobs,
)
from server.protocol.common import ThinkingFields, usage_counts
from server.routes.call import check_text_length, completion_budget, estimated_tokens, off_loop, read_body, state_of
from server.routes.generate import Job, answer_id, run
from server.routes.stream import EventStream, until_disconnect
from server.state import Serving
from server.text.effort import PromptError, resolve_thinking
from server.text.prompt import Prompt, render_chat

router = APIRouter()

Events = AsyncGenerator[GenerationEvent, None]


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    body, num_bytes = await read_body(request, ChatBody)
    body.check()
    state, context = state_of(request), context_of(request.scope)
    serving = state.serving()
    state.check_model(body.model)
    with ExitStack() as stack:
        ticket = stack.enter_context(state.admission.enter(context.key_id, estimated_tokens(num_bytes)))
        prompt, tier = await off_loop(num_bytes, lambda: render(serving, body, body.messages))
        ticket.count(len(prompt.token_ids))
        requested, limit_param = body.requested_tokens
        max_tokens = completion_budget(
            serving,
            len(prompt.token_ids),
            requested,
            default_tokens(tier, thinking=prompt.thinking),
            param="messages",
            limit_param=limit_param,
        )
        job = Job(
            prompt_ids=prompt.token_ids,
            sampling=body.sampling(serving.info, max_tokens, body.num_logprobs),
            ticket=ticket,
            parse="chat",
            starts_in=prompt.starts_in,
            continues=prompt.continues,
            turn_start=prompt.turn_start,
        )
        events = run(state, serving, context, body, job)
        if body.stream:
            chunks = ChatChunks(
                answer_id("chatcmpl"), int(time.time()), state.model_name, include_usage=body.include_usage
            )
            return EventStream(_stream(events, chunks, body, prompt), state, stack.pop_all().close)
        answer = await until_disconnect(request, state, _whole(events, state.model_name, body, prompt))
        return Response(answer, media_type="application/json")


def render(serving: Serving, body: ThinkingFields, messages: list[dict[str, Any]]) -> tuple[Prompt, str | None]:
    """The prompt of a conversation and the tier of its effort. Raises ApiError 400 with `param`."""
    check_text_length(serving, _contents(messages), special=False, param="messages")
    try:
        thinking, tier = resolve_thinking(body.thinking, body.reasoning_effort, body.chat_template_kwargs)
        return render_chat(serving.tokenizer, messages, thinking=thinking, reasoning_effort=tier), tier
    except PromptError as error:
        # No tools are passed on, so what the encoder blames on them stood in a message.
        param = "messages" if error.param.startswith("tool") else error.param
        raise bad_request(echo(str(error)), param=param) from None


def _contents(messages: list[dict[str, Any]]) -> Iterator[str]:
    """Texts of the messages that are always rendered; shapes are checked later."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else [{"text": content}]:
            text = part.get("text") if isinstance(part, dict) else None
            if isinstance(text, str):
                yield text


def default_tokens(tier: str | None, *, thinking: bool) -> int:
    if not thinking:
        return DEFAULT_TOKENS_CHAT
    return DEFAULT_TOKENS_MAX_EFFORT if tier == "max" else DEFAULT_TOKENS_THINKING


class _Extras:
    """Token ids and log probabilities that wait for the chunk of their text."""

    def __init__(self, body: ChatBody, *, thinking: bool) -> None:
        self._wants_logprobs = body.logprobs
        self._wants_ids = body.return_token_ids
        self._thinking = thinking
        self._rows: list[TokenLogprob] = []
        self._ids: list[int] = []

    def add(self, event: GenerationEvent) -> None:
        if self._wants_logprobs:
            self._rows += event.logprobs
        if self._wants_ids:
            self._ids += event.token_ids

    def take(self, *, reasoning: bool | None = None) -> tuple[dict[str, Any] | None, list[int] | None]:
        """Log probabilities of that part (of both for None) and all ids so far."""
        rows = [row for row in self._rows if reasoning is None or row.reasoning == reasoning]
        self._rows = [row for row in self._rows if reasoning is not None and row.reasoning != reasoning]
        ids, self._ids = self._ids, []
        logprobs = chat_logprobs(rows, thinking=self._thinking) if self._wants_logprobs else None
        return logprobs, ids if self._wants_ids else None


async def _stream(events: Events, chunks: ChatChunks, body: ChatBody, prompt: Prompt) -> AsyncGenerator[bytes, None]:
    plain = not body.logprobs and not body.return_token_ids
    extras = _Extras(body, thinking=prompt.thinking)
    try:
        async with aclosing(events):
            yield chunks.role(
                thinking=prompt.thinking,
                prompt_token_ids=prompt.token_ids.tolist() if body.return_token_ids else None,
            )
            async for event in events:
                parts = []
                if not plain:
                    extras.add(event)
                if event.reasoning:
                    more = () if plain else extras.take(reasoning=True)
                    parts.append(chunks.text(b"reasoning_content", event.reasoning, *more))
                if event.content:
                    more = () if plain else extras.take(reasoning=False)
                    parts.append(chunks.text(b"content", event.content, *more))
                if event.finish_reason is not None:
                    more = () if plain else extras.take()
                    parts.append(chunks.finish(event.finish_reason, *more))
                    assert event.usage is not None
                    if body.include_usage:
                        parts.append(chunks.usage(usage_counts(event.usage)))
                    parts.append(sse.DONE)
                if parts:
                    yield b"".join(parts)
    except ApiError as error:
        yield sse.error_event(error)


async def _whole(events: Events, model: str, body: ChatBody, prompt: Prompt) -> bytes:
    content: list[str] = []
    reasoning: list[str] = []
    rows: list[TokenLogprob] = []
    ids: list[int] = []
    usage: Usage | None = None
    finish_reason = "stop"
    async with aclosing(events):
        async for event in events:
            reasoning.append(event.reasoning)
            content.append(event.content)
            rows += event.logprobs
            ids += event.token_ids
            if event.finish_reason is not None:
                finish_reason, usage = event.finish_reason, event.usage
    assert usage is not None
    return chat_answer(
        answer_id=answer_id("chatcmpl"),
        created=int(time.time()),
        model=model,
        content="".join(content),
        reasoning="".join(reasoning) if prompt.thinking else None,
        finish_reason=finish_reason,
        usage=usage_counts(usage),
        logprobs=chat_logprobs(rows, thinking=prompt.thinking) if body.logprobs else None,
        prompt_token_ids=prompt.token_ids.tolist() if body.return_token_ids else None,
        token_ids=ids if body.return_token_ids else None,
    )
