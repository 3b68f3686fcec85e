"""/v1/responses over HTTP: kept, continued, run in the background, cancelled, deleted; and its errors."""

import asyncio
import json
from typing import Any

import pytest

from server.config import ServerConfig

ANSWER = "thought</think>Hello"
NO_THINKING = {"reasoning": {"effort": "none"}}


def events(text: str) -> list[dict[str, Any]]:
    """The parsed events; framing is checked on the way."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    found = []
    for block in blocks:
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


async def create(server: Any, text: Any = "hi", *, key: str | None = None, **fields: Any) -> Any:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return await server.post("/v1/responses", {"model": "sim", "input": text, **fields}, headers=headers)


async def until_over(server: Any, response_id: str) -> dict[str, Any]:
    for _ in range(500):
        found = (await server.http.get(f"/v1/responses/{response_id}")).json()
        if found["status"] not in ("queued", "in_progress"):
            return found  # type: ignore[no-any-return]
        await asyncio.sleep(0.01)
    raise AssertionError("still running")


def test_an_answer_is_kept_and_can_be_asked_for(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer=ANSWER) as server:
            answer = await create(server, metadata={"a": "b"})
            assert answer.status_code == 200
            body = answer.json()
            assert [item["type"] for item in body["output"]] == ["reasoning", "message"]
            assert body["output"][1]["content"][0]["text"] == "Hello"
            assert (body["status"], body["metadata"], body["store"]) == ("completed", {"a": "b"}, True)
            url = f"/v1/responses/{body['id']}"
            assert (await server.http.get(url)).json() == body
            assert (await server.http.get(url.removeprefix("/v1"))).json() == body
            assert (await server.http.delete(url)).json() == {"id": body["id"], "object": "response", "deleted": True}
            for method in ("GET", "DELETE"):
                gone = await server.http.request(method, url)
                assert gone.status_code == 404
                assert gone.json()["error"]["code"] == "response_not_found"
            await server.idle()

    asyncio.run(main())


def test_a_stream_equals_the_whole_and_is_kept(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer=ANSWER) as server:
            found = events((await create(server, stream=True)).text)
            last = found[-1]
            assert last["type"] == "response.completed"
            assert "".join(e["delta"] for e in found if e["type"] == "response.output_text.delta") == "Hello"
            assert (await server.http.get(f"/v1/responses/{last['response']['id']}")).json() == last["response"]
            whole = (await create(server)).json()
            texts = [[item["content"] for item in one["output"]] for one in (whole, last["response"])]
            assert texts[0] == texts[1]
            same = ("id", "output", "created_at", "completed_at", "usage")
            assert {k: v for k, v in whole.items() if k not in same} == {
                k: v for k, v in last["response"].items() if k not in same
            }
            await server.idle()

    asyncio.run(main())


def test_what_should_not_be_kept_is_not(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer=ANSWER) as server:
            for stream in (False, True):
                answer = await create(server, store=False, stream=stream)
                body = events(answer.text)[-1]["response"] if stream else answer.json()
                assert body["store"] is False
                assert (await server.http.get(f"/v1/responses/{body['id']}")).status_code == 404
        async with serving(answer=ANSWER, config=ServerConfig(response_store_bytes=0)) as server:
            body = (await create(server)).json()
            assert body["store"] is False
            assert (await server.http.get(f"/v1/responses/{body['id']}")).status_code == 404
            refused = await create(server, background=True)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "background")

    asyncio.run(main())


def test_a_conversation_goes_on(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="Hello") as server:
            first = (await create(server, "one", instructions="first rules", **NO_THINKING)).json()
            second = (
                await create(server, "two", previous_response_id=first["id"], instructions="other", **NO_THINKING)
            ).json()
            assert second["previous_response_id"] == first["id"]
            items = [
                {"role": "user", "content": "one"},
                *first["output"],
                {"role": "user", "content": "two"},
            ]
            sent = (await create(server, items, instructions="other", **NO_THINKING)).json()
            assert second["usage"]["input_tokens"] == sent["usage"]["input_tokens"]
            # The same prompt: the second found all of it in the cache.
            assert sent["usage"]["input_tokens_details"]["cached_tokens"] > second["usage"]["input_tokens"] - 200
            await server.http.delete(f"/v1/responses/{first['id']}")
            third = await create(server, "three", previous_response_id=second["id"], **NO_THINKING)
            assert third.status_code == 200, "the conversation outlives its first response"
            gone = await create(server, "x", previous_response_id=first["id"])
            assert (gone.status_code, gone.json()["error"]["code"]) == (400, "previous_response_not_found")

    asyncio.run(main())


def test_keys_do_not_see_each_other_s_responses(serving: Any) -> None:
    async def main() -> None:
        keys = ["first-key-1", "second-key-2"]
        async with serving(answer=ANSWER, keys=keys) as server:
            body = (await create(server, key=keys[0], background=True)).json()
            url = f"/v1/responses/{body['id']}"
            other = {"authorization": f"Bearer {keys[1]}"}
            for method, path in (
                ("GET", url),
                ("DELETE", url),
                ("POST", f"{url}/cancel"),
                ("GET", f"{url}/input_items"),
            ):
                assert (await server.http.request(method, path, headers=other)).status_code == 404
            refused = await create(server, key=keys[1], previous_response_id=body["id"])
            assert refused.json()["error"]["code"] == "previous_response_not_found"
            own = {"authorization": f"Bearer {keys[0]}"}
            assert (await server.http.get(url, headers=own)).status_code == 200

    asyncio.run(main())


def test_the_background(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer=ANSWER) as server:
            answer = (await create(server, background=True)).json()
            assert (answer["status"], answer["background"], answer["output"]) == ("queued", True, [])
            body = await until_over(server, answer["id"])
            assert (body["status"], body["output"][1]["content"][0]["text"]) == ("completed", "Hello")
            assert (await server.http.post(f"/v1/responses/{answer['id']}/cancel")).json() == body
            refused = await server.http.get(f"/v1/responses/{answer['id']}?stream=true")
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stream")
            await server.idle()

    asyncio.run(main())


def test_a_background_stream_is_read_again_from_anywhere(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer=ANSWER) as server:
            found = events((await create(server, background=True, stream=True)).text)
            assert [e["type"] for e in found[:3]] == ["response.created", "response.queued", "response.in_progress"]
            assert found[-1]["type"] == "response.completed"
            assert [e["sequence_number"] for e in found] == list(range(len(found)))
            url = f"/v1/responses/{found[0]['response']['id']}?stream=true"
            assert events((await server.http.get(url)).text) == found
            for n in (0, 5, len(found) - 1, len(found) + 7):
                assert events((await server.http.get(f"{url}&starting_after={n}")).text) == found[n + 1 :]
            assert (await server.http.get(f"{url}&starting_after=x")).status_code == 400

    asyncio.run(main())


def test_a_background_answer_is_cancelled_or_deleted(serving: Any) -> None:
    async def main() -> None:
        async with serving(step_seconds=0.01) as server:
            fields = {
                "background": True,
                "max_output_tokens": 3000,
                "ignore_eos": True,
                "reasoning": {"effort": "none"},
            }
            answer = (await create(server, **fields)).json()
            while not server.engine.stats.num_running:
                await asyncio.sleep(0.01)
            refused = await create(server, previous_response_id=answer["id"])
            assert refused.status_code == 400
            cancelled = (await server.http.post(f"/v1/responses/{answer['id']}/cancel")).json()
            assert cancelled["status"] == "cancelled"
            assert (await server.http.post(f"/v1/responses/{answer['id']}/cancel")).json() == cancelled
            await server.idle()
            answer = (await create(server, **fields)).json()
            assert (await server.http.delete(f"/v1/responses/{answer['id']}")).status_code == 200
            await server.idle()
            foreground = (await create(server, max_output_tokens=2, ignore_eos=True)).json()
            assert foreground["status"] == "incomplete"
            assert foreground["incomplete_details"] == {"reason": "max_output_tokens"}
            refused = await server.http.post(f"/v1/responses/{foreground['id']}/cancel")
            assert refused.status_code == 400

    asyncio.run(main())


def test_the_background_ends_with_the_server(serving: Any) -> None:
    async def main() -> None:
        async with serving(step_seconds=0.01) as server:
            fields = {"background": True, "max_output_tokens": 3000, "ignore_eos": True}
            answer = (await create(server, **fields)).json()
            streamed = asyncio.create_task(create(server, stream=True, max_output_tokens=3000, ignore_eos=True))
            while server.engine.stats.num_running < 2:
                await asyncio.sleep(0.01)
            server.state.stop_now()
            body = await until_over(server, answer["id"])
            assert (body["status"], body["error"]["code"]) == ("failed", "server_error")
            last = events((await streamed).text)[-1]
            assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
            await server.idle()

    asyncio.run(main())


def test_a_client_that_leaves_frees_the_engine_and_leaves_nothing(serving: Any) -> None:
    async def main() -> None:
        async with serving(step_seconds=0.01) as server:
            fields = {"max_output_tokens": 3000, "ignore_eos": True}
            for stream in (False, True):
                task = asyncio.create_task(create(server, stream=stream, **fields))
                while not server.engine.stats.num_running:
                    await asyncio.sleep(0.01)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await server.idle()
            assert len(server.state.responses) == 0

    asyncio.run(main())


def test_input_items(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer=ANSWER) as server:
            sent = [{"role": "user", "content": f"m{n}"} for n in range(5)]
            body = (await create(server, sent)).json()
            url = f"/v1/responses/{body['id']}/input_items"

            async def page(**query: Any) -> dict[str, Any]:
                return (await server.http.get(url, params=query)).json()  # type: ignore[no-any-return]

            whole = await page(order="asc")
            texts = [item["content"][0]["text"] for item in whole["data"]]
            assert texts == ["m0", "m1", "m2", "m3", "m4"]
            assert (whole["object"], whole["has_more"]) == ("list", False)
            assert (await page())["data"] == whole["data"][::-1]
            found: list[Any] = []
            after: dict[str, Any] = {}
            while True:
                one = await page(order="asc", limit=2, **after)
                assert one["first_id"] == one["data"][0]["id"]
                found += one["data"]
                after = {"after": one["last_id"]}
                if not one["has_more"]:
                    break
            assert found == whole["data"]
            assert (await server.http.get(url, params={"after": "no"})).status_code == 400

    asyncio.run(main())


@pytest.mark.parametrize("fields", [{"include_reasoning": False}, {"reasoning": {"exclude": True}}])
def test_reasoning_that_nobody_wants(serving: Any, fields: dict[str, Any]) -> None:
    async def main() -> None:
        async with serving(answer=ANSWER) as server:
            body = (await create(server, **fields)).json()
            assert [item["type"] for item in body["output"]] == ["message"]
            assert body["usage"]["output_tokens_details"]["reasoning_tokens"] > 0

    asyncio.run(main())


def test_input_tokens_agree_with_usage(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer=ANSWER) as server:
            counted = (await server.post("/v1/responses/input_tokens", {"model": "sim", "input": "hi"})).json()
            used = (await create(server)).json()["usage"]["input_tokens"]
            assert counted == {"object": "response.input_tokens", "input_tokens": used}

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_errors(serving: Any, stream: bool) -> None:
    async def main() -> None:
        async with serving(answer=ANSWER, max_model_len=1024) as server:
            for fields, status, code, param in (
                ({"model": "other"}, 404, "model_not_found", "model"),
                ({"input": "x" * 2000}, 400, "context_length_exceeded", "input"),
                ({"max_output_tokens": 5000}, 400, "context_length_exceeded", "max_output_tokens"),
                ({"truncation": "auto"}, 400, "unsupported_parameter", "truncation"),
                ({"text": {"format": {"type": "json_object"}}}, 400, "invalid_request_error", "text.format"),
                ({"input": [{"type": "function_call_output", "call_id": "x", "output": ""}]}, 400, None, "input"),
                ({"previous_response_id": "resp_x"}, 400, "previous_response_not_found", "previous_response_id"),
            ):
                answer = await server.post("/v1/responses", {"model": "sim", "input": "hi", "stream": stream, **fields})
                error = answer.json()["error"]
                assert (answer.status_code, error["param"]) == (status, param), error
                assert code is None or error["code"] == code
            await server.idle()

    asyncio.run(main())


def test_faults_of_the_engine(serving: Any) -> None:
    async def main() -> None:
        async with serving(step_seconds=0.05, config=ServerConfig(queue_timeout=0.4), max_num_seqs=1) as server:
            blocker = asyncio.create_task(create(server, max_output_tokens=60, ignore_eos=True))
            while not server.engine.stats.num_running:
                await asyncio.sleep(0.01)
            whole = await create(server)
            assert (whole.status_code, whole.json()["error"]["code"]) == (503, "deadline_exceeded")
            last = events((await create(server, stream=True)).text)[-1]
            assert (last["type"], last["response"]["error"]["code"]) == ("response.failed", "server_error")
            answer = (await create(server, background=True)).json()
            assert (await until_over(server, answer["id"]))["status"] == "failed"
            await blocker

    asyncio.run(main())
