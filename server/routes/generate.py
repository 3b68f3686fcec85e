"""From a checked request to its events: the generator with timing, queue accounting and errors around it."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from secrets import token_hex

import numpy as np

from engine.messages import Grammar, RequestError, SamplingParams
from server.admission import Admission, Ticket
from server.errors import ApiError, bad_request, overloaded
from server.generation import GenerationEvent, ParseMode, Usage
from server.metrics import RequestMeter
from server.middleware import RequestContext
from server.protocol.common import SamplingFields
from server.state import ServerState, Serving
from server.text.parser import StartsIn
from server.turns import TurnRecorder


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One prompt to answer."""

    prompt_ids: np.ndarray
    """int32 [prompt length]."""
    sampling: SamplingParams
    ticket: Ticket
    parse: ParseMode
    starts_in: StartsIn = "content"
    continues: bool = False
    tools: bool = False
    """The answer may hold tool calls."""
    grammar: Grammar | None = None
    """What the answer may be; None: anything."""
    turn_start: int = 0
    """Where another prompt of the same conversation is likely to part from this one; 0: unknown."""
    recorder: TurnRecorder | None = None


def answer_id(kind: str) -> str:
    """`kind-` and 128 random bits."""
    return f"{kind}-{token_hex(16)}"


async def run(
    state: ServerState, serving: Serving, context: RequestContext, body: SamplingFields, job: Job
) -> AsyncGenerator[GenerationEvent, None]:
    """The events of one answer. Closing the iterator aborts it.

    Raises:
        ApiError: the engine gave the request up.
    """
    lane = state.lane
    meter = RequestMeter(
        state.metrics, len(job.prompt_ids), job.sampling.max_tokens, context.arrival, measured=lane.measured
    )
    context.prompt_tokens += len(job.prompt_ids)
    reason = "abort"
    events = serving.generator.start(
        job.prompt_ids,
        job.sampling,
        parse=job.parse,
        starts_in=job.starts_in,
        continues=job.continues,
        tools=job.tools,
        stop=body.stop,
        include_stop=body.include_stop_str_in_output,
        cache_salt=state.keys.cache_salt(context.key_id, body.salt),
        grammar=job.grammar,
        priority=body.priority + lane.priority,
        deadline=context.arrival + state.config.queue_timeout if lane.queue_timeout else None,
        arrival_time=context.arrival,
        tenant=context.key_id,
        skip_special=body.skip_special_tokens,
        snapshot_positions=(job.turn_start,) if job.turn_start else (),
    )
    try:
        async with aclosing(events):
            async for event in events:
                if event.token_ids:
                    job.ticket.started()
                    meter.tokens(len(event.token_ids), event.queued_seconds)
                if event.finish_reason is not None:
                    reason = event.finish_reason
                if event.error is not None:
                    raise _engine_error(event.error, state.admission)
                if job.recorder is not None:
                    job.recorder.add(event)
                yield event
    finally:
        meter.finish(reason)
        context.completion_tokens += meter.num_tokens
        context.finish_reason = reason


async def merge(
    sources: Sequence[AsyncGenerator[GenerationEvent, None]],
) -> AsyncGenerator[tuple[int, GenerationEvent], None]:
    """Events of several answers as they come, each with its answer's number. The first error ends all of them."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for event in only:
                yield 0, event
        return
    # Unbounded, and yet bounded: an answer has at most max_tokens events.
    queue: asyncio.Queue[tuple[int, GenerationEvent | None]] = asyncio.Queue()

    async def pump(index: int, source: AsyncGenerator[GenerationEvent, None]) -> None:
        try:
            async with aclosing(source):
                async for event in source:
                    queue.put_nowait((index, event))
        finally:
            queue.put_nowait((index, None))

    tasks = [asyncio.create_task(pump(index, source)) for index, source in enumerate(sources)]
    try:
        remaining = len(tasks)
        while remaining:
            index, news = await queue.get()
            if news is not None:
                yield index, news
                continue
            remaining -= 1
            await tasks[index]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def total_usage(usages: Sequence[Usage]) -> Usage:
    return Usage(
        prompt_tokens=sum(u.prompt_tokens for u in usages),
        completion_tokens=sum(u.completion_tokens for u in usages),
        reasoning_tokens=sum(u.reasoning_tokens for u in usages),
        cached_tokens=sum(u.cached_tokens for u in usages),
    )


def usage_of_choices(usages: Sequence[Usage]) -> Usage:
    """Of several answers to one prompt, which counts once."""
    first = usages[0]
    return Usage(
        prompt_tokens=first.prompt_tokens,
        completion_tokens=sum(u.completion_tokens for u in usages),
        reasoning_tokens=sum(u.reasoning_tokens for u in usages),
        cached_tokens=first.cached_tokens,
        miss_reason=first.miss_reason,
    )


def _engine_error(error: RequestError, admission: Admission) -> ApiError:
    match error.code:
        case "deadline_exceeded":
            retry_after = admission.retry_after(admission.queued_requests)
            return overloaded(error.message, retry_after, code="deadline_exceeded")
        case "too_large":
            return bad_request(error.message, code="context_length_exceeded")
        case "no_token_left":
            return bad_request(error.message)
        case "internal":
            return ApiError(500, error.message, type="server_error", code="internal")
