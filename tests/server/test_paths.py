"""Paths: other spellings, HEAD, probes, tokens, prompts without an answer, CORS."""

import asyncio
import json
from typing import Any

import pytest

from server.aliases import ALIASES, PREFIXES, canonical
from server.config import ServerConfig, ServerConfigError

KEY = "secret-key-one"
CHAT = {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
COMPLETION = {"model": "sim", "prompt": "hi", "max_tokens": 3}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def test_deepseek_paths(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            for base in ("", "/beta", "/beta/v1", "/v1"):
                assert (await server.post(base + "/chat/completions", CHAT)).json()["object"] == "chat.completion"
                assert (await server.post(base + "/completions", COMPLETION)).json()["object"] == "text_completion"
                assert (await server.http.get(base + "/models")).json()["data"][0]["id"] == "sim"
                assert (await server.http.get(base + "/models/sim")).json()["id"] == "sim"
            assert (await server.http.get("/user/balance")).json() == {"is_available": True, "balance_infos": []}
            text = (await server.http.get("/metrics")).text
            # Four spellings, one route; no label is a client's text.
            assert 'fathom_http_responses_total{route="/v1/chat/completions",status="200"} 4.0' in text
            assert 'fathom_http_responses_total{route="/v1/models/{model_id:path}",status="200"} 4.0' in text
            assert "/beta" not in text

    asyncio.run(main())


def test_the_table_leads_to_routes(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            for path, target in {**ALIASES, **{a + "x": b + "x" for a, b in PREFIXES.items()}}.items():
                assert canonical(path)[0] == target
                assert canonical(target) == (target, "openai"), "one step, whatever comes in"
                answers = [(await server.http.get(p)).status_code for p in (path, target)]
                assert answers[0] == answers[1]
            for path in ("/chat/completions/", "/beta", "/betachat/completions", "/v1/v1/models", "//models/x"):
                assert canonical(path) == (path, "openai")
            dialects = {path: canonical(path)[1] for path in ("/chat/completions", "/beta/completions", "/v1/models")}
            assert dialects == {
                **dict.fromkeys(("/chat/completions", "/beta/completions"), "deepseek"),
                "/v1/models": "openai",
            }

    asyncio.run(main())


def test_head_is_get_without_a_body(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            for path in ("/", "/health", "/v1/models", "/models/sim", "/metrics", "/server_info", "/v1/files", "/nope"):
                got, head = await server.http.get(path), await server.http.head(path)
                assert (head.status_code, head.content) == (got.status_code, b"")
                if path != "/metrics":
                    assert head.headers["content-length"] == got.headers["content-length"]

    asyncio.run(main())


def test_probes_need_no_key_in_any_spelling(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x", keys=[KEY]) as server:
            for path in ("/ping", "/ready", "/v1/health/live", "/v1/health/ready", "/health"):
                assert (await server.http.get(path)).status_code == 200
                assert (await server.http.head(path)).status_code == 200
            for path in ("/", "/load", "/server_info", "/models", "/tokenizer_info", "/v1/health", "/user/balance"):
                assert (await server.http.get(path)).status_code == 401
            server.state.admission.draining = True
            for path in ("/ping", "/ready", "/v1/health/ready"):
                assert (await server.http.get(path)).status_code == 503
            assert (await server.http.get("/v1/health/live")).status_code == 200

    asyncio.run(main())


def test_what_is_served(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x", max_model_len=2048) as server:
            info = (await server.http.get("/server_info")).json()
            assert (info["model"], info["max_model_len"]) == ("sim", 2048)
            assert (await server.http.get("/load")).json() == {"server_load": 0}
            model = (await server.http.get("/v1/models")).json()["data"][0]
            assert (model["object"], model["type"], model["display_name"]) == ("model", "model", "sim")
            tokenizer = (await server.http.get("/tokenizer_info")).json()
            assert tokenizer["eos_token"] == "<｜end▁of▁sentence｜>"
            assert tokenizer["chat_template"] is None

    asyncio.run(main())


@pytest.mark.parametrize("base", ["", "/v1"])
def test_tokens(serving: Any, base: str) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            one = (await server.post(base + "/tokenize", {"prompt": "hé", "return_token_strs": True})).json()
            assert (one["count"], len(one["tokens"]), len(one["token_strs"])) == (3, 3, 3)
            many = (await server.post(base + "/tokenize", {"prompt": ["hé", ""], "return_token_strs": True})).json()
            assert many["tokens"] == [one["tokens"], []]
            assert many["token_strs"] == [one["token_strs"], []]
            back = (await server.post(base + "/detokenize", {"tokens": one["tokens"]})).json()
            assert back == {"prompt": "hé", "text": "hé"}
            back = (await server.post(base + "/detokenize", {"tokens": many["tokens"]})).json()
            assert back["text"] == ["hé", ""]
            ends = {"tokens": [1, *one["tokens"], 1]}
            assert (await server.post(base + "/detokenize", ends)).json()["text"].startswith("<｜end")
            ends["skip_special_tokens"] = True
            assert (await server.post(base + "/detokenize", ends)).json()["text"] == "hé"
            for body, param in (
                ({"prompt": 7}, "prompt"),
                ({"prompt": []}, "prompt"),
                ({"prompt": ["a", 7]}, "prompt"),
                ({}, "prompt"),
                ({"prompt": "x", "messages": CHAT["messages"]}, "prompt"),
                ({"messages": CHAT["messages"], "add_generation_prompt": False}, "add_generation_prompt"),
                ({"messages": CHAT["messages"], "tools": [{"type": "x"}]}, "tools[0].type"),
            ):
                answer = await server.post(base + "/tokenize", body)
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), body
            for tokens in (7, ["x"], [[1], 2], [[1], ["x"]], [10**9], [-1], [[10**9]]):
                answer = await server.post(base + "/detokenize", {"tokens": tokens})
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tokens"), tokens

    asyncio.run(main())


def test_render_is_the_prompt_that_would_run(serving: Any) -> None:
    chats = [
        CHAT,
        {**CHAT, "thinking": {"type": "disabled"}},
        {**CHAT, "tools": [TOOL]},
        {**CHAT, "messages": [{"role": "user", "content": "<｜User｜>"}]},
        {**CHAT, "truncate_prompt_tokens": 5},
    ]

    async def main() -> None:
        async with serving(answer="x</think>y") as server:
            for body in chats:
                ran = (await server.post("/v1/chat/completions", {**body, "return_token_ids": True})).json()
                for path in ("/render", "/v1/render", "/v1/chat/completions/render"):
                    found = (await server.post(path, body)).json()
                    assert found["token_ids"] == ran["prompt_token_ids"]
                    assert found["count"] == len(found["token_ids"]) == ran["usage"]["prompt_tokens"]
                    assert server.tokenizer.decode(found["token_ids"]) == found["prompt"]
                    assert (found["model"], found["max_model_len"]) == ("sim", 4096)
                if not {"thinking", "truncate_prompt_tokens"} & set(body):
                    counted = (await server.post("/tokenize", body)).json()
                    assert counted["tokens"] == ran["prompt_token_ids"]
            found = (await server.post("/render", {**COMPLETION, "prompt": ["a", [5, 6]]})).json()
            assert [p["token_ids"] for p in found["prompts"]] == [found["token_ids"], [5, 6]]
            response = {"model": "sim", "input": "hi"}
            message = {"model": "sim", "messages": CHAT["messages"], "system": "be kind", "max_tokens": 3}
            for path, body, count, field in (
                ("/v1/responses", response, "/v1/responses/input_tokens", "input_tokens"),
                ("/v1/messages", message, "/v1/messages/count_tokens", "input_tokens"),
            ):
                counted = (await server.post(count, body)).json()[field]
                for render in ("/render", path + "/render"):
                    found = (await server.post(render, body)).json()
                    assert found["count"] == len(found["token_ids"]) == counted
                    assert server.tokenizer.decode(found["token_ids"]) == found["prompt"]
                assert ("be kind" in found["prompt"]) == ("system" in body)
            for body, param in (
                ({"model": "sim"}, "messages"),
                ({**CHAT, "temperature": 9}, "temperature"),
                ({**CHAT, "model": "x"}, "model"),
                ({**COMPLETION, "prompt": [10**9]}, "prompt"),
            ):
                answer = await server.post("/render", body)
                assert answer.json()["error"]["param"] == param
            await server.idle()
            before = server.engine.stats.step_id
            for body in chats:
                await server.post("/render", body)
            assert server.engine.stats.step_id == before, "nothing runs"

    asyncio.run(main())


def test_cors_is_off_unless_an_origin_is_named(serving: Any) -> None:
    good, evil = "https://app.example", "https://evil.example"
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}

    async def main() -> None:
        async with serving(answer="xy", keys=[KEY]) as server:
            answer = await server.http.options("/v1/chat/completions", headers={"origin": good, **asks})
            assert not [name for name in answer.headers if name.startswith("access-control")]
        async with serving(answer="xy", keys=[KEY], config=ServerConfig(cors_origin=f"{good}, http://b:1")) as server:
            for path in ("/v1/chat/completions", "/chat/completions"):
                answer = await server.http.options(path, headers={"origin": good, **asks})
                assert answer.status_code == 200
                assert answer.headers["access-control-allow-origin"] == good
                assert "authorization" in answer.headers["access-control-allow-headers"].lower()
                assert "access-control-allow-credentials" not in answer.headers
                answer = await server.http.options(path, headers={"origin": evil, **asks})
                assert answer.status_code == 400
                assert "access-control-allow-origin" not in answer.headers
            for origin, allowed in ((good, good), (evil, None)):
                head = {"origin": origin, "authorization": f"Bearer {KEY}"}
                answer = await server.post("/v1/chat/completions", {**CHAT, "stream": True}, headers=head)
                assert answer.headers.get("access-control-allow-origin") == allowed
                *events, done, _ = answer.text.split("\n\n")
                assert done == "data: [DONE]"
                assert all(json.loads(event.removeprefix("data: ")) for event in events)
            # An error can be read too, and says nothing to strangers.
            answer = await server.post("/v1/chat/completions", CHAT, headers={"origin": good})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, good)
            upload = {"files": {"file": ("a", b"x")}, "data": {"purpose": "batch"}}
            for origin, status in ((good, 200), (evil, 403)):
                head = {"origin": origin, "authorization": f"Bearer {KEY}"}
                assert (await server.http.post("/v1/files", **upload, headers=head)).status_code == status

    asyncio.run(main())
    for wrong in ("example.org", "https://a/b", "https://user@a", "https://a b", "null"):
        with pytest.raises(ServerConfigError, match="cors-origin"):
            ServerConfig(cors_origin=wrong).check(num_keys=0)
    ServerConfig(cors_origin="*").check(num_keys=0)
