"""curl: what the bytes on the wire look like, and what the documentation's examples do."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")

JSON_HEADER = ("-H", "Content-Type: application/json")


@pytest.fixture
def curl(server: Any) -> Callable[..., tuple[int, str, dict[str, str]]]:
    """curl(path, *arguments): (status, body, headers by lower-case name)."""

    def run(path: str, *arguments: str) -> tuple[int, str, dict[str, str]]:
        command = ["curl", "-sS", "-N", "-i", "--max-time", "60", *arguments, server.url + path]
        done = subprocess.run(command, capture_output=True, check=True)
        head, _, body = done.stdout.decode().partition("\r\n\r\n")
        first, *lines = head.split("\r\n")
        return int(first.split()[1]), body, {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}

    return run


def chat_body(server: Any, **more: Any) -> tuple[str, ...]:
    messages = [{"role": "user", "content": "Hallo, Wörld"}]
    body = {"model": server.model, "messages": messages, "max_tokens": 8, "thinking": {"type": "disabled"}, **more}
    return (*JSON_HEADER, "-d", json.dumps(body))


def test_a_whole_answer(curl: Any, server: Any) -> None:
    status, body, headers = curl("/v1/chat/completions", *chat_body(server, ignore_eos=True))
    assert status == 200
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"]
    answer = json.loads(body)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 8


def test_the_framing_of_a_stream(curl: Any, server: Any) -> None:
    more = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    status, body, headers = curl("/v1/chat/completions", *chat_body(server, **more))
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert "\r" not in body
    assert body.endswith("data: [DONE]\n\n")
    events = body.removesuffix("\n\n").split("\n\n")
    assert all(re.fullmatch(r"data: \S.*|: ?\S*", event) for event in events)
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1] if event.startswith("data: ")]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]][-1] == "length"
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], 8)


def test_an_early_goodbye(curl: Any, server: Any) -> None:
    more = {"stream": True, "max_tokens": 3000, "ignore_eos": True}
    with pytest.raises(subprocess.CalledProcessError):
        curl("/v1/chat/completions", *chat_body(server, **more), "--max-time", "0.6")
    server.wait_for(server.is_empty, "the pages of the request")


@pytest.mark.parametrize(
    ("path", "arguments", "status"),
    [
        ("/v1/chat/completions", (*JSON_HEADER, "-d", "{"), 400),
        ("/v1/chat/completions", (*JSON_HEADER, "-d", '{"model": "x"}'), 400),
        ("/v1/chat/completions", (*JSON_HEADER, "-d", '{"model": NaN}'), 400),
        ("/v1/chat/completions", (*JSON_HEADER, "-d", "[" * 10_000), 400),
        ("/v1/chat/completions", (*JSON_HEADER, "-d", r'{"model": "\ud800", "messages": []}'), 400),
        ("/v1/chat/completions", ("-X", "DELETE"), 405),
        ("/v1/nothing", (), 404),
        ("/docs", (), 404),
        ("/v1/models/other", (), 404),
    ],
)
def test_errors_are_json(curl: Any, path: str, arguments: tuple[str, ...], status: int) -> None:
    got, body, headers = curl(path, *arguments)
    assert got == status
    assert headers["content-type"] == "application/json"
    error = json.loads(body)["error"]
    assert isinstance(error["message"], str)
    assert set(error) == {"message", "type", "param", "code"}


def test_tokens_and_back(curl: Any, server: Any) -> None:
    text = "Grüße 😀 <｜User｜>"
    body = json.dumps({"model": server.model, "prompt": text})
    tokens = json.loads(curl("/tokenize", *JSON_HEADER, "-d", body)[1])["tokens"]
    body = json.dumps({"model": server.model, "tokens": tokens})
    assert json.loads(curl("/detokenize", *JSON_HEADER, "-d", body)[1])["prompt"] == text


def test_operations(curl: Any, server: Any) -> None:
    for path in ("/health", "/health/live", "/health/ready", "/version", "/metrics", "/v1/models"):
        assert curl(path)[0] == 200
    assert json.loads(curl("/version")[1])["version"]
    assert f'model_name="{server.model}"' in curl("/metrics")[1]
