"""What happens before a route: keys, body limits, deadlines, request ids."""

import asyncio
import json
from typing import Any

import pytest

from server.app import create_app
from server.auth import KeyRing, load_keys
from server.config import ServerConfig, ServerConfigError, is_loopback

KEY = "secret-key-one"
OTHER = "ключ-secret-two"
BODY = {"model": "sim", "prompt": "hi", "max_tokens": 2}
JSON_HEADER = (b"content-type", b"application/json")


async def raw(
    app: Any,
    *,
    method: str = "POST",
    path: str = "/v1/completions",
    headers: list[tuple[bytes, bytes]] | None = None,
    chunks: list[bytes] | None = None,
    pause: float = 0.0,
) -> tuple[int, dict[str, str], bytes, int]:
    """One request in raw ASGI: (status, headers, body, chunks that were read)."""
    pending = list(chunks if chunks is not None else [json.dumps(BODY).encode()])
    sent: list[Any] = []
    read = 0

    async def receive() -> Any:
        nonlocal read
        if not pending:
            await asyncio.sleep(3600)
        await asyncio.sleep(pause)
        read += 1
        return {"type": "http.request", "body": pending.pop(0), "more_body": bool(pending)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [JSON_HEADER] if headers is None else headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await app(scope, receive, send)
    head = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], head, b"".join(m.get("body", b"") for m in sent[1:]), read


def bearer(key: str) -> tuple[bytes, bytes]:
    return (b"authorization", b"Bearer " + key.encode())


def test_keys(serving: Any) -> None:
    refused: list[list[tuple[bytes, bytes]]] = [
        [],
        [bearer("wrong")],
        [bearer(KEY + "x")],
        [bearer(KEY[:-1])],
        [bearer("")],
        [(b"authorization", b"")],
        [(b"authorization", b"Basic " + KEY.encode())],
        [(b"authorization", KEY.encode())],
        [(b"authorization", b"Bearer \xff\xfe\x00")],
        [(b"authorization", b"Bearer " + b"k" * 50_000)],
        [bearer(KEY), bearer("wrong")],
        [bearer("wrong"), (b"x-api-key", KEY.encode())],
        [(b"api-key", KEY.encode())],
        [(b"cookie", b"authorization=Bearer " + KEY.encode())],
    ]
    accepted: list[list[tuple[bytes, bytes]]] = [
        [bearer(KEY)],
        [(b"authorization", b"bearer   " + KEY.encode() + b" ")],
        [(b"x-api-key", KEY.encode())],
        [bearer(OTHER)],
        [bearer(KEY), (b"x-api-key", KEY.encode())],
    ]

    async def main() -> None:
        async with serving(answer="x", keys=[KEY, OTHER]) as server:
            for headers in refused:
                status, head, body, read = await raw(server.app, headers=[*headers, JSON_HEADER])
                assert status == 401, headers
                assert json.loads(body)["error"]["code"] == "invalid_api_key"
                assert head["www-authenticate"] == "Bearer"
                assert read == 0, "no body is read for a stranger"
            for headers in accepted:
                assert (await raw(server.app, headers=[*headers, JSON_HEADER]))[0] == 200, headers

    asyncio.run(main())


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/models", "/v1/completions", "/tokenize", "/detokenize", "/metrics", "/version", "/", "/nope", "/docs"),
        *(
            "/health/",
            "/health/x",
            "/healthz",
            "//health",
            "/health/../v1/models",
            "/HEALTH",
            "/health%2f",
            "/v1/health",
        ),
        *("/health;x", "/health\x00", "http://h/health", "/health/live/", "/health/ready/..", "", "*"),
    ],
)
def test_only_the_exact_health_paths_are_open(serving: Any, path: str) -> None:
    async def main() -> None:
        async with serving(answer="x", keys=[KEY]) as server:
            for method in ("GET", "POST"):
                for host in (b"h", b"h/health", b"h/health?x=", b"h#/health", b"evil@h/health/live"):
                    headers = [(b"host", host), JSON_HEADER]
                    assert (await raw(server.app, method=method, path=path, headers=headers))[0] == 401
            for open_path in ("/health", "/health/live", "/health/ready"):
                assert (await raw(server.app, method="GET", path=open_path, headers=[]))[0] == 200

    asyncio.run(main())


def test_body_limit(serving: Any) -> None:
    config = ServerConfig(body_limit=1000)

    async def main() -> None:
        async with serving(answer="x", config=config) as server:
            for length in (b"1001", b"10000000000", b"9" * 18):
                headers = [JSON_HEADER, (b"content-length", length), (b"expect", b"100-continue")]
                status, head, body, read = await raw(server.app, headers=headers, chunks=[b"x" * 100] * 50)
                assert (status, head["connection"], read) == (413, "close", 0)
                assert json.loads(body)["error"]["code"] == "request_too_large"
            status, _, _, read = await raw(server.app, chunks=[b"x" * 400] * 50)
            assert status == 413
            # A moment more is read, so that the client sees the answer and not a reset.
            status, _, _, read = await raw(server.app, chunks=[b"x" * 600_000] * 50)
            assert (status, read) == (413, 3)
            for length in (b"-1", b"x", b"1" * 30, b"\xb2", b""):
                assert (await raw(server.app, headers=[JSON_HEADER, (b"content-length", length)]))[0] == 400
            exact = json.dumps(BODY).encode().ljust(1000)
            assert (await raw(server.app, chunks=[exact[:500], exact[500:]]))[0] == 200

    asyncio.run(main())


