"""/v1/responses: create, retrieve, cancel, delete, list input items, count input tokens."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing
from secrets import token_hex
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from server.chat_run import Events, render_request, start_chat, truncated_prompt, turns_of
from server.errors import ApiError, bad_request
from server.middleware import context_of
from server.protocol import sse
from server.protocol.responses_events import ResponseBuilder, encode
from server.protocol.responses_items import listed
from server.protocol.responses_object import settings
from server.protocol.responses_request import PARAMS, ResponsesBody, ResponsesChat, to_chat
from server.protocol.responses_store import EventLog, Stored
from server.reasoning_view import reasoning_view
from server.routes.background import run_in_background
from server.routes.call import off_loop, read_body, renamed_params, state_of
from server.routes.stream import EventStream, until_disconnect
from server.state import ServerState

router = APIRouter()

MOST_LISTED = 100


@router.post("/v1/responses")
async def create_response(request: Request) -> Response:
    body, num_bytes = await read_body(request, ResponsesBody)
    body.check()
    state, context = state_of(request), context_of(request.scope)
    serving = state.serving()
    state.check_model(body.model)
    keeps = body.store and state.responses.max_bytes > 0
    if body.background and not keeps:
        raise bad_request("background: this server keeps no responses.", param="background")
    previous, asked, num_bytes = await asked_for(state, context.key_id, body, num_bytes)
    response_id = f"resp_{token_hex(16)}"
    response = settings(response_id, int(time.time()), state.model_name, body, asked)
    response["store"] = keeps
    builder = ResponseBuilder(
        response, asked.box, seals=body.wants_sealed_reasoning, logprobs=body.num_logprobs is not None
    )
    items = listed(body.own_items, f"{response_id.removeprefix('resp_')}_in")

    def keep(log: EventLog | None = None) -> Stored:
        return state.responses.open(
            response_id,
            context.key_id,
            items,
            snapshot=builder.response,
            previous=previous,
            background=body.background,
            log=log,
        )

    with ExitStack() as stack:
        with renamed_params(PARAMS):
            run = await start_chat(state, serving, context, asked.chat, num_bytes, stack)
        (events,) = reasoning_view(run, body).choices
        if body.background:
            stored = keep(EventLog() if body.stream else None)
            run_in_background(state, stored, builder, events, stack.pop_all())
            if stored.log is None:
                return _json(stored.body())
            return EventStream(stored.log.follow(), state, _nothing, failure=_unnumbered)
        if body.stream:
            return EventStream(
                _stream(events, builder, state, keep if keeps else None),
                state,
                stack.pop_all().close,
                failure=lambda error: b"".join(map(encode, builder.fail(error))),
            )
        await until_disconnect(request, state, _whole(events, builder))
        if keeps:
            state.responses.finish(keep())
        return _json(sse.json_bytes(builder.response()))


@router.post("/v1/responses/input_tokens")
async def count_input_tokens(request: Request) -> Response:
    """The prompt's length, without an answer."""
    body, num_bytes = await read_body(request, ResponsesBody)
    body.check()
    state, context = state_of(request), context_of(request.scope)
    serving = state.serving()
    state.check_model(body.model)
    _, asked, num_bytes = await asked_for(state, context.key_id, body, num_bytes)
    turns = turns_of(state, context, asked.chat)
    with renamed_params(PARAMS), state.admission.enter(context.key_id, 1):
        prompt = await off_loop(
            num_bytes, lambda: truncated_prompt(serving, asked.chat, render_request(serving, asked.chat, turns))
        )
    return _json(sse.json_bytes({"object": "response.input_tokens", "input_tokens": len(prompt.token_ids)}))


@router.get("/v1/responses/{response_id}")
async def get_response(
    request: Request, response_id: str, stream: bool = False, starting_after: Annotated[int, Query(ge=-1)] = -1
) -> Response:
    """The response as it is now, or its events from the one after `starting_after` on."""
    stored = _find(request, response_id)
    if not stream:
        return _json(stored.body())
    if stored.log is None:
        message = "Only responses made with background and stream can be streamed again."
        raise bad_request(message, param="stream")
    return EventStream(stored.log.follow(starting_after + 1), state_of(request), _nothing, failure=_unnumbered)


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(request: Request, response_id: str) -> Response:
    """Stop a response that runs in the background; one that is over stays as it is."""
    stored = _find(request, response_id)
    if not stored.background:
        raise bad_request("Only responses made with background can be cancelled.", param="response_id")
    if stored.task is not None:
        await _cancelled(stored)
    return _json(stored.body())


@router.delete("/v1/responses/{response_id}")
async def delete_response(request: Request, response_id: str) -> Response:
    stored = _find(request, response_id)
    state_of(request).responses.delete(stored)
    return _json(sse.json_bytes({"id": response_id, "object": "response", "deleted": True}))


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(
    request: Request,
    response_id: str,
    limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> Response:
    """The items of the request's own `input`, a page at a time."""
    items = _find(request, response_id).input_items()
    if order == "desc":
        items.reverse()
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise bad_request("after: there is no item with this id.", param="after")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    return _json(
        sse.json_bytes(
            {
                "object": "list",
                "data": page,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
                "has_more": len(items) > limit,
            }
        )
    )


async def asked_for(
    state: ServerState, key_id: str, body: ResponsesBody, num_bytes: int
) -> tuple[Stored | None, ResponsesChat, int]:
    """(the response that is continued, what is asked, bytes of the whole conversation). Raises ApiError 400."""
    previous = None
    if body.previous_response_id is not None:
        previous = state.responses.find_previous(body.previous_response_id, key_id)
        num_bytes += previous.num_conversation_bytes
    earlier = previous.conversation if previous is not None else list
    asked = await off_loop(num_bytes, lambda: to_chat(body, earlier()))
    return previous, asked, num_bytes


async def _stream(
    events: Events, builder: ResponseBuilder, state: ServerState, keep: Callable[[], Stored] | None
) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(events):
            yield b"".join(map(encode, builder.start()))
            async for news in events:
                made = builder.add(news)
                if builder.is_over and keep is not None:
                    # Before the client learns of the end, so that it can ask for it at once.
                    state.responses.finish(keep())
                if made:
                    yield b"".join(map(encode, made))
    except ApiError as error:
        yield b"".join(map(encode, builder.fail(error)))


async def _whole(events: Events, builder: ResponseBuilder) -> None:
    async with aclosing(events):
        builder.start()
        async for news in events:
            builder.add(news)


async def _cancelled(stored: Stored) -> None:
    task = stored.task
    assert task is not None
    task.cancel()
    await asyncio.wait([task])


def _find(request: Request, response_id: str) -> Stored:
    return state_of(request).responses.find(response_id, context_of(request.scope).key_id)


def _unnumbered(error: ApiError) -> bytes:
    """The end of a reader that follows a log: the response's own end has a number and is not ours to write."""
    event = {"type": "error", "code": error.code, "message": error.message, "param": None, "sequence_number": -1}
    return encode(event)


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def _nothing() -> None:
    """A log's reader holds nothing."""
