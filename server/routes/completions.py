"""POST /v1/completions: raw continuation of texts or token ids. No template and no BOS is added."""

import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from server.errors import ApiError, bad_request
from server.generation import GenerationEvent, TokenLogprob, Usage
from server.middleware import context_of
from server.protocol import sse
from server.protocol.common import check_token_ids, usage_counts
from server.protocol.completions import (
    DEFAULT_TOKENS,
    CompletionBody,
    CompletionChunks,
    TextOrIds,
    completion_answer,
    completion_choice,
    completion_logprobs,
)
from server.routes.call import check_text_length, completion_budget, estimated_tokens, off_loop, read_body, state_of
from server.routes.generate import Job, answer_id, merge, run, total_usage
from server.routes.stream import EventStream, until_disconnect
from server.state import Serving

router = APIRouter()

Merged = AsyncGenerator[tuple[int, GenerationEvent], None]


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    body, num_bytes = await read_body(request, CompletionBody)
    body.check()
    state, context = state_of(request), context_of(request.scope)
    serving = state.serving()
    state.check_model(body.model)
    prompts: tuple[TextOrIds, ...] = body.prompt
    share = estimated_tokens(num_bytes) // len(prompts) + 1
    with ExitStack() as stack:
        tickets = [stack.enter_context(state.admission.enter(context.key_id, share)) for _ in prompts]
        all_ids = await off_loop(num_bytes, lambda: encode_prompts(serving, prompts))
        jobs = []
        for ids, ticket in zip(all_ids, tickets, strict=True):
            ticket.count(len(ids))
            max_tokens = completion_budget(
                serving, len(ids), body.max_tokens, DEFAULT_TOKENS, param="prompt", limit_param="max_tokens"
            )
            sampling = body.sampling(serving.info, max_tokens, body.logprobs)
            jobs.append(Job(prompt_ids=ids, sampling=sampling, ticket=ticket, parse="raw"))
        events = merge([run(state, serving, context, body, job) for job in jobs])
        if body.stream:
            chunks = CompletionChunks(
                answer_id("cmpl"), int(time.time()), state.model_name, include_usage=body.include_usage
            )
            return EventStream(_stream(events, chunks, body, all_ids), state, stack.pop_all().close)
        answer = await until_disconnect(request, state, _whole(events, state.model_name, body, all_ids))
        return Response(answer, media_type="application/json")


def encode_prompts(serving: Serving, prompts: tuple[TextOrIds, ...]) -> list[np.ndarray]:
    """int32 ids of each prompt. Raises ApiError 400 for an empty prompt or an id that the model does not have."""
    encoded = []
    for n, prompt in enumerate(prompts):
        param = f"prompt[{n}]" if len(prompts) > 1 else "prompt"
        if isinstance(prompt, str):
            check_text_length(serving, [prompt], special=True, param=param)
            # A raw prompt is the caller's own template, so its special tokens are meant.
            ids = serving.tokenizer.encode(prompt, special=True)
        else:
            ids = prompt
            check_token_ids(ids, serving.info.vocab_size, param)
        if not ids:
            raise bad_request(f"{param} must not be empty.", param=param)
        encoded.append(np.asarray(ids, dtype=np.int32))
    return encoded


async def _stream(
    events: Merged, chunks: CompletionChunks, body: CompletionBody, prompts: list[np.ndarray]
) -> AsyncGenerator[bytes, None]:
    usages: list[Usage] = []
    rows: list[list[TokenLogprob]] = [[] for _ in prompts]
    ids: list[list[int]] = [[] for _ in prompts]
    untold = set(range(len(prompts))) if body.return_token_ids else set()
    try:
        async with aclosing(events):
            async for index, event in events:
                rows[index] += event.logprobs
                ids[index] += event.token_ids
                if event.content or event.finish_reason is not None:
                    yield chunks.text(
                        index,
                        event.content,
                        finish_reason=event.finish_reason,
                        logprobs=None if body.logprobs is None else completion_logprobs(rows[index]),
                        token_ids=ids[index] if body.return_token_ids else None,
                        prompt_token_ids=prompts[index].tolist() if index in untold else None,
                    )
                    rows[index], ids[index] = [], []
                    untold.discard(index)
                if event.usage is not None:
                    usages.append(event.usage)
            if body.include_usage:
                yield chunks.usage(usage_counts(total_usage(usages)))
            yield sse.DONE
    except ApiError as error:
        yield sse.error_event(error)


async def _whole(events: Merged, model: str, body: CompletionBody, prompts: list[np.ndarray]) -> bytes:
    texts: list[list[str]] = [[] for _ in prompts]
    rows: list[list[TokenLogprob]] = [[] for _ in prompts]
    ids: list[list[int]] = [[] for _ in prompts]
    reasons = ["stop"] * len(prompts)
    usages: list[Usage] = []
    async with aclosing(events):
        async for index, event in events:
            texts[index].append(event.content)
            rows[index] += event.logprobs
            ids[index] += event.token_ids
            if event.finish_reason is not None:
                assert event.usage is not None
                reasons[index] = event.finish_reason
                usages.append(event.usage)
    choices: list[dict[str, Any]] = [
        completion_choice(
            n,
            "".join(texts[n]),
            reasons[n],
            None if body.logprobs is None else completion_logprobs(rows[n]),
            ids[n] if body.return_token_ids else None,
            prompts[n].tolist() if body.return_token_ids else None,
        )
        for n in range(len(prompts))
    ]
    return completion_answer(
        answer_id=answer_id("cmpl"),
        created=int(time.time()),
        model=model,
        choices=choices,
        usage=usage_counts(total_usage(usages)),
    )
