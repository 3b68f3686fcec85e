"""The real thing: `python -m server` with a simulated engine in its own process, spoken to over TCP."""

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

ROOT = Path(__file__).parents[2]
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
LONG = {"model": "sim", "prompt": "hi", "max_tokens": 20_000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def server(sim_model_dir: Path, start_server: Any) -> Iterator[Any]:
    with start_server(sim_model_dir, "--max-model-len", "65536") as running:
        yield running


@contextmanager
def stream(
    server: Any, body: dict[str, Any] = LONG, path: str = "/v1/completions"
) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        yield connection.getresponse()
    finally:
        connection.close()


def wait_for(condition: Any, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def idle(server: Any) -> bool:
    return bool(
        server.metric("vllm:num_requests_running") == 0
        and server.metric("fathom_pages_free") == server.metric("fathom_pages_total")
        and server.metric("fathom_slots_free") == server.metric("fathom_slots_total")
    )


def raw(server: Any, data: bytes, seconds: float = 3.0) -> bytes:
    """What the server answers to these bytes until it closes or falls silent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        connection.sendall(data)
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
        except TimeoutError:
            return answer + b"(open)"
        except ConnectionResetError:
            return answer
        return answer


def test_ready_line_and_endpoints(server: Any) -> None:
    assert server.ready_line == f"Fathom 0.1.0 serving sim on http://127.0.0.1:{server.port}\n"
    assert server.request("/health")[:2] == (200, {"status": "ready"})
    assert server.request("/health/live")[1] == {"status": "live"}
    assert server.request("/version")[1] == {"version": "0.1.0"}
    status, text, headers = server.request("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "vllm:cache_config_info" in text
    assert {name.lower() for name in headers} == {
        "date",
        "content-length",
        "content-type",
        "connection",
        "x-request-id",
    }


def test_openai_sdk(server: Any) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": "hello"}]
    assert [m.id for m in client.models.list()] == ["sim"]
    whole = client.chat.completions.create(model="sim", messages=messages, seed=1, max_tokens=40)
    assert whole.usage is not None
    assert whole.choices[0].finish_reason in ("stop", "length")
    reasoning, content, last = "", "", None
    for chunk in client.chat.completions.create(
        model="sim", messages=messages, seed=1, max_tokens=40, stream=True, stream_options={"include_usage": True}
    ):
        if chunk.choices:
            reasoning += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
            content += chunk.choices[0].delta.content or ""
        last = chunk
    assert last is not None
    assert last.usage is not None
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.total_tokens == whole.usage.total_tokens
    # The prompt has been answered before: all but what opens the turn is cached now.
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens == last.usage.prompt_tokens - 2
    assert last.usage.completion_tokens_details == whole.usage.completion_tokens_details
    assert content == whole.choices[0].message.content
    assert reasoning == whole.choices[0].message.reasoning_content  # type: ignore[attr-defined]
    completion = client.completions.create(model="sim", prompt=[5, 6, 7], max_tokens=3, logprobs=2)
    assert completion.choices[0].logprobs is not None
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=messages)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="sim", messages=messages, temperature=9)
    assert wrong.value.param == "temperature"
    assert wrong.value.request_id


def test_200_streams_at_once(server: Any) -> None:
    body = {"model": "sim", "messages": [{"role": "user", "content": "x"}], "max_tokens": 30, "ignore_eos": True}

    async def one(client: httpx.AsyncClient, n: int) -> None:
        asked = {**body, "seed": n, "stream": True, "stream_options": {"include_usage": True}}
        answer = await client.post("/v1/chat/completions", json=asked)
        assert answer.status_code == 200
        *_, usage, done = answer.text.rstrip("\n").split("\n\n")
        assert done == "data: [DONE]"
        assert json.loads(usage[6:])["usage"]["completion_tokens"] == 30

    async def main() -> None:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            await asyncio.gather(*(one(client, n) for n in range(200)))

    asyncio.run(main())
    wait_for(lambda: idle(server))


def test_a_dropped_connection_frees_its_pages(server: Any) -> None:
    for whole in (False, True):
        connection = socket.create_connection(("127.0.0.1", server.port))
        body = json.dumps({**LONG, "stream": not whole}).encode()
        connection.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: server.metric("vllm:num_requests_running") == 1)
        assert server.metric("fathom_pages_free") < server.metric("fathom_pages_total")
        if whole:
            # RST instead of FIN.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
        wait_for(lambda: idle(server), 1.5)


BAD_HTTP = [
    b"GET /nope HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: banana\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 200_000 + b"\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
]


@pytest.mark.parametrize("data", BAD_HTTP, ids=range(len(BAD_HTTP)))
def test_unreadable_http_is_refused_in_json_or_closed(server: Any, data: bytes) -> None:
    answer = raw(server, data, 0.5).removesuffix(b"(open)")
    if answer:
        assert answer.startswith(b"HTTP/1.1 4")
        assert b'{"error":{"message":"' in answer
    assert server.request("/health")[0] == 200


def test_bad_chunks_in_a_body_close_the_connection(server: Any) -> None:
    head = POST + b"transfer-encoding: chunked\r\n\r\n"
    for chunk in (b"zz\r\nxx\r\n", b"5\r\nhelloXX", b"f" * 30 + b"\r\n"):
        assert not raw(server, head + chunk).endswith(b"(open)")
    assert server.request("/health")[0] == 200


def test_declared_oversize_is_answered_before_it_is_read(server: Any) -> None:
    head = POST + b"content-length: 10737418240\r\n\r\n"
    before = time.monotonic()
    answer = raw(server, head + b"x" * 100_000)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert not answer.endswith(b"(open)")
    assert time.monotonic() - before < 2.5


def test_many_requests_on_one_connection(server: Any) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    for n in range(30):
        body = {"model": "sim", "prompt": [5], "max_tokens": 1, ("temperature", "top_p", "n")[n % 3]: -n - 1}
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]["param"]) == (
            400,
            ("temperature", "top_p", "n")[n % 3],
        )
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()


def test_a_slow_request_head_is_cut_off(sim_model_dir: Path, start_server: Any) -> None:
    with start_server(sim_model_dir, "--header-timeout", "0.5", "--served-model-name", "my/model") as server:
        assert server.request("/v1/models/my/model")[1]["id"] == "my/model"
        assert server.request("/v1/models/sim")[0] == 404
        for start in (b"", b"GET /hea"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
                before = time.monotonic()
                connection.sendall(start)
                if start:
                    time.sleep(0.3)
                    connection.sendall(b"l")
                assert connection.recv(100) == b""
                assert 0.3 < time.monotonic() - before < 2
        assert server.request("/health")[0] == 200
        server.process.terminate()
        assert server.wait() == 0


def test_keys_over_http(sim_model_dir: Path, start_server: Any, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("file-key-1\n", encoding="utf-8")
    with start_server(sim_model_dir, "--host", "0.0.0.0", "--api-key-file", str(file), key="environment-key") as server:
        server.url = f"http://127.0.0.1:{server.port}"
        assert server.request("/v1/models")[0] == 401
        assert server.request("/health")[0] == 200
        for key in ("file-key-1", "environment-key"):
            assert server.request("/v1/models", authorization=f"Bearer {key}")[0] == 200
        command = Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
        assert b"environment-key" not in command


def test_drain(sim_model_dir: Path, start_server: Any) -> None:
    with start_server(sim_model_dir, "--drain-timeout", "20") as server:
        engine = server.engine_pid()
        with stream(server, {**LONG, "max_tokens": 400}) as short:
            assert short.readline().startswith(b"data:")
            server.process.terminate()
            wait_for(lambda: server.request("/health/ready")[0] == 503, 1)
            status, body, headers = server.request("/v1/completions", {"model": "sim", "prompt": "x"})
            assert (status, body["error"]["code"]) == (503, "server_draining")
            assert int(headers["retry-after"]) >= 1
            text = short.read()
            assert text.endswith(b"data: [DONE]\n\n")
            assert b'"finish_reason":"length"' in text
        assert server.wait() == 0
        assert not Path(f"/proc/{engine}").exists()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", server.port))


def test_drain_timeout_and_second_signal(sim_model_dir: Path, start_server: Any) -> None:
    for flags, signals in ((("--drain-timeout", "0.5"), 1), (("--drain-timeout", "100"), 2)):
        with start_server(sim_model_dir, *flags) as server, stream(server) as long:
            long.readline()
            before = time.monotonic()
            for number in (signal.SIGTERM, signal.SIGINT)[:signals]:
                server.process.send_signal(number)
                time.sleep(0.1)
            text = long.read()
            assert b"[DONE]" not in text
            last = text.strip(b"\n").split(b"\n\n")[-1]
            assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "server_draining"
            assert server.wait() == 0
            assert time.monotonic() - before < 5


def test_idle_exit_is_quick(sim_model_dir: Path, start_server: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with start_server(sim_model_dir) as server:
            kept_open = socket.create_connection(("127.0.0.1", server.port))
            before = time.monotonic()
            server.process.send_signal(number)
            assert server.wait() == 0
            assert time.monotonic() - before < 5
            kept_open.close()


def test_a_signal_while_the_engine_loads(sim_model_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "server", str(sim_model_dir), "--simulate", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_for(lambda: children.read_text(), 20)
        # A stopped engine never gets ready; the server listens all the same.
        engine = int(children.read_text())
        os.kill(engine, signal.SIGSTOP)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/health/ready")
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["reason"]) == (503, "server_loading")
        connection.request("GET", "/v1/models")
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (503, "server_loading")
        connection.request("GET", "/health/live")
        assert connection.getresponse().read() == b'{"status":"live"}'
        process.terminate()
        assert process.wait(10) == 0
        assert not Path(f"/proc/{engine}").exists()
    finally:
        process.kill()


def test_a_killed_engine_ends_streams_and_the_server(sim_model_dir: Path, start_server: Any) -> None:
    with start_server(sim_model_dir) as server:
        whole: list[Any] = []
        body = {**LONG, "stream": False}
        asking = threading.Thread(target=lambda: whole.append(server.request("/v1/completions", body)))
        with stream(server) as open_stream:
            open_stream.readline()
            asking.start()
            wait_for(lambda: server.metric("vllm:num_requests_running") == 2)
            before = time.monotonic()
            os.kill(server.engine_pid(), signal.SIGKILL)
            text = open_stream.read()
        assert time.monotonic() - before < 3
        assert b"[DONE]" not in text
        last = text.strip(b"\n").split(b"\n\n")[-1]
        assert "error" in json.loads(last.removeprefix(b"data: "))
        asking.join()
        assert whole[0][0] == 500
        assert whole[0][1]["error"]["type"] == "server_error"
        assert server.wait() == 1


def test_a_killed_server_leaves_no_engine(sim_model_dir: Path, start_server: Any) -> None:
    with start_server(sim_model_dir) as server:
        engine = server.engine_pid()
        server.process.kill()
        server.wait()
        wait_for(lambda: not Path(f"/proc/{engine}").exists() or "Z" in Path(f"/proc/{engine}/stat").read_text())


def test_a_taken_port_is_told_at_once(server: Any, sim_model_dir: Path) -> None:
    command = [sys.executable, "-m", "server", str(sim_model_dir), "--simulate", "--port", str(server.port)]
    before = time.monotonic()
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert found.returncode != 0
    assert "Address already in use" in found.stderr
    assert "Traceback" not in found.stderr
    assert time.monotonic() - before < 10


def test_a_model_that_cannot_load_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    command = [sys.executable, "-m", "server", str(tmp_path), "--simulate", "--port", "0"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert found.returncode == 1
    assert "model_type" in found.stderr
    assert "Traceback" not in found.stderr
