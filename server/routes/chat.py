"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.chat_run import ChatRun, start_chat
from server.errors import ApiError
from server.generation import GenerationEvent, TokenLogprob, Usage
from server.middleware import RequestContext, context_of
from server.prompt_scores import PromptScoresSeen
from server.protocol import sse
from server.protocol.chat import ChatBody
from server.protocol.chat_answer import ChatChunks, UsageIn, WholeChoice, call_deltas, chat_answer, chat_logprobs
from server.protocol.common import usage_counts
from server.reasoning_view import reasoning_view
from server.routes.call import read_body, state_of
from server.routes.generate import answer_id, merge, usage_of_choices
from server.routes.stream import EventStream, until_disconnect
from server.state import ServerState

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    body, num_bytes = await read_body(request, ChatBody)
    body.check()
    state, context = state_of(request), context_of(request.scope)
    serving = state.serving()
    state.check_model(body.model)
    chat = body.chat_request()
    scores = PromptScoresSeen(body.prompt_logprobs)
    with ExitStack() as stack:
        run = reasoning_view(await start_chat(state, serving, context, chat, num_bytes, stack), body)
        run.choices[0] = scores.watch(run.choices[0])
        if body.stream:
            usage_in = _usage_in(state, context, body)
            chunks = ChatChunks(
                answer_id("chatcmpl"), int(time.time()), state.model_name, num_choices=body.n, usage_in=usage_in
            )
            events = _Stream(run, chunks, body, usage_in).chunks()
            return EventStream(events, state, stack.pop_all().close)
        answer = await until_disconnect(request, state, _whole(run, state.model_name, body))
        if scores.columns is not None:
            answer = scores.added_to(answer, serving, run.prompt.token_ids)
        return Response(answer, media_type="application/json")


def _usage_in(state: ServerState, context: RequestContext, body: ChatBody) -> UsageIn:
    """DeepSeek's API puts it on the finish chunk, asked or not, and has no chunk of its own for it."""
    if context.dialect == "deepseek" or state.config.api_compat == "deepseek":
        return "finish"
    return "last_chunk" if body.include_usage else "none"


class _Stream:
    """The chunks of all choices, in the order of their events."""

    def __init__(self, run: ChatRun, chunks: ChatChunks, body: ChatBody, usage_in: UsageIn) -> None:
        self._run = run
        self._chunks = chunks
        self._body = body
        self._usage_in = usage_in
        self._plain = not (body.logprobs or body.return_token_ids or body.continuous_usage)
        self._rows: list[list[TokenLogprob]] = [[] for _ in run.choices]
        self._ids: list[list[int]] = [[] for _ in run.choices]
        self._num_tokens = [0] * len(run.choices)
        self._usages: dict[int, Usage] = {}

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        prompt_ids = self._run.prompt.token_ids.tolist() if self._body.return_token_ids else None
        try:
            async with aclosing(merge(self._run.choices)) as events:
                yield b"".join(
                    self._chunks.role(index, thinking=self._run.thinking, prompt_token_ids=prompt_ids)
                    for index in range(len(self._run.choices))
                )
                async for index, event in events:
                    chunk = self._chunk(index, event)
                    if chunk:
                        yield chunk
        except ApiError as error:
            yield sse.error_event(error)

    def _chunk(self, index: int, event: GenerationEvent) -> bytes:
        """Everything there is to say about one event."""
        if self._plain and event.finish_reason is None:
            # The way of nearly all tokens.
            if event.content and not event.reasoning and not event.calls:
                return self._chunks.content(index, event.content)
            if event.reasoning and not event.content and not event.calls:
                return self._chunks.reasoning(index, event.reasoning)
        if self._body.logprobs:
            self._rows[index] += event.logprobs
        if self._body.return_token_ids:
            self._ids[index] += event.token_ids
        self._num_tokens[index] += len(event.token_ids)
        parts = []
        if event.reasoning:
            extras = self._extras(index, reasoning=True)
            parts.append(self._chunks.delta(index, {"reasoning_content": event.reasoning}, **extras))
        if event.content:
            extras = self._extras(index, reasoning=False)
            parts.append(self._chunks.delta(index, {"content": event.content}, **extras))
        for call in event.calls:
            extras = self._extras(index, reasoning=False)
            parts.append(self._chunks.delta(index, call_deltas([call]), **extras))
        if event.finish_reason is not None:
            parts += self._finish(index, event)
        return b"".join(parts)

    def _finish(self, index: int, event: GenerationEvent) -> list[bytes]:
        assert event.usage is not None
        self._usages[index] = event.usage
        extras = self._extras(index, reasoning=None)
        last = len(self._usages) == len(self._run.choices)
        usage: dict[str, Any] = {}
        if last:
            in_order = [self._usages[n] for n in range(len(self._usages))]
            usage = usage_counts(usage_of_choices(in_order), thinking=self._run.thinking)
            if self._usage_in == "finish":
                extras["usage"] = usage
        parts = [self._chunks.delta(index, {}, finish_reason=event.finish_reason, **extras)]
        if last:
            if self._usage_in == "last_chunk":
                parts.append(self._chunks.usage(usage))
            parts.append(sse.DONE)
        return parts

    def _extras(self, index: int, *, reasoning: bool | None) -> dict[str, Any]:
        """Log probabilities of that part (of both for None), all ids so far, and the usage so far."""
        extras: dict[str, Any] = {}
        if self._body.logprobs:
            rows = self._rows[index]
            told = [row for row in rows if reasoning is None or row.reasoning == reasoning]
            self._rows[index] = [row for row in rows if reasoning is not None and row.reasoning != reasoning]
            extras["logprobs"] = _logprobs(told, self._body, thinking=self._run.thinking)
        if self._body.return_token_ids:
            extras["token_ids"], self._ids[index] = self._ids[index], []
        if self._body.continuous_usage:
            prompt, completion = len(self._run.prompt.token_ids), sum(self._num_tokens)
            extras["usage"] = {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            }
        return extras


def _logprobs(rows: list[TokenLogprob], body: ChatBody, *, thinking: bool) -> dict[str, Any]:
    return chat_logprobs(rows, thinking=thinking, as_ids=body.return_tokens_as_token_ids)


async def _whole(run: ChatRun, model: str, body: ChatBody) -> bytes:
    choices = [WholeChoice() for _ in run.choices]
    async with aclosing(merge(run.choices)) as events:
        async for index, event in events:
            choices[index].add(event)
    usages = [choice.usage for choice in choices if choice.usage is not None]
    assert len(usages) == len(choices)
    return chat_answer(
        choices,
        answer_id=answer_id("chatcmpl"),
        created=int(time.time()),
        model=model,
        thinking=run.thinking,
        usage=usage_counts(usage_of_choices(usages), thinking=run.thinking),
        logprobs=[_logprobs(c.rows, body, thinking=run.thinking) if body.logprobs else None for c in choices],
        prompt_token_ids=run.prompt.token_ids.tolist() if body.return_token_ids else None,
    )
