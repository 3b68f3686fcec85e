"""/tokenize, /detokenize, /tokenizer_info: how the server reads text, for clients that count or build prompts."""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.chat_request import ChatRequest
from server.chat_run import render_request
from server.errors import bad_request
from server.middleware import context_of
from server.protocol import sse
from server.protocol.chat import thinking_of
from server.protocol.common import SamplingFields
from server.protocol.tokens import DetokenizeBody, TokenizeBody
from server.protocol.tools import read_tool_choice, read_tools
from server.routes.call import check_text_length, estimated_tokens, read_body, state_of
from server.state import Serving
from server.validation import check_token_ids

router = APIRouter()

_BOS, _EOS, _PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"


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
    tokens: list[int] | list[list[int]]
    with state.admission.enter(context_of(request.scope).key_id, estimated_tokens(num_bytes)):
        if messages is not None:
            thinking, tier = thinking_of(body)
            choice, tools = read_tool_choice(body.tool_choice, True, read_tools(body.tools))
            chat = ChatRequest(
                messages=messages,
                tools=tools,
                tool_choice=choice,
                thinking=thinking,
                tier=tier,
                fields=SamplingFields(model=state.model_name),
            )
            tokens = (await asyncio.to_thread(render_request, serving, chat)).token_ids.tolist()
        elif isinstance(prompt, str):
            (tokens,) = await asyncio.to_thread(_encode, serving, [prompt], body.parse_special)
        else:
            tokens = await asyncio.to_thread(_encode, serving, prompt, body.parse_special)
    lists: Sequence[Any] = [tokens] if messages is not None or isinstance(prompt, str) else tokens
    answer: dict[str, Any] = {
        "count": sum(map(len, lists)),
        "max_model_len": serving.info.max_model_len,
        "tokens": tokens,
        "token_strs": None,
    }
    if body.return_token_strs:
        texts = [[serving.tokenizer.decode([n]) for n in ids] for ids in lists]
        answer["token_strs"] = texts[0] if lists[0] is tokens else texts
    return Response(sse.json_bytes(answer), media_type="application/json")


def _encode(serving: Serving, prompts: list[str], special: bool) -> list[list[int]]:
    check_text_length(serving, prompts, special=special, param="prompt")
    return [serving.tokenizer.encode(prompt, special=special) for prompt in prompts]


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    body, _ = await read_body(request, DetokenizeBody)
    state = state_of(request)
    serving = state.serving()
    if body.model is not None:
        state.check_model(body.model)
    nested = bool(body.tokens) and isinstance(body.tokens[0], list)
    lists = body.tokens if nested else [body.tokens]
    for ids in lists:
        check_token_ids(ids, serving.info.vocab_size, "tokens")

    def decode() -> list[str]:
        return [serving.tokenizer.decode(ids, skip_special=body.skip_special_tokens) for ids in lists]

    texts = await asyncio.to_thread(decode)
    text = texts if nested else texts[0]
    # vLLM's name and SGLang's.
    return Response(sse.json_bytes({"prompt": text, "text": text}), media_type="application/json")


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """What tools that count tokens over HTTP want to know. There is no chat template: /render renders."""
    serving = state_of(request).serving()
    answer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": serving.info.max_model_len,
        "vocab_size": serving.info.vocab_size,
        **{
            name: token if serving.tokenizer.special_id(token) is not None else None
            for name, token in (("bos_token", _BOS), ("eos_token", _EOS), ("pad_token", _PAD))
        },
        "add_bos_token": False,
        "add_eos_token": False,
        "chat_template": None,
    }
    return Response(sse.json_bytes(answer), media_type="application/json")
