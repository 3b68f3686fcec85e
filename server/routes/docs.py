"""GET /openapi.json and /docs, with `--enable-docs`. The page is plain HTML: no script, nothing from elsewhere."""

import json
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.openapi import document, encoded

router = APIRouter(include_in_schema=False)

_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "pre{background:#f4f4f4;padding:1em;overflow:auto}summary{cursor:pointer}code{font-size:1em}"
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    return Response(encoded(request.app.routes), media_type="application/json")


@router.get("/docs")
async def docs(request: Request) -> Response:
    text = _page(document(request.app.routes))
    return Response(text, headers={"Content-Security-Policy": _POLICY}, media_type="text/html")


def _page(made: dict[str, Any]) -> str:
    title = f"{escape(made['info']['title'])} {escape(made['info']['version'])}"
    parts = ["<!doctype html><html lang=en><meta charset=utf-8>", f"<title>{title}</title><style>{_STYLE}</style>"]
    parts.append(f'<h1>{title}</h1><p><a href="openapi.json">openapi.json</a></p><h2>Endpoints</h2>')
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            words = escape(operation.get("description") or "")
            parts.append(_fold(f"<code>{method.upper()} {escape(path)}</code> {words}", operation))
    parts.append("<h2>Schemas</h2>")
    parts += [_fold(f"<code>{escape(name)}</code>", schema) for name, schema in made["components"]["schemas"].items()]
    return "\n".join(parts)


def _fold(head: str, value: Any) -> str:
    return f"<details><summary>{head}</summary><pre>{escape(json.dumps(value, indent=1))}</pre></details>"
