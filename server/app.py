"""The ASGI application: routes behind the guard, and every error in one JSON shape."""

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from server.errors import ApiError, internal
from server.middleware import Guard
from server.routes import chat, completions, messages, models, ops, responses, tokens
from server.state import ServerState


def create_app(state: ServerState) -> ASGIApp:
    """The whole HTTP side of one server."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.fathom = state
    for module in (chat, completions, responses, messages, models, tokens, ops):
        app.include_router(module.router)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    return Guard(app, config=state.config, keys=state.keys, metrics=state.metrics)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response(request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    """The router's own refusals: no such path, wrong method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        found = ApiError(404, "There is no such endpoint.", type="not_found_error", code="not_found")
    elif error.status_code == 405:
        found = ApiError(405, "This endpoint does not take this method.", code="method_not_allowed")
    else:
        found = ApiError(error.status_code, "The request was refused.", code="refused")
    found.headers.update(error.headers or {})
    return found.response(request.url.path)


async def _internal_error(request: Request, error: Exception) -> Response:
    # The guard logs where it happened: Starlette raises the error again after this answer.
    return internal().response(request.url.path)
