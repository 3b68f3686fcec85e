"""A batch through the OpenAI SDK on a real server that is killed halfway, stopped, and started again."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai

CHAT = "/v1/chat/completions"
KEY = "key-of-the-batch"
COUNT = 1000
ROOT = Path(__file__).parents[2]


def lines(count: int) -> bytes:
    body = {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "ignore_eos": True}
    made = (
        {"custom_id": f"line-{n}", "method": "POST", "url": CHAT, "body": {**body, "seed": n}} for n in range(count)
    )
    return b"".join(json.dumps(line).encode() + b"\n" for line in made)


def client_of(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=2)


def wait_for(client: openai.OpenAI, batch_id: str, enough: Any, seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while not enough(batch := client.batches.retrieve(batch_id)):
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
    return batch


def test_1000_lines_survive_a_kill_and_a_stop(sim_model_dir: Path, start_server: Any, tmp_path: Path) -> None:
    flags = ("--data-dir", str(tmp_path / "data"), "--drain-timeout", "20")
    with start_server(sim_model_dir, *flags, key=KEY) as server:
        client = client_of(server)
        file = client.files.create(file=("in.jsonl", lines(COUNT)), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        assert batch.status == "validating"
        killed = wait_for(client, batch.id, lambda b: b.request_counts.completed >= COUNT // 2)
        assert killed.status == "in_progress", "it is killed before the end"
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    with start_server(sim_model_dir, *flags, key=KEY) as server:
        client = client_of(server)
        found = client.batches.retrieve(batch.id)
        assert COUNT // 2 <= found.request_counts.completed < COUNT, "what was answered stays answered"
        assert a_second_server_is_refused(sim_model_dir, flags)
        wait_for(client, batch.id, lambda b: b.request_counts.completed > found.request_counts.completed + 100)
        before = time.monotonic()
        server.process.terminate()
        assert server.wait() == 0
        assert time.monotonic() - before < 10, "lines of batches do not hold up a stop"
    with start_server(sim_model_dir, *flags, key=KEY) as server:
        client = client_of(server)
        done = wait_for(client, batch.id, lambda b: b.status not in ("in_progress", "finalizing"))
        assert (done.status, done.error_file_id) == ("completed", None)
        counts = done.request_counts
        assert (counts.total, counts.completed, counts.failed) == (COUNT, COUNT, 0)
        results = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
        assert [r["custom_id"] for r in results] == [f"line-{n}" for n in range(COUNT)], "every line exactly once"
        assert len({r["id"] for r in results}) == COUNT
        for result in results:
            assert result["response"]["status_code"] == 200
            assert result["response"]["body"]["usage"]["completion_tokens"] == 6
        assert [f.id for f in client.files.list(purpose="batch")] == [file.id]
        assert client.files.retrieve(done.output_file_id).purpose == "batch_output"
        assert [b.id for b in client.batches.list()] == [batch.id]
        assert client.files.delete(file.id).deleted


def a_second_server_is_refused(model_dir: Path, flags: tuple[str, ...]) -> bool:
    command = [sys.executable, "-m", "server", str(model_dir), "--simulate", "--port", "0", *flags]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    return found.returncode == 2 and "in use by another server" in found.stderr
