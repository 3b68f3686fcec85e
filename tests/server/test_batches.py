"""Batches in one process: who sees them, how lines run, and every way a batch can end."""

import asyncio
import json
from typing import Any

import pytest

from server.batches import lane
from server.config import ServerConfig
from tests.server.batch_client import (
    CHAT,
    KEYS,
    Clock,
    get,
    head,
    jsonl,
    request_line,
    rows,
    running,
    submit,
    until,
    upload,
)


def test_a_batch_from_upload_to_results(serving: Any) -> None:
    lines = [request_line(f"id-{n}", seed=n) for n in range(20)]
    lines[3]["body"]["temperature"] = 9
    lines[4]["body"]["model"] = "other"
    lines[5]["body"]["stream"] = True

    async def main() -> None:
        async with serving() as server, running(server):
            batch = await submit(server, lines, metadata={"who": "me"})
            assert (batch["object"], batch["status"], batch["model"]) == ("batch", "validating", "sim")
            assert batch["expires_at"] == batch["created_at"] + 24 * 3600
            done = await until(server, batch, "completed")
            assert done["request_counts"] == {"total": 20, "completed": 17, "failed": 3}
            assert done["metadata"] == {"who": "me"}
            moments = [done[name] for name in ("created_at", "in_progress_at", "finalizing_at", "completed_at")]
            assert moments == sorted(moments)
            assert [done[f"{name}_at"] for name in ("failed", "expired", "cancelling", "cancelled")] == [None] * 4
            answers = await rows(server, done["output_file_id"])
            assert [a["custom_id"] for a in answers] == [f"id-{n}" for n in range(20) if n not in (3, 4, 5)]
            assert len({a["id"] for a in answers}) == 17
            usage = {"prompt_tokens": 0, "completion_tokens": 0}
            for answer in answers:
                assert answer["error"] is None
                assert answer["response"]["status_code"] == 200
                assert answer["response"]["request_id"].startswith("req-")
                body = answer["response"]["body"]
                assert body["object"] == "chat.completion"
                for name in usage:
                    usage[name] += body["usage"][name]
            assert done["usage"]["input_tokens"] == usage["prompt_tokens"] > 0
            assert done["usage"]["output_tokens"] == usage["completion_tokens"] > 0
            assert done["usage"]["total_tokens"] == sum(usage.values())
            errors = await rows(server, done["error_file_id"])
            assert [(e["custom_id"], e["response"]["status_code"]) for e in errors] == [
                *(("id-3", 400), ("id-4", 404), ("id-5", 400)),
            ]
            params = [e["response"]["body"]["error"]["param"] for e in errors]
            assert params == ["temperature", "model", "stream"]
            # The same seed gives the same answer outside a batch.
            alone = (await server.post(CHAT, lines[0]["body"])).json()
            assert alone["choices"] == answers[0]["response"]["body"]["choices"]
            text = (await server.http.get("/metrics")).text
            assert 'fathom_batch_lines_total{outcome="completed"} 17.0' in text
            assert 'fathom_batch_lines_total{outcome="failed"} 3.0' in text
            # Nobody waited for these, so no latency was measured but that of the one above.
            assert 'vllm:time_to_first_token_seconds_count{engine="0",model_name="sim"} 1.0' in text
            await server.idle()

    asyncio.run(main())


