"""Health, metrics and what is served: for operators, orchestrators and tools. None of it asks the engine for work."""

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from server.config import VERSION
from server.metrics import CONTENT_TYPE
from server.routes.call import state_of

router = APIRouter()


@router.get("/health/live")
async def live() -> Response:
    """The event loop answers."""
    return _json({"status": "live"})


@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """New work would be served: the engine is there, makes progress, and the server does not drain."""
    reason = state_of(request).not_ready()
    if reason is None:
        return _json({"status": "ready"})
    return _json({"status": "not ready", "reason": reason}, status=503)


@router.get("/health")
async def health(request: Request) -> Response:
    """The same as /health/ready."""
    return await ready(request)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    text = await asyncio.to_thread(state_of(request).metrics.render)
    return Response(text, media_type=CONTENT_TYPE)


@router.get("/version")
async def version() -> Response:
    return _json({"version": VERSION})


@router.get("/")
async def root(request: Request) -> Response:
    """Somebody is here: some clients ask before they send anything else."""
    return _json({"name": "fathom", "version": VERSION, "model": state_of(request).model_name})


@router.get("/server_info")
async def server_info(request: Request) -> Response:
    """What is served and with how much room; benchmarks ask for it."""
    state = state_of(request)
    info = state.serving().info
    return _json(
        {
            "version": VERSION,
            "model": state.model_name,
            "max_model_len": info.max_model_len,
            "vocab_size": info.vocab_size,
            "dtype": info.dtype,
            "kv_cache_dtype": info.kv_cache_dtype,
            "numerics": info.numerics,
            "page_tokens": info.page_tokens,
            "num_pages": info.num_pages,
            "num_slots": info.num_slots,
            "enable_prefix_cache": info.enable_prefix_cache,
        }
    )


@router.get("/load")
async def load(request: Request) -> Response:
    """Requests that are being answered, in vLLM's word for it."""
    return _json({"server_load": state_of(request).admission.in_flight})


@router.get("/user/balance")
async def balance() -> Response:
    """DeepSeek's: nobody pays here, so that there is always enough."""
    return _json({"is_available": True, "balance_infos": []})


def _json(value: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