def test_header_limits(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            many = [(b"x-%d" % n, b"v") for n in range(101)]
            assert (await raw(server.app, headers=[JSON_HEADER, *many]))[0] == 431
            assert (await raw(server.app, headers=[JSON_HEADER, (b"x", b"v" * 70_000)]))[0] == 431

    asyncio.run(main())


def test_slow_body(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x", config=ServerConfig(body_timeout=0.2)) as server:
            status, _, body, _ = await raw(server.app, chunks=[b"{"] * 100, pause=0.05)
            assert status == 408
            assert json.loads(body)["error"]["code"] == "request_timeout"

    asyncio.run(main())


def test_request_ids(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            for good in (b"abc", b"Aa0._:-", b"x" * 128):
                head = (await raw(server.app, headers=[JSON_HEADER, (b"x-request-id", good)]))[1]
                assert head["x-request-id"] == good.decode()
            for bad in (b"", b"a b", b"x" * 129, b"a\r\nb: c", b"\xff", b"a\n", b"<script>"):
                head = (await raw(server.app, headers=[JSON_HEADER, (b"x-request-id", bad)]))[1]
                assert head["x-request-id"].startswith("req-")
            # The same id at the same time, three times: every request is answered.
            headers = [JSON_HEADER, (b"x-request-id", b"same")]
            answers = await asyncio.gather(*(raw(server.app, headers=headers) for _ in range(3)))
            assert [a[0] for a in answers] == [200] * 3
            assert len({json.loads(a[2])["id"] for a in answers}) == 3

    asyncio.run(main())


def test_a_failing_route_is_a_500_without_details(serving: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            server.state.admission.enter = lambda *_: 1 / 0
            status, _, body, _ = await raw(server.app)
            assert status == 500
            assert json.loads(body)["error"] == {
                "message": "The server had an error while processing the request.",
                **{"type": "server_error", "param": None, "code": "internal"},
            }

    asyncio.run(main())
    assert "ZeroDivisionError at" in caplog.text


def test_logs_hold_no_content(serving: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")

    async def main() -> None:
        async with serving(answer="OUTPUTCANARY", keys=[KEY]) as server:
            body = json.dumps({**BODY, "prompt": "PROMPTCANARY", "max_tokens": 50}).encode()
            assert (await raw(server.app, headers=[bearer(KEY), JSON_HEADER], chunks=[body]))[0] == 200
            bad = json.dumps({**BODY, "prompt": {"PROMPTCANARY": 1}}).encode()
            assert (await raw(server.app, headers=[bearer(KEY), JSON_HEADER], chunks=[bad]))[0] == 400
            path = "/x\r\n2026 INFO forged\x1b[31m"
            assert (await raw(server.app, method="GET", path=path, headers=[bearer(KEY)]))[0] == 404

    asyncio.run(main())
    assert "/v1/completions 200" in caplog.text
    assert "in=12 out=13 finish=stop" in caplog.text
    for secret in ("PROMPTCANARY", "OUTPUTCANARY", KEY, "\x1b", "\r"):
        assert secret not in caplog.text


def test_key_file_and_open_hosts(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FATHOM_API_KEY", raising=False)
    file = tmp_path / "keys"
    file.write_text(f"# keys\n\n{KEY}\n  {OTHER}  \n{KEY}\n", encoding="utf-8")
    ring = load_keys(str(file))
    assert len(ring) == 2
    assert ring.identify([bearer(OTHER)]) not in (None, ring.identify([bearer(KEY)]))
    assert KEY not in repr(vars(ring))
    for text in ("", "# nothing\n", "short\n"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ServerConfigError):
            load_keys(str(file))
    with pytest.raises(ServerConfigError, match="No such file"):
        load_keys(str(tmp_path / "absent"))
    assert len(load_keys(None)) == 0
    monkeypatch.setenv("FATHOM_API_KEY", KEY)
    assert load_keys(None).identify([bearer(KEY)]) == ring.identify([bearer(KEY)])

    for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.8.8.8"):
        assert is_loopback(host)
        ServerConfig(host=host).check(num_keys=0)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(ServerConfigError, match="api-key-file"):
            ServerConfig(host=host).check(num_keys=0)
        ServerConfig(host=host).check(num_keys=1)
    for wrong in ({"port": 70000}, {"body_limit": 0}, {"drain_timeout": -1.0}, {"queue_timeout": 0.0}):
        with pytest.raises(ServerConfigError):
            ServerConfig(**wrong).check(num_keys=0)


def test_the_app_refuses_other_protocols(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            app = create_app(server.state)

            async def unexpected(*_: Any) -> Any:
                raise AssertionError("nothing is read or sent")

            await app({"type": "websocket", "path": "/", "headers": []}, unexpected, unexpected)

    asyncio.run(main())


def test_a_ring_without_keys_knows_everybody() -> None:
    assert KeyRing([]).identify([]) == "anonymous"
