"""What tests of files and batches do as a client, and a runner as `fathom serve` starts one."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from server.app import create_routes
from server.batches.runner import BatchRunner

CHAT = "/v1/chat/completions"
KEYS = ("key-of-alice", "key-of-bob")


def request_line(custom_id: Any, *, url: str = CHAT, **body: Any) -> dict[str, Any]:
    body = {"model": "sim", "max_tokens": 8, **body}
    if url == CHAT:
        body = {"messages": [{"role": "user", "content": "hi"}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def jsonl(lines: list[Any]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def head(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


async def upload(server: Any, data: bytes, *, key: str | None = None, **fields: str) -> Any:
    return await server.http.post(
        "/v1/files", files={"file": ("in.jsonl", data)}, data={"purpose": "batch", **fields}, headers=head(key)
    )


async def submit(server: Any, lines: list[Any], *, key: str | None = None, **fields: Any) -> Any:
    file = (await upload(server, jsonl(lines), key=key)).json()["id"]
    body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h", **fields}
    answer = await server.post("/v1/batches", body, headers=head(key))
    assert answer.status_code == 200, answer.text
    return answer.json()


async def get(server: Any, batch: Any, key: str | None = None) -> Any:
    return (await server.http.get(f"/v1/batches/{batch['id']}", headers=head(key))).json()


async def until(server: Any, batch: Any, *states: str, key: str | None = None) -> Any:
    async with asyncio.timeout(10):
        while (found := await get(server, batch, key))["status"] not in states:
            await asyncio.sleep(0.01)
    return found


async def rows(server: Any, file_id: str, key: str | None = None) -> list[Any]:
    answer = await server.http.get(f"/v1/files/{file_id}/content", headers=head(key))
    assert answer.status_code == 200
    assert answer.headers["content-length"] == str(len(answer.content))
    return [json.loads(line) for line in answer.content.splitlines()]


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def running(server: Any, clock: Any = None) -> AsyncIterator[BatchRunner]:
    """A runner, as `fathom serve` starts one."""
    if clock is not None:
        server.state.files._clock = server.state.batches._clock = clock
    lane_state = server.state.batch_lane()
    options = {} if clock is None else {"clock": clock}
    runner = BatchRunner(server.state, lane_state, create_routes(lane_state), **options)
    task = asyncio.create_task(runner.run())
    try:
        yield runner
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
