"""The OpenAPI document: the routes as they are, with the bodies they read and the answers they give.

`fathom openapi` prints it; a server shows it with `--enable-docs`. A route that stands in no table here is an error.
"""

from collections.abc import Sequence
from typing import Any

from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter
from starlette.routing import BaseRoute

from server.aliases import ALIASES
from server.config import VERSION
from server.errors import speaks_anthropic
from server.protocol import answers, sse
from server.protocol.batches import BatchBody
from server.protocol.chat import ChatBody
from server.protocol.completions import CompletionBody
from server.protocol.messages_request import CountBody, MessagesBody
from server.protocol.responses_request import ResponsesBody
from server.protocol.tokens import DetokenizeBody, TokenizeBody

_REF = "#/components/schemas/{model}"
_METHODS = ("get", "post", "delete")

_BODIES: dict[str, Any] = {
    "/v1/chat/completions": ChatBody,
    "/v1/chat/completions/render": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/completions/render": CompletionBody,
    "/v1/responses": ResponsesBody,
    "/v1/responses/input_tokens": ResponsesBody,
    "/v1/responses/render": ResponsesBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": CountBody,
    "/v1/messages/render": CountBody,
    "/v1/batches": BatchBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/render": ChatBody | CompletionBody | ResponsesBody | CountBody,
}
"""Of POST requests. The others have none, but for the form of the upload."""

_ANSWERS: dict[tuple[str, str], Any] = {
    ("post", "/v1/chat/completions"): answers.ChatCompletion,
    ("post", "/v1/completions"): answers.Completion,
    ("post", "/v1/responses"): answers.ResponseObject,
    ("post", "/v1/responses/input_tokens"): answers.InputTokens,
    ("get", "/v1/responses/{response_id}"): answers.ResponseObject,
    ("delete", "/v1/responses/{response_id}"): answers.DeletedResponse,
    ("post", "/v1/responses/{response_id}/cancel"): answers.ResponseObject,
    ("get", "/v1/responses/{response_id}/input_items"): answers.ItemList,
    ("post", "/v1/messages"): answers.Message,
    ("post", "/v1/messages/count_tokens"): answers.CountedTokens,
    ("get", "/v1/models"): answers.ModelList,
    ("get", "/v1/models/{model_id}"): answers.Model,
    ("post", "/v1/files"): answers.FileObject,
    ("get", "/v1/files"): answers.FileList,
    ("get", "/v1/files/{file_id}"): answers.FileObject,
    ("delete", "/v1/files/{file_id}"): answers.DeletedFile,
    ("post", "/v1/batches"): answers.BatchObject,
    ("get", "/v1/batches"): answers.BatchList,
    ("get", "/v1/batches/{batch_id}"): answers.BatchObject,
    ("post", "/v1/batches/{batch_id}/cancel"): answers.BatchObject,
    ("post", "/tokenize"): answers.Tokens,
    ("post", "/detokenize"): answers.Text,
    ("get", "/tokenizer_info"): answers.TokenizerInfo,
    **{
        ("post", path): answers.Rendered
        for path in ("/render", *(f"/v1/{api}/render" for api in ("chat/completions", "completions", "responses")))
    },
    ("post", "/v1/messages/render"): answers.Rendered,
    ("get", "/health"): answers.Health,
    ("get", "/health/live"): answers.Health,
    ("get", "/health/ready"): answers.Health,
    ("get", "/version"): answers.Version,
    ("get", "/"): answers.Root,
    ("get", "/server_info"): answers.ServerInfo,
    ("get", "/load"): answers.Load,
    ("get", "/user/balance"): answers.Balance,
}
"""JSON of a success."""

_OTHER_ANSWERS = {
    ("get", "/v1/files/{file_id}/content"): "application/octet-stream",
    ("get", "/metrics"): "text/plain",
}
_STREAMS = {
    *(("post", f"/v1/{api}") for api in ("chat/completions", "completions", "responses", "messages")),
    ("get", "/v1/responses/{response_id}"),
}
_EVENT = {
    "type": "object",
    "description": "Each event; `data` is JSON, or [DONE] at the end of a stream of completions.",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
_OPEN = ("/health", "/health/live", "/health/ready")

_UPLOAD = {
    "type": "object",
    "required": ["purpose", "file"],
    "properties": {
        "purpose": {"type": "string", "enum": ["batch"]},
        "file": {"type": "string", "format": "binary", "minLength": 1},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
    },
    "dependentRequired": {
        "expires_after[anchor]": ["expires_after[seconds]"],
        "expires_after[seconds]": ["expires_after[anchor]"],
    },
}


def document(routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of `routes`, as JSON values."""
    made = get_openapi(title="Fathom", version=VERSION, routes=routes, summary="An inference server for DeepSeek-V4.")
    body_refs, answer_refs, schemas = _schemas()
    for path, operations in made["paths"].items():
        for method in [method for method in _METHODS if method in operations]:
            operation = operations[method]
            operation["operationId"] = operation["summary"].lower().replace(" ", "_")
            if path in _OPEN:
                operation["security"] = []
            others = sorted(alias for alias, target in ALIASES.items() if target == path)
            if others:
                also = "Also as " + ", ".join(others) + "."
                operation["description"] = "\n\n".join(filter(None, (operation.get("description"), also)))
            if method == "post" and path == "/v1/files":
                operation["requestBody"] = _content({"multipart/form-data": _UPLOAD}, required=True)
            elif method == "post" and path in body_refs:
                operation["requestBody"] = _content({"application/json": body_refs[path]}, required=True)
            operation["responses"] = _responses(method, path, answer_refs)
    made["components"] = {
        "schemas": schemas,
        "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer"},
            "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        },
    }
    # The last: a server without keys.
    made["security"] = [{"bearer": []}, {"apiKey": []}, {}]
    return made


def encoded(routes: Sequence[BaseRoute]) -> bytes:
    return sse.json_bytes(document(routes))


def _schemas() -> tuple[dict[str, Any], dict[Any, Any], dict[str, Any]]:
    """(schema of each body, schema of each answer, what they refer to)."""
    found: dict[Any, Any] = {**_ANSWERS, "error": answers.Error, "anthropic": answers.AnthropicError}
    types: list[tuple[Any, Any, TypeAdapter[Any]]] = [
        *((path, "validation", TypeAdapter(body)) for path, body in _BODIES.items()),
        *((key, "serialization", TypeAdapter(answer)) for key, answer in found.items()),
    ]
    schemas, extra = TypeAdapter.json_schemas(types, ref_template=_REF)
    bodies = {key: schema for (key, mode), schema in schemas.items() if mode == "validation"}
    return bodies, {key: schema for (key, mode), schema in schemas.items() if mode != "validation"}, extra["$defs"]


def _responses(method: str, path: str, refs: dict[Any, Any]) -> dict[str, Any]:
    key = (method, path)
    content: dict[str, Any] = (
        {"application/json": refs[key]} if key in refs else {_OTHER_ANSWERS[key]: {"type": "string"}}
    )
    if key in _STREAMS:
        content["text/event-stream"] = _EVENT
    error = refs["anthropic" if speaks_anthropic(path) else "error"]
    found = {
        "200": _content(content, description="Success"),
        "4XX": _content({"application/json": error}, description="The request cannot be served as it is"),
        "503": _content({"application/json": error}, description="Not now; Retry-After says when"),
    }
    if path in _OPEN:
        found["503"] = _content({"application/json": refs[key]}, description="Not ready")
    return found


def _content(types: dict[str, Any], **members: Any) -> dict[str, Any]:
    return {**members, "content": {kind: {"schema": schema} for kind, schema in types.items()}}
