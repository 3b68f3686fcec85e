"""POST /v1/messages and /v1/messages/count_tokens, the Anthropic API."""

from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from secrets import token_hex

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.chat_run import Events, render_request, start_chat, truncated_prompt, turns_of
from server.errors import ApiError
from server.middleware import context_of
from server.protocol import sse
from server.protocol.messages_events import PING, MessageBuilder, encode, failure
from server.protocol.messages_request import PARAMS, CountBody, MessagesBody, to_chat
from server.reasoning_view import reasoning_view
from server.routes.call import off_loop, read_body, renamed_params, state_of
from server.routes.stream import EventStream, until_disconnect
from server.state import ServerState

router = APIRouter()


@router.post("/v1/messages")
async def create_message(request: Request) -> Response:
    body, num_bytes = await read_body(request, MessagesBody)
    body.check()
    state, context = state_of(request), context_of(request.scope)
    serving = state.serving()
    check_model(state, body.model)
    chat = await off_loop(num_bytes, lambda: to_chat(body, state.model_name))
    with ExitStack() as stack:
        with renamed_params(PARAMS):
            run = await start_chat(state, serving, context, chat, num_bytes, stack)
        (events,) = reasoning_view(run, body).choices
        builder = MessageBuilder(
            f"msg_{token_hex(16)}",
            state.model_name,
            len(run.prompt.token_ids),
            omits_thinking=body.omits_thinking,
        )
        if body.stream:
            stream = _stream(events, builder)
            return EventStream(stream, state, stack.pop_all().close, failure=failure, keep_alive=PING)
        await until_disconnect(request, state, _whole(events, builder))
        return Response(sse.json_bytes(builder.message()), media_type="application/json")


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request) -> Response:
    """The prompt's length, without an answer: `input_tokens + cache_read_input_tokens` of the answer's usage."""
    body, num_bytes = await read_body(request, CountBody)
    body.check()
    state, context = state_of(request), context_of(request.scope)
    serving = state.serving()
    check_model(state, body.model)
    chat = await off_loop(num_bytes, lambda: to_chat(body, state.model_name))
    turns = turns_of(state, context, chat)
    with renamed_params(PARAMS), state.admission.enter(context.key_id, 1):
        prompt = await off_loop(
            num_bytes, lambda: truncated_prompt(serving, chat, render_request(serving, chat, turns))
        )
    return Response(sse.json_bytes({"input_tokens": len(prompt.token_ids)}), media_type="application/json")


def check_model(state: ServerState, name: str) -> None:
    """Anthropic's own names mean the model that is served: agents have them built in. Raises ApiError 404."""
    if not name.startswith("claude"):
        state.check_model(name)


async def _stream(events: Events, builder: MessageBuilder) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(events):
            yield b"".join(map(encode, builder.start())) + PING
            async for news in events:
                made = builder.add(news)
                if made:
                    yield b"".join(map(encode, made))
    except ApiError as error:
        yield failure(error)


async def _whole(events: Events, builder: MessageBuilder) -> None:
    async with aclosing(events):
        async for news in events:
            builder.add(news)
