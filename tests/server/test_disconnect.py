"""Clients that leave, stall or outstay the server: their pages come back at once, and nobody else notices."""

import asyncio
import json
import random
import time
from typing import Any

import pytest

from engine.runner.sim_executor import Faults
from server.config import ServerConfig
from server.text.parser import OutputParser


class Client:
    """A raw ASGI client that can leave, stop reading, and look at what it got."""

    def __init__(self, app: Any, path: str, body: dict[str, Any]) -> None:
        self.status = 0
        self.data = b""
        self.complete = False
        self.left = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()
        self._body: bytes | None = json.dumps(body).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.reading.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.data += message.get("body", b"")
            self.complete = not message.get("more_body", False)

    async def until(self, text: bytes, seconds: float = 5.0) -> None:
        async with asyncio.timeout(seconds):
            while text not in self.data:
                await asyncio.sleep(0.001)


LONG = {"model": "sim", "prompt": "hi", "max_tokens": 3000, "ignore_eos": True}
CHAT = {"model": "sim", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3000, "ignore_eos": True}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("path", "body"), [("/v1/completions", LONG), ("/v1/chat/completions", CHAT)])
def test_a_client_that_leaves_frees_everything(serving: Any, path: str, body: dict[str, Any], stream: bool) -> None:
    async def main() -> None:
        async with serving(step_seconds=0.002) as server:
            client = Client(server.app, path, {**body, "stream": stream})
            async with asyncio.timeout(5):
                while server.engine.stats.num_running == 0 or server.engine.stats.generation_tokens < 5:
                    await asyncio.sleep(0.001)
            before = time.monotonic()
            client.left.set()
            await asyncio.wait_for(client.task, 1)
            await server.idle(1)
            # The pages are free after one step; the idle engine says so at its next heartbeat.
            assert time.monotonic() - before < 1.0
            if stream:
                assert not client.complete
            else:
                assert client.status == 499
            text = (await server.http.get("/metrics")).text
            assert 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="sim"} 1.0' in text

    asyncio.run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_queued(serving: Any, stream: bool) -> None:
    async def main() -> None:
        async with serving(step_seconds=0.002, max_num_seqs=1) as server:
            runner = Client(server.app, "/v1/completions", {**LONG, "max_tokens": 100, "stream": True})
            await runner.until(b"data:")
            waiting = [Client(server.app, "/v1/completions", {**LONG, "stream": stream}) for _ in range(20)]
            async with asyncio.timeout(5):
                while server.engine.stats.num_waiting < 20:
                    await asyncio.sleep(0.001)
            for client in waiting:
                client.left.set()
            await asyncio.gather(*(c.task for c in waiting))
            async with asyncio.timeout(1):
                while server.engine.stats.num_waiting:
                    await asyncio.sleep(0.001)
            await runner.task
            assert runner.data.endswith(b"data: [DONE]\n\n")
            await server.idle()

    asyncio.run(main())


def test_leaving_at_random_moments_disturbs_nobody(serving: Any) -> None:
    chance = random.Random(4)
    witness = {"model": "sim", "prompt": "witness", "max_tokens": 60, "ignore_eos": True, "seed": 5, "stream": False}

    async def main() -> None:
        async with serving(step_seconds=0.001) as server:
            expected = (await server.complete(**{k: v for k, v in witness.items() if k not in ("model",)})).json()
            clients = []
            for n in range(150):
                path, body = (("/v1/completions", LONG), ("/v1/chat/completions", CHAT))[n % 2]
                body = {**body, "stream": chance.random() < 0.7, "max_tokens": chance.choice([1, 5, 50, 2000])}
                clients.append(Client(server.app, path, body))

            async def leave(client: Client) -> None:
                await asyncio.sleep(chance.random() * 0.4)
                client.left.set()
                await client.task

            async def watch() -> None:
                answer = await server.post("/v1/completions", witness)
                assert answer.json()["choices"] == expected["choices"]

            await asyncio.gather(*(leave(c) for c in clients), *(watch() for _ in range(10)))
            await server.idle()

    asyncio.run(main())


def test_keep_alive_comments_while_nothing_comes(serving: Any) -> None:
    config = ServerConfig(keep_alive_interval=0.5)

    async def main() -> None:
        async with serving(config=config, max_num_seqs=1, step_seconds=0.002) as server:
            runner = Client(server.app, "/v1/completions", {**LONG, "stream": True})
            await runner.until(b"data:")
            waiting = Client(server.app, "/v1/chat/completions", {**CHAT, "stream": True})
            await waiting.until(b": keep-alive\n\n")
            assert waiting.data.startswith(b'data: {"id"')
            assert b": keep-alive" not in runner.data
            for client in (runner, waiting):
                client.left.set()
                await client.task

    asyncio.run(main())