def test_completions_and_listing(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="abc") as server, running(server):
            line = request_line("a", url="/v1/completions", prompt=["x", "y"])
            batches = [await submit(server, [line], endpoint="/v1/completions") for _ in range(3)]
            for batch in batches:
                done = await until(server, batch, "completed")
                assert done["error_file_id"] is None
                (row,) = await rows(server, done["output_file_id"])
                assert [c["text"] for c in row["response"]["body"]["choices"]] == ["abc", "abc"]
            line = {**request_line("r", url="/v1/responses", input="hi"), "body": {"model": "sim", "input": "hi"}}
            done = await until(server, await submit(server, [line], endpoint="/v1/responses"), "completed")
            (row,) = await rows(server, done["output_file_id"])
            assert row["response"]["body"]["object"] == "response"
            usage = row["response"]["body"]["usage"]
            assert done["usage"]["total_tokens"] == usage["total_tokens"] > 0
            await server.http.delete(f"/v1/files/{done['input_file_id']}")
            others = done["id"]
            newest_first = [batch["id"] for batch in reversed(batches)]
            page = (await server.http.get("/v1/batches?limit=1")).json()
            assert ([b["id"] for b in page["data"]], page["has_more"]) == ([others], True)
            page = (await server.http.get(f"/v1/batches?limit=2&after={others}")).json()
            assert ([b["id"] for b in page["data"]], page["has_more"]) == (newest_first[:2], True)
            page = (await server.http.get(f"/v1/batches?limit=2&after={page['last_id']}")).json()
            assert ([b["id"] for b in page["data"]], page["has_more"]) == (newest_first[2:], False)
            inputs = (await server.http.get("/v1/files?purpose=batch&order=asc")).json()["data"]
            assert [f["id"] for f in inputs] == [b["input_file_id"] for b in batches]
            outputs = (await server.http.get("/v1/files?purpose=batch_output&limit=2")).json()
            assert len(outputs["data"]) == 2 and outputs["has_more"]
            assert all(f["filename"].endswith("_output.jsonl") for f in outputs["data"])

    asyncio.run(main())


def test_keys_do_not_see_each_other(serving: Any) -> None:
    alice, bob = KEYS

    async def main() -> None:
        async with serving(answer="x", keys=KEYS) as server, running(server):
            batch = await submit(server, [request_line("a")], key=alice)
            done = await until(server, batch, "completed", key=alice)
            paths = [
                *(f"/v1/files/{done[name]}" for name in ("input_file_id", "output_file_id")),
                *(f"/v1/files/{done[name]}/content" for name in ("input_file_id", "output_file_id")),
                f"/v1/batches/{done['id']}",
                f"/v1/files?after={done['input_file_id']}",
                f"/v1/batches?after={done['id']}",
            ]
            for path in paths:
                assert (await server.http.get(path, headers=head(bob))).status_code == 404, path
                assert (await server.http.get(path)).status_code == 401
            assert (await server.http.delete(paths[0], headers=head(bob))).status_code == 404
            assert (await server.http.post(paths[4] + "/cancel", headers=head(bob))).status_code == 404
            for path in ("/v1/files", "/v1/batches"):
                assert (await server.http.get(path, headers=head(bob))).json()["data"] == []
            body = {"input_file_id": done["input_file_id"], "endpoint": CHAT, "completion_window": "24h"}
            answer = await server.post("/v1/batches", body, headers=head(bob))
            assert (answer.status_code, answer.json()["error"]["param"]) == (404, "input_file_id")

    asyncio.run(main())


def test_wrong_batches(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            file = (await upload(server, jsonl([request_line("a")]))).json()["id"]
            good = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
            wrong: list[tuple[dict[str, Any], int, str]] = [
                ({"endpoint": "/v1/embeddings"}, 400, "endpoint"),
                ({"endpoint": "/v1/files"}, 400, "endpoint"),
                ({"completion_window": "soon"}, 400, "completion_window"),
                ({"completion_window": "0h"}, 400, "completion_window"),
                ({"completion_window": "721h"}, 400, "completion_window"),
                ({"metadata": {str(n): "x" for n in range(17)}}, 400, "metadata"),
                ({"metadata": {"a": 1}}, 400, "metadata.a"),
                ({"input_file_id": "file-nope"}, 404, "input_file_id"),
                ({"input_file_id": "' OR 1=1 --"}, 404, "input_file_id"),
                ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "output_expires_after.seconds"),
            ]
            for change, status, param in wrong:
                answer = await server.post("/v1/batches", {**good, **change})
                assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), change
            for path, param in (("/v1/batches?limit=0", "limit"), ("/v1/files?order=up", "order")):
                answer = await server.http.get(path)
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
            batch = (await server.post("/v1/batches", good)).json()
            busy = await server.http.delete(f"/v1/files/{file}")
            assert (busy.status_code, busy.json()["error"]["code"]) == (400, "file_in_use")
            assert batch["status"] == "validating"

    asyncio.run(main())


