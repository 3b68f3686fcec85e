"""POST /render: any request of the generating APIs to the exact prompt, without running it.

The API is named by the path (/v1/chat/completions/render ...) or, under /render, recognised by the body.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from server import limits
from server.chat_run import render_request, turns_of
from server.completion_prompt import encode_prompts
from server.errors import bad_request
from server.middleware import context_of
from server.protocol import sse
from server.protocol.chat import ChatBody
from server.protocol.completions import CompletionBody
from server.protocol.messages_request import PARAMS as MESSAGES_PARAMS
from server.protocol.messages_request import CountBody
from server.protocol.messages_request import to_chat as messages_chat
from server.protocol.responses_request import PARAMS as RESPONSES_PARAMS
from server.protocol.responses_request import ResponsesBody
from server.protocol.responses_request import to_chat as responses_chat
from server.routes.call import estimated_tokens, off_loop, read_body, renamed_params, state_of
from server.routes.messages import check_model
from server.state import Serving

router = APIRouter()

Rendered = tuple[str, np.ndarray]
"""Text and int32 ids of one prompt."""


@router.post("/render")
async def render(request: Request) -> Response:
    limits.check_content_type(request.scope["headers"])
    raw = await request.body()
    members = await off_loop(len(raw), lambda: limits.read_object(raw))
    if "prompt" in members:
        return await render_completion(request)
    if "messages" in members:
        return await render_chat(request)
    if "input" in members:
        return await render_response(request)
    raise bad_request(
        "Give `messages`, `input` or `prompt`, as the API has it whose prompt is asked for.", param="messages"
    )


@router.post("/v1/chat/completions/render")
async def render_chat(request: Request) -> Response:
    body, num_bytes = await read_body(request, ChatBody)
    body.check()
    state = state_of(request)
    state.check_model(body.model)
    chat = body.chat_request()
    turns = turns_of(state, context_of(request.scope), chat)

    def work(serving: Serving) -> list[Rendered]:
        token_ids = render_request(serving, chat, turns).token_ids
        return [(serving.tokenizer.decode(token_ids), token_ids)]

    return await _answer(request, num_bytes, work)


@router.post("/v1/responses/render")
async def render_response(request: Request) -> Response:
    body, num_bytes = await read_body(request, ResponsesBody)
    body.check()
    state = state_of(request)
    state.check_model(body.model)
    earlier = None
    if body.previous_response_id is not None:
        earlier = state.responses.find_previous(body.previous_response_id, context_of(request.scope).key_id)
        num_bytes += earlier.num_conversation_bytes

    chat = (await off_loop(num_bytes, lambda: responses_chat(body, earlier.conversation() if earlier else ()))).chat
    turns = turns_of(state, context_of(request.scope), chat)

    def work(serving: Serving) -> list[Rendered]:
        token_ids = render_request(serving, chat, turns).token_ids
        return [(serving.tokenizer.decode(token_ids), token_ids)]

    with renamed_params(RESPONSES_PARAMS):
        return await _answer(request, num_bytes, work)


@router.post("/v1/messages/render")
async def render_message(request: Request) -> Response:
    body, num_bytes = await read_body(request, CountBody)
    body.check()
    state = state_of(request)
    check_model(state, body.model)
    chat = await off_loop(num_bytes, lambda: messages_chat(body, state.model_name))
    turns = turns_of(state, context_of(request.scope), chat)

    def work(serving: Serving) -> list[Rendered]:
        token_ids = render_request(serving, chat, turns).token_ids
        return [(serving.tokenizer.decode(token_ids), token_ids)]

    with renamed_params(MESSAGES_PARAMS):
        return await _answer(request, num_bytes, work)


@router.post("/v1/completions/render")
async def render_completion(request: Request) -> Response:
    body, num_bytes = await read_body(request, CompletionBody)
    body.check()
    state_of(request).check_model(body.model)

    def work(serving: Serving) -> list[Rendered]:
        return [(serving.tokenizer.decode(ids), ids) for ids in encode_prompts(serving, body)]

    return await _answer(request, num_bytes, work)


async def _answer(request: Request, num_bytes: int, work: Callable[[Serving], list[Rendered]]) -> Response:
    state = state_of(request)
    serving = state.serving()
    with state.admission.enter(context_of(request.scope).key_id, estimated_tokens(num_bytes)):
        rendered = await off_loop(num_bytes, lambda: work(serving))
    prompts: list[dict[str, Any]] = [
        {"prompt": text, "token_ids": ids.tolist(), "count": len(ids)} for text, ids in rendered
    ]
    answer = {"object": "render", "model": state.model_name, "max_model_len": serving.info.max_model_len, **prompts[0]}
    if len(prompts) > 1:
        answer["prompts"] = prompts
    return Response(sse.json_bytes(answer), media_type="application/json")
