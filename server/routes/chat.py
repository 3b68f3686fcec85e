"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.chat_run import start_chat
from server.errors import ApiError
from server.generation import GenerationEvent, TokenLogprob, Usage
from server.middleware import context_of
from server.protocol import sse
from server.protocol.chat import ChatBody, ChatChunks, chat_answer, chat_logprobs
from server.protocol.common import usage_counts
from server.routes.call import read_body, state_of
from server.routes.generate import answer_id
from server.routes.stream import EventStream, until_disconnect
from server.text.prompt import Prompt

router = APIRouter()

Events = AsyncGenerator[GenerationEvent, None]


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    body, num_bytes = await read_body(request, ChatBody)
    body.check()
    state, context = state_of(request), context_of(request.scope)
    serving = state.serving()
    state.check_model(body.model)
    chat = body.chat_request()
    with ExitStack() as stack:
        run = await start_chat(state, serving, context, chat, num_bytes, stack)
        if body.stream:
            chunks = ChatChunks(
                answer_id("chatcmpl"), int(time.time()), state.model_name, include_usage=body.include_usage
            )
            return EventStream(_stream(run.choices[0], chunks, body, run.prompt), state, stack.pop_all().close)
        answer = await until_disconnect(request, state, _whole(run.choices[0], state.model_name, body, run.prompt))
        return Response(answer, media_type="application/json")


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
