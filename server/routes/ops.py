"""Health, metrics and version: for operators and orchestrators. None of them asks the engine for work."""

import asyncio

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


def _json(value: dict[str, str], status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