def test_a_client_that_does_not_read_is_cut_off(serving: Any) -> None:
    config = ServerConfig(write_timeout=0.3)

    async def main() -> None:
        async with serving(config=config, step_seconds=0.002) as server:
            client = Client(server.app, "/v1/completions", {**LONG, "stream": True})
            await client.until(b"data:")
            client.reading.clear()
            await asyncio.wait_for(client.task, 4)
            assert not client.complete
            await server.idle()

    asyncio.run(main())


def test_running_answers_are_told_when_the_server_stops(serving: Any) -> None:
    async def main() -> None:
        async with serving(step_seconds=0.002) as server:
            clients = [Client(server.app, "/v1/completions", {**LONG, "stream": s}) for s in (True, False)]
            await clients[0].until(b"data:")
            assert (await server.http.get("/health/ready")).status_code == 200
            server.state.admission.draining = True
            ready = await server.http.get("/health/ready")
            assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
            assert (await server.http.get("/health/live")).status_code == 200
            refused = await server.complete()
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_draining")
            assert int(refused.headers["retry-after"]) >= 1
            server.state.stop_now()
            await asyncio.gather(*(c.task for c in clients))
            streamed, whole = clients
            last = streamed.data.rstrip(b"\n").split(b"\n\n")[-1]
            assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "server_draining"
            assert b"[DONE]" not in streamed.data
            assert b'"finish_reason":"' not in streamed.data
            assert streamed.complete
            assert (whole.status, json.loads(whole.data)["error"]["code"]) == (503, "server_draining")
            await server.state.admission.wait_idle()
            await server.idle()

    asyncio.run(main())


def test_a_dying_engine_ends_every_answer_with_an_error(serving: Any) -> None:
    async def main() -> None:
        async with serving(
            step_seconds=0.002, faults=Faults(raise_in_step={40: RuntimeError("PROMPTCANARY")})
        ) as server:
            clients = [Client(server.app, "/v1/completions", {**LONG, "stream": s}) for s in (True, False)]
            await asyncio.wait_for(asyncio.gather(*(c.task for c in clients)), 5)
            streamed, whole = clients
            last = streamed.data.rstrip(b"\n").split(b"\n\n")[-1]
            assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "internal"
            assert b"[DONE]" not in streamed.data
            assert whole.status == 500
            assert json.loads(whole.data)["error"]["type"] == "server_error"
            assert b"CANARY" not in streamed.data + whole.data
            ready = await server.http.get("/health/ready")
            assert (ready.status_code, ready.json()["reason"]) == (503, "engine_dead")
            refused = await server.complete()
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
            assert "fathom_engine_up" in (await server.http.get("/metrics")).text
            assert server.state.admission.in_flight == 0

    asyncio.run(main())


def test_not_ready_without_progress(serving: Any) -> None:
    config = ServerConfig(progress_timeout=0.4)

    async def main() -> None:
        faults = Faults(hang_in_step=20, hang_seconds=1.5)
        async with serving(config=config, step_seconds=0.002, faults=faults) as server:
            client = Client(server.app, "/v1/completions", {**LONG, "max_tokens": 40, "stream": True})
            reasons = set()
            for _ in range(15):
                await asyncio.sleep(0.1)
                reasons.add((await server.http.get("/health")).json().get("reason"))
            assert reasons == {None, "no_progress"}
            await client.task
            assert (await server.http.get("/health/ready")).status_code == 200

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "body", "last"),
    [
        ("/v1/completions", LONG, b'data: {"error":{"message":'),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, b'data: {"error":{"message":'),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 99}, b"event: error"),
        ("/v1/responses", {"input": "x"}, b"event: response.failed"),
    ],
    ids=["completions", "chat", "messages", "responses"],
)
def test_a_fault_of_the_server_ends_a_stream_with_an_error(
    serving: Any, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], last: bytes
) -> None:
    push, pushed = OutputParser.push, 0

    def breaks(parser: OutputParser, token_ids: Any) -> Any:
        nonlocal pushed
        pushed += 1
        if pushed > 3:
            raise RuntimeError("a secret")
        return push(parser, token_ids)

    async def main() -> None:
        async with serving(step_seconds=0.005) as server:
            monkeypatch.setattr(OutputParser, "push", breaks)
            client = Client(server.app, path, {"model": "sim", "stream": True, "ignore_eos": True, **body})
            await asyncio.wait_for(client.task, 10)
            monkeypatch.undo()
            assert client.status == 200 and client.complete
            assert last in client.data and b"secret" not in client.data
            await server.idle()

    asyncio.run(main())
