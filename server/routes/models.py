"""GET /v1/models and /v1/models/{id}, in OpenAI's and Anthropic's words at once."""

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.protocol import sse
from server.routes.call import state_of
from server.state import ServerState

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    model = _model(state_of(request))
    ends = {"first_id": model["id"], "last_id": model["id"], "has_more": False}
    return _json({"object": "list", "data": [model], **ends})


@router.get("/v1/models/{model_id:path}")
async def get_model(request: Request, model_id: str) -> Response:
    state = state_of(request)
    state.check_model(model_id)
    return _json(_model(state))


def _model(state: ServerState) -> dict[str, Any]:
    return {
        "id": state.model_name,
        "object": "model",
        "type": "model",
        "display_name": state.model_name,
        "created": state.created,
        "created_at": datetime.fromtimestamp(state.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "owned_by": "fathom",
        "max_model_len": state.serving().info.max_model_len,
    }


def _json(value: dict[str, Any]) -> Response:
    return Response(sse.json_bytes(value), media_type="application/json")
