"""GET /v1/models and /v1/models/{id}."""

from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from server.routes.call import state_of
from server.state import ServerState

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    return _json({"object": "list", "data": [_model(state_of(request))]})


@router.get("/v1/models/{model_id:path}")
async def get_model(request: Request, model_id: str) -> Response:
    state = state_of(request)
    state.check_model(model_id)
    return _json(_model(state))


def _model(state: ServerState) -> dict[str, Any]:
    return {
        "id": state.model_name,
        "object": "model",
        "created": state.created,
        "owned_by": "fathom",
        "max_model_len": state.serving().info.max_model_len,
    }


def _json(value: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
