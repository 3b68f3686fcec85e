"""The Batches API. What runs them is server.batches.runner."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from server.batches.store import Batch
from server.middleware import context_of
from server.protocol import sse
from server.protocol.batches import BatchBody, page
from server.routes.call import read_body, state_of

router = APIRouter()

_MOST_LISTED = 100


@router.post("/v1/batches")
async def create_batch(request: Request) -> Response:
    body, _ = await read_body(request, BatchBody)
    state = state_of(request)
    batch = await state.batches.create(
        context_of(request.scope).key_id,
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        completion_window=body.completion_window,
        window_seconds=body.window_seconds,
        output_seconds=body.output_seconds,
        metadata=body.metadata,
    )
    state.batches_changed.set()
    return _answer(request, batch)


@router.get("/v1/batches")
async def list_batches(
    request: Request,
    after: Annotated[str | None, Query(max_length=128)] = None,
    limit: Annotated[int, Query(ge=1, le=_MOST_LISTED)] = 20,
) -> Response:
    state = state_of(request)
    batches, has_more = await state.batches.page(context_of(request.scope).key_id, after=after, limit=limit)
    items = [batch.to_dict(state.model_name) for batch in batches]
    return Response(sse.json_bytes(page(items, has_more=has_more)), media_type="application/json")


@router.get("/v1/batches/{batch_id}")
async def get_batch(request: Request, batch_id: str) -> Response:
    return _answer(request, await state_of(request).batches.get(context_of(request.scope).key_id, batch_id))


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel_batch(request: Request, batch_id: str) -> Response:
    state = state_of(request)
    batch = await state.batches.cancel(context_of(request.scope).key_id, batch_id)
    state.batches_changed.set()
    return _answer(request, batch)


def _answer(request: Request, batch: Batch) -> Response:
    return Response(sse.json_bytes(batch.to_dict(state_of(request).model_name)), media_type="application/json")
