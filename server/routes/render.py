"""POST /render: any request of the generating APIs to the exact prompt, without running it.

The API is named by the path (/v1/chat/completions/render ...) or, under /render, recognised by the body.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from server import limits
from server.chat_request import ChatRequest
from server.chat_run import render_request, truncated_prompt, turns_of
from server.completion_prompt import encode_prompts
from server.errors import bad_request
from server.middleware import context_of
from server.protocol import messages_request, responses_request, sse
from server.protocol.chat import ChatBody
from server.protocol.completions import CompletionBody
from server.protocol.messages_request import CountBody
from server.protocol.responses_request import ResponsesBody
from server.routes.call import estimated_tokens, off_loop, read_body, renamed_params, state_of
from server.routes.messages import check_model
from server.routes.responses import asked_for
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
    if "input" in members or "previous_response_id" in members:
        return await render_response(request)
    if "messages" in members:
        # What chat completions do not have: Anthropic's version header, which its clients always send, and `system`.
        anthropic = "anthropic-version" in request.headers or "system" in members
        return await (render_message if anthropic else render_chat)(request)
    message = "Give `messages`, `input` or `prompt`, as the API has it whose prompt is asked for."
    raise bad_request(message, param="messages")


@router.post("/v1/chat/completions/render")
async def render_chat(request: Request) -> Response:
    body, num_bytes = await read_body(request, ChatBody)
    body.check()
    state_of(request).check_model(body.model)
    return await _answer_chat(request, num_bytes, body.chat_request())


@router.post("/v1/responses/render")
async def render_response(request: Request) -> Response:
    body, num_bytes = await read_body(request, ResponsesBody)
    body.check()
    state = state_of(request)
    state.check_model(body.model)
    _, asked, num_bytes = await asked_for(state, context_of(request.scope).key_id, body, num_bytes)
    with renamed_params(responses_request.PARAMS):
        return await _answer_chat(request, num_bytes, asked.chat)


@router.post("/v1/messages/render")
async def render_message(request: Request) -> Response:
    body, num_bytes = await read_body(request, CountBody)
    body.check()
    state = state_of(request)
    check_model(state, body.model)
    chat = await off_loop(num_bytes, lambda: messages_request.to_chat(body, state.model_name))
    with renamed_params(messages_request.PARAMS):
        return await _answer_chat(request, num_bytes, chat)


@router.post("/v1/completions/render")
async def render_completion(request: Request) -> Response:
    body, num_bytes = await read_body(request, CompletionBody)
    body.check()
    state_of(request).check_model(body.model)

    def work(serving: Serving) -> list[Rendered]:
        return [(serving.tokenizer.decode(ids), ids) for ids in encode_prompts(serving, body)]

    return await _answer(request, num_bytes, work)


async def _answer_chat(request: Request, num_bytes: int, chat: ChatRequest) -> Response:
    turns = turns_of(state_of(request), context_of(request.scope), chat)

    def work(serving: Serving) -> list[Rendered]:
        prompt = truncated_prompt(serving, chat, render_request(serving, chat, turns))
        return [(serving.tokenizer.decode(prompt.token_ids), prompt.token_ids)]

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