def test_cancel(serving: Any) -> None:
    async def main() -> None:
        async with serving(step_seconds=0.01) as server, running(server):
            lines = [request_line(str(n), max_tokens=20, ignore_eos=True) for n in range(200)]
            batch = await submit(server, lines)
            while not (await get(server, batch))["request_counts"]["completed"]:
                await asyncio.sleep(0.01)
            answer = (await server.http.post(f"/v1/batches/{batch['id']}/cancel")).json()
            assert (answer["status"], answer["cancelling_at"] is not None) == ("cancelling", True)
            done = await until(server, batch, "cancelled")
            assert 0 < done["request_counts"]["completed"] < 200
            assert len(await rows(server, done["output_file_id"])) == done["request_counts"]["completed"]
            assert done["error_file_id"] is None
            await server.idle()
            again = await server.http.post(f"/v1/batches/{batch['id']}/cancel")
            assert again.status_code == 400

    asyncio.run(main())


def test_expiry_of_batches_and_files(serving: Any) -> None:
    async def main() -> None:
        clock = Clock()
        async with serving(step_seconds=0.01) as server, running(server, clock):
            lines = [request_line(str(n), max_tokens=20, ignore_eos=True) for n in range(100)]
            batch = await submit(server, lines, output_expires_after={"anchor": "created_at", "seconds": 7200})
            while not (await get(server, batch))["request_counts"]["completed"]:
                await asyncio.sleep(0.01)
            clock.now += 24 * 3600
            done = await until(server, batch, "expired")
            counts = done["request_counts"]
            assert counts["completed"] + counts["failed"] == counts["total"] == 100
            answered = await rows(server, done["output_file_id"])
            errors = await rows(server, done["error_file_id"])
            ids = [row["custom_id"] for row in answered + errors]
            assert sorted(ids, key=int) == [str(n) for n in range(100)]
            assert {(e["response"], e["error"]["code"]) for e in errors} == {(None, "batch_expired")}
            await server.idle()
            clock.now += 7200
            assert (await server.http.get(f"/v1/files/{done['output_file_id']}")).status_code == 404
            assert (await server.http.get(f"/v1/files/{done['input_file_id']}")).status_code == 200
            clock.now += 31 * 24 * 3600
            async with asyncio.timeout(10):
                while (await server.http.get(f"/v1/batches/{batch['id']}")).status_code == 200:
                    await asyncio.sleep(0.05)
            counted = await server.state.database.run(
                lambda c: [c.execute(f"SELECT COUNT(*) FROM {t}").fetchone()[0] for t in ("files", "contents", "lines")]
            )
            assert counted == [0, 0, 0]

    asyncio.run(main())


def test_interactive_requests_go_first(serving: Any) -> None:
    async def main() -> None:
        async with serving(step_seconds=0.005, max_num_seqs=4) as server, running(server) as runner:
            lines = [request_line(str(n), max_tokens=200, ignore_eos=True) for n in range(50)]
            batch = await submit(server, lines)
            while not runner._num_running:
                await asyncio.sleep(0.01)
            for _ in range(10):
                answer = await server.chat("hello", max_tokens=2, ignore_eos=True)
                assert answer.status_code == 200
                assert runner._num_running <= 2, "half of the slots stay free"
            assert server.state.admission.queued_requests == 0, "lines do not fill the queue of the others"
            done = await get(server, batch)
            assert done["request_counts"]["completed"] < 50, "ten short requests did not wait for the batch"
            await server.http.post(f"/v1/batches/{batch['id']}/cancel")
            await until(server, batch, "cancelled")

    asyncio.run(main())


