"""The OpenAPI document: complete, the same wherever it is read, and kept by the server under schemathesis."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
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


MESSAGES = [{"role": "user", "content": "hi"}]
RUNS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 6},
    "/v1/completions": {"prompt": "hi", "max_tokens": 6},
    "/v1/responses": {"input": "hi", "max_output_tokens": 6},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 6},
}
"""What a body needs to run: random conversations and schemas are all refused."""
RUNS |= {path + "/render": body for path, body in RUNS.items()} | {
    "/v1/responses/input_tokens": RUNS["/v1/responses"],
    "/v1/messages/count_tokens": RUNS["/v1/messages"],
    "/render": RUNS["/v1/completions"],
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [5, 6]},
}
KEPT = {
    *("temperature", "top_p", "top_k", "seed", "presence_penalty", "logprobs", "n", "return_token_ids", "stream"),
    *("echo", "stop_sequences", "metadata", "store", "include_reasoning", "return_token_strs", "skip_special_tokens"),
}
"""Fields that cannot make such a body wrong."""


class Subject:
    """The server, and things in it that a path can name."""

    def __init__(self, server: Any) -> None:
        self.url = server.url
        self._request = server.request
        self._batch = self._response = ""

    def file(self) -> str:
        line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "sim", "prompt": "x"}}
        form = {"file": ("in.jsonl", json.dumps(line).encode())}
        answer = httpx.post(self.url + "/v1/files", files=form, data={"purpose": "batch"}, timeout=20)
        return answer.json()["id"]

    def batch(self) -> str:
        if not self._batch:
            body = {"input_file_id": self.file(), "endpoint": "/v1/completions", "completion_window": "1h"}
            self._batch = self._request("/v1/batches", body)[1]["id"]
        return self._batch

    def response(self) -> str:
        return self._request("/v1/responses", {"model": "sim", **RUNS["/v1/responses"]})[1]["id"]

    def named(self, parameter: str) -> str:
        made = {"file_id": self.file, "batch_id": self.batch, "response_id": self.response, "model_id": lambda: "sim"}
        return made[parameter]()


def exercise(subject: Subject, method: str, path: str, *, examples: int, mode: GenerationMode) -> set[int]:
    """Requests made from the schema; every other one is made to run. Returns the statuses."""
    operation = schemathesis.openapi.from_dict(DOCUMENT)[path][method.upper()]
    statuses: set[int] = set()
    count = 0

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
        nonlocal count
        count += 1
        if mode == GenerationMode.POSITIVE and count % 2:
            for name in case.path_parameters or ():
                case.path_parameters[name] = subject.named(name)
            if path in RUNS:
                kept = {name: value for name, value in case.body.items() if name in KEPT & operation_fields(path)}
                case.body = {**kept, "model": "sim", **RUNS[path]}
            elif path == "/v1/batches" and method == "post":
                case.body["input_file_id"] = subject.file()
            case.query = {}
        answer = case.call(base_url=subject.url, timeout=20)
        statuses.add(answer.status_code)
        case.validate_response(answer, checks=CHECKED)

    run()
    return statuses


def operation_fields(path: str) -> set[str]:
    """Members of a body whose schema is one object."""
    schema = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = schema.get("$ref", "").rsplit("/", 1)[-1]
    return set(DOCUMENT["components"]["schemas"].get(name, {}).get("properties", ()))


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answers_are_as_documented(server: Any, method: str, path: str) -> None:
    has_body = "requestBody" in DOCUMENT["paths"][path][method]
    check(server, method, path, positive=12 if has_body else 4, negative=6 if has_body else 0)


@pytest.mark.long
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answers_are_as_documented_for_long(server: Any, method: str, path: str) -> None:
    check(server, method, path, positive=150, negative=100 if "requestBody" in DOCUMENT["paths"][path][method] else 0)


def check(server: Any, method: str, path: str, *, positive: int, negative: int) -> None:
    subject = Subject(server)
    statuses = exercise(subject, method, path, examples=positive, mode=GenerationMode.POSITIVE)
    # A batch that is over cannot be cancelled, nor a response that did not run in the background.
    assert 200 in statuses or path.endswith("/cancel"), "success was never seen"
    if negative:
        exercise(subject, method, path, examples=negative, mode=GenerationMode.NEGATIVE)
