"""POST /tokenize and /detokenize: the server's own reading of text, for clients that count or build prompts."""

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.chat_request import ChatRequest
from server.chat_run import render_request
from server.errors import bad_request
from server.middleware import context_of
from server.protocol import sse
from server.protocol.chat import thinking_of
from server.protocol.common import SamplingFields, check_token_ids
from server.protocol.tokens import DetokenizeBody, TokenizeBody
from server.routes.call import check_text_length, estimated_tokens, read_body, state_of
from server.state import Serving

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    body, num_bytes = await read_body(request, TokenizeBody)
    state = state_of(request)
    serving = state.serving()
    if body.model is not None:
        state.check_model(body.model)
    prompt, messages = body.prompt, body.messages
    if (prompt is None) == (messages is None):
        raise bad_request("Give either `prompt` or `messages`.", param="prompt")
    with state.admission.enter(context_of(request.scope).key_id, estimated_tokens(num_bytes)):
        if prompt is not None:
            ids = await asyncio.to_thread(_encode, serving, prompt)
        else:
            thinking, tier = thinking_of(body)
            chat = ChatRequest(
                messages=messages or [], thinking=thinking, tier=tier, fields=SamplingFields(model=state.model_name)
            )
            ids = (await asyncio.to_thread(render_request, serving, chat)).token_ids.tolist()
    texts = [serving.tokenizer.decode([n]) for n in ids] if body.return_token_strs else None
    answer = {"count": len(ids), "max_model_len": serving.info.max_model_len, "tokens": ids, "token_strs": texts}
    return Response(sse.json_bytes(answer), media_type="application/json")


def _encode(serving: Serving, prompt: str) -> list[int]:
    check_text_length(serving, [prompt], special=True, param="prompt")
    return serving.tokenizer.encode(prompt, special=True)


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    body, _ = await read_body(request, DetokenizeBody)
    state = state_of(request)
    serving = state.serving()
    if body.model is not None:
        state.check_model(body.model)
    check_token_ids(body.tokens, serving.info.vocab_size, "tokens")
    text = await asyncio.to_thread(serving.tokenizer.decode, body.tokens)
    return Response(sse.json_bytes({"prompt": text}), media_type="application/json")
