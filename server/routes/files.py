"""The Files API: inputs of batches and their results."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response, StreamingResponse

from server.errors import ApiError, bad_request, echo
from server.middleware import context_of
from server.protocol import sse
from server.protocol.batches import expiry, page
from server.protocol.multipart import read_form
from server.routes.call import off_loop, state_of

router = APIRouter()

_MOST_LISTED = 10_000


@router.post("/v1/files")
async def upload_file(request: Request) -> Response:
    state = state_of(request)
    _refuse_foreign_pages(request, state.config.cors_origins)
    raw = await request.body()
    form = await off_loop(len(raw), lambda: read_form(_content_type(request), raw))
    purpose = form.fields.get("purpose")
    if purpose != "batch":
        message = f"purpose: only `batch` is supported, found `{echo(purpose or '')}`."
        raise bad_request(message, param="purpose", code="unsupported_parameter")
    if "file" not in form.files:
        raise bad_request("file: the form has no file of this name.", param="file")
    filename, data = form.files["file"]
    if not data:
        raise bad_request("file: the file is empty.", param="file")
    owner = context_of(request.scope).key_id
    file = await state.files.add(owner, filename, data, seconds=expiry(form.fields))
    return _json(file.to_dict())


@router.get("/v1/files")
async def list_files(
    request: Request,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
    after: Annotated[str | None, Query(max_length=128)] = None,
    limit: Annotated[int, Query(ge=1, le=_MOST_LISTED)] = _MOST_LISTED,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    files, has_more = await state_of(request).files.page(
        context_of(request.scope).key_id, purpose=purpose, after=after, limit=limit, newest_first=order == "desc"
    )
    return _json(page([file.to_dict() for file in files], has_more=has_more))


@router.get("/v1/files/{file_id}")
async def get_file(request: Request, file_id: str) -> Response:
    file = await state_of(request).files.get(context_of(request.scope).key_id, file_id)
    return _json(file.to_dict())


@router.delete("/v1/files/{file_id}")
async def delete_file(request: Request, file_id: str) -> Response:
    await state_of(request).files.delete(context_of(request.scope).key_id, file_id)
    return _json({"id": file_id, "object": "file", "deleted": True})


@router.get("/v1/files/{file_id}/content")
async def file_content(request: Request, file_id: str) -> Response:
    files = state_of(request).files
    file = await files.get(context_of(request.scope).key_id, file_id)
    # What a client uploaded is never shown by a browser as a page of this server.
    headers = {
        "Content-Length": str(file.bytes),
        "Content-Disposition": f'attachment; filename="{file.id}.jsonl"',
        "X-Content-Type-Options": "nosniff",
    }
    return StreamingResponse(files.read(file), headers=headers, media_type="application/octet-stream")


def _refuse_foreign_pages(request: Request, allowed: tuple[str, ...]) -> None:
    """A browser sends forms across origins without asking first, so that the question is asked here."""
    origin = request.headers.get("origin")
    if origin is not None and origin not in allowed and "*" not in allowed:
        raise ApiError(403, "Pages of this origin may not upload files.", code="origin_not_allowed")


def _content_type(request: Request) -> bytes:
    for name, value in request.scope["headers"]:
        if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise ApiError(415, "Compressed request bodies are not accepted.", code="unsupported_media_type")
    return b"".join(value for name, value in request.scope["headers"] if name == b"content-type")


def _json(value: object) -> Response:
    return Response(sse.json_bytes(value), media_type="application/json")