def test_room(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x", max_num_seqs=8) as server:
            state = server.state
            assert lane.has_room(state, 0) and lane.has_room(state, 3)
            assert not lane.has_room(state, 4)
            waiting = [state.admission.enter("k", 5) for _ in range(3)]
            assert not lane.has_room(state, 0), "others wait"
            for ticket in waiting:
                ticket.close()
            with state.admission.enter("k", state.admission.max_queued_tokens):
                assert not lane.has_room(state, 0), "a long one waits"
            state.admission.draining = True
            assert not lane.has_room(state, 0)

    asyncio.run(main())


def test_overload_is_waited_out_and_failures_are_tried_again(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    statuses = {"busy": [503, 429, 200], "broken": [500, 500, 500, 200], "shaky": [500, 200]}

    async def post(app: Any, path: str, body: bytes, key_id: str) -> lane.Answer:
        name = json.loads(body)["user"]
        asked.append(name)
        return lane.Answer(statuses[name].pop(0), "req-1", b'{"name":"%s"}' % name.encode())

    async def main() -> None:
        monkeypatch.setattr(lane, "post", post)
        monkeypatch.setattr("server.batches.runner._FIRST_RETRY_SECONDS", 0.01)
        async with serving(answer="x") as server, running(server):
            batch = await submit(server, [request_line(name, user=name) for name in statuses])
            done = await until(server, batch, "completed")
            assert {r["custom_id"] for r in await rows(server, done["output_file_id"])} == {"busy", "shaky"}
            (error,) = await rows(server, done["error_file_id"])
            assert (error["custom_id"], error["response"]["status_code"]) == ("broken", 500)
        assert sorted(asked) == ["broken"] * 3 + ["busy"] * 3 + ["shaky"] * 2

    asyncio.run(main())


def test_a_line_that_never_gets_an_answer_is_given_up(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            batch = await submit(server, [request_line("poison"), request_line("good")])
            async with running(server):
                await until(server, batch, "completed")
            await server.state.database.run(
                lambda c: c.execute("UPDATE lines SET ok = NULL, result = NULL, starts = 10 WHERE number = 1")
            )
            await server.state.database.run(
                lambda c: c.execute("UPDATE batches SET status = 'in_progress', completed = 1, failed = 0")
            )
            async with running(server):
                done = await until(server, batch, "completed")
            (row,) = await rows(server, done["error_file_id"])
            assert (row["custom_id"], row["response"], row["error"]["code"]) == ("poison", None, "too_many_attempts")

    asyncio.run(main())


def test_results_stop_at_the_quota(serving: Any) -> None:
    async def main() -> None:
        lines = [request_line(str(n)) for n in range(40)]
        quota = len(jsonl(lines)) + 5000
        async with serving(answer="x", config=ServerConfig(file_quota=quota)) as server, running(server):
            done = await until(server, await submit(server, lines), "completed")
            assert sum(done["request_counts"][name] for name in ("completed", "failed")) == 40
            errors = await rows(server, done["error_file_id"])
            assert {e["error"]["code"] for e in errors} == {"storage_quota_exceeded"}
            assert 0 < len(errors) < 40

    asyncio.run(main())


def test_a_full_disk_is_503_and_the_batch_goes_on_later(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr("server.batches.runner._PAUSE_SECONDS", 0.05)
        async with serving(answer="x</think>y") as server, running(server):
            batch = await submit(server, [request_line(str(n)) for n in range(5)])
            data = jsonl([request_line("a")])
            pages = await server.state.database.run(lambda c: c.execute("PRAGMA page_count").fetchone()[0])
            await server.state.database.run(lambda c: c.execute(f"PRAGMA max_page_count = {pages}").fetchone())
            full = await upload(server, data * 1000)
            assert (full.status_code, full.json()["error"]["code"]) == (503, "storage_unavailable")
            assert int(full.headers["retry-after"]) >= 1
            await asyncio.sleep(0.3)
            await server.state.database.run(lambda c: c.execute("PRAGMA max_page_count = 1000000").fetchone())
            done = await until(server, batch, "completed")
            assert done["request_counts"] == {"total": 5, "completed": 5, "failed": 0}
            assert (await upload(server, data * 1000)).status_code == 200

    asyncio.run(main())


def test_nothing_of_a_batch_is_logged(serving: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")

    async def main() -> None:
        async with serving(answer="OUTPUTCANARY") as server, running(server):
            lines = [request_line("CUSTOMCANARY", user="FIELDCANARY"), request_line("b", temperature="PROMPTCANARY")]
            await until(server, await submit(server, lines), "completed")

    asyncio.run(main())
    assert "CANARY" not in caplog.text
