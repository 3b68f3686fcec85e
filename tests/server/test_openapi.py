"""The OpenAPI document: complete, the same wherever it is read, and kept by the server under schemathesis."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from starlette.routing import Route

from server.app import ROUTERS, openapi
from server.cli import main as fathom
from server.config import ServerConfig

DOCUMENT = json.loads(openapi())
OPERATIONS = [(method, path) for path, methods in DOCUMENT["paths"].items() for method in methods]
load_all_checks()
CHECKED = [
    CHECKS.get_one(name)
    for name in (
        *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
        *("response_schema_conformance", "response_headers_conformance"),
    )
]
NO_BODY = {"/v1/batches/{batch_id}/cancel", "/v1/responses/{response_id}/cancel"}


def test_every_route_is_in_it() -> None:
    routes = {
        (method.lower(), route.path.replace(":path}", "}"))
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, Route)
        for method in route.methods or ()
    }
    assert routes == set(OPERATIONS)
    ids = [DOCUMENT["paths"][path][method]["operationId"] for method, path in OPERATIONS]
    assert len(set(ids)) == len(ids)
    for method, path in OPERATIONS:
        operation = DOCUMENT["paths"][path][method]
        assert ("requestBody" in operation) == (method == "post" and path not in NO_BODY), path
        for answer in operation["responses"].values():
            assert all(content["schema"] for content in answer["content"].values())
    text = json.dumps(DOCUMENT)
    assert "HTTPValidationError" not in text
    assert "/beta/chat/completions" in DOCUMENT["paths"]["/v1/chat/completions"]["post"]["description"]
    body = DOCUMENT["components"]["schemas"]["CompletionBody"]["properties"]
    assert {part.get("type") for part in body["stop"]["anyOf"]} == {"string", "array"}


def test_it_is_printed_and_served_only_when_asked_for(serving: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert fathom(["openapi"]) == 0
    assert json.loads(capsys.readouterr().out) == DOCUMENT
    key = "a-secret-key"

    async def main() -> None:
        async with serving(answer="x") as server:
            for path in ("/openapi.json", "/docs"):
                assert (await server.http.get(path)).status_code == 404
        async with serving(answer="x", keys=[key], config=ServerConfig(enable_docs=True)) as server:
            for path in ("/openapi.json", "/docs"):
                assert (await server.http.get(path)).status_code == 401
            head = {"authorization": f"Bearer {key}"}
            assert (await server.http.get("/openapi.json", headers=head)).json() == DOCUMENT
            page = await server.http.get("/docs", headers=head)
            assert page.headers["content-type"].startswith("text/html")
            assert "default-src 'none'" in page.headers["content-security-policy"]
            assert "/v1/chat/completions" in page.text
            assert not [word for word in ("<script", "http://", "https://", "src=") if word in page.text]

    asyncio.run(main())


@pytest.fixture(scope="module")
def server(sim_model_dir: Path, start_server: Any) -> Iterator[Any]:
    with start_server(sim_model_dir, "--max-model-len", "2048") as running:
        yield running


def exercise(server: Any, method: str, path: str, *, examples: int, mode: GenerationMode) -> None:
    """Requests made from the schema; most name the model, or all would be the same 404."""
    operation = schemathesis.openapi.from_dict(DOCUMENT)[path][method.upper()]

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body and len(str(case.body)) % 4:
            case.body["model"] = "sim"
            for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                if isinstance(case.body.get(name), int):
                    case.body[name] = min(case.body[name], 8)
            if path not in ("/v1/completions", "/v1/batches", "/tokenize", "/detokenize", "/render"):
                case.body.setdefault("max_tokens", 8)
        answer = case.call(base_url=server.url, timeout=20)
        case.validate_response(answer, checks=CHECKED)

    run()


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answers_are_as_documented(server: Any, method: str, path: str) -> None:
    has_body = "requestBody" in DOCUMENT["paths"][path][method]
    exercise(server, method, path, examples=12 if has_body else 4, mode=GenerationMode.POSITIVE)
    if has_body:
        exercise(server, method, path, examples=8, mode=GenerationMode.NEGATIVE)


@pytest.mark.long
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answers_are_as_documented_for_long(server: Any, method: str, path: str) -> None:
    exercise(server, method, path, examples=100, mode=GenerationMode.POSITIVE)
    if "requestBody" in DOCUMENT["paths"][path][method]:
        exercise(server, method, path, examples=100, mode=GenerationMode.NEGATIVE)
