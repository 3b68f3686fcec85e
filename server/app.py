"""The ASGI application: routes behind the guard, and every error in one JSON shape."""

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from server.compat import in_dialect
from server.errors import ApiError, from_validation, internal
from server.middleware import Guard
from server.openapi import encoded
from server.routes import batches, chat, completions, docs, files, messages, models, ops, render, responses, tokens
from server.state import ServerState

ROUTERS: tuple[APIRouter, ...] = tuple(
    module.router for module in (chat, completions, responses, messages, models, files, batches, tokens, render, ops)
)
_PREFLIGHT_SECONDS = 600


def create_app(state: ServerState) -> ASGIApp:
    """The whole HTTP side of one server."""
    routes = frozenset(route.path for router in ROUTERS for route in router.routes if isinstance(route, Route))
    guard = Guard(create_routes(state), config=state.config, keys=state.keys, metrics=state.metrics, routes=routes)
    if not state.config.cors_origins:
        return guard
    # Outside the guard: a browser asks for permission without a key.
    return CORSMiddleware(
        guard,
        allow_origins=state.config.cors_origins,
        allow_methods=("GET", "HEAD", "POST", "DELETE"),
        allow_headers=("*",),
        expose_headers=("x-request-id", "retry-after"),
        max_age=_PREFLIGHT_SECONDS,
    )


def create_routes(state: ServerState) -> FastAPI:
    """The routes alone. Whoever calls them without the guard sets `scope["fathom"]`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.fathom = state
    for router in (*ROUTERS, docs.router) if state.config.enable_docs else ROUTERS:
        app.include_router(router)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    return app


def openapi() -> bytes:
    """The OpenAPI document in JSON."""
    return encoded([route for router in ROUTERS for route in router.routes])


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return in_dialect(error, request.app.state.fathom.config.api_compat).response(request.scope["path"])


async def _validation_error(request: Request, error: Exception) -> Response:
    """Parameters of the path and of the query; bodies are read by the routes."""
    assert isinstance(error, RequestValidationError)
    found = from_validation([{**part, "loc": part["loc"][1:]} for part in error.errors()])
    return found.response(request.scope["path"])


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
    return found.response(request.scope["path"])


async def _internal_error(request: Request, error: Exception) -> Response:
    # The guard logs where it happened: Starlette raises the error again after this answer.
    return internal().response(request.scope["path"])
