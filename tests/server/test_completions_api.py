"""Completions: texts, token ids, lists of prompts, the old log probabilities."""

import asyncio
import json
from typing import Any

import pytest


def chunks(text: str) -> list[Any]:
    blocks = text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def test_whole_answer_with_logprobs(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="aé</think>b") as server:
            body = (await server.complete("say", max_tokens=50, logprobs=1, return_token_ids=True)).json()
            assert body["object"] == "text_completion"
            (choice,) = body["choices"]
            assert choice["text"] == "aé</think>b"
            assert choice["finish_reason"] == "stop"
            assert choice["prompt_token_ids"] == server.tokenizer.encode("say")
            assert choice["token_ids"] == [*server.tokenizer.encode("aé</think>b", special=True), 1]
            rows = choice["logprobs"]
            assert len({len(rows[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}) == 1
            assert rows["tokens"][0] == "a"
            assert rows["text_offset"][0] == 0
            assert rows["text_offset"] == sorted(rows["text_offset"])
            assert rows["top_logprobs"][0]["a"] == rows["token_logprobs"][0]

    asyncio.run(main())


def test_default_length_and_ignore_eos(serving: Any) -> None:
    async def main() -> None:
        async with serving() as server:
            body = (await server.complete("x", ignore_eos=True)).json()
            assert body["usage"]["completion_tokens"] == 16
            assert body["choices"][0]["finish_reason"] == "length"
            body = (await server.complete("x", ignore_eos=True, max_tokens=300)).json()
            assert body["usage"]["completion_tokens"] == 300

    asyncio.run(main())


def test_text_and_ids_are_the_same_prompt(serving: Any) -> None:
    async def main() -> None:
        async with serving() as server:
            text = "Once <｜User｜> upon"
            ids = server.tokenizer.encode(text, special=True)
            assert len(ids) < len(server.tokenizer.encode(text))
            fields = {"seed": 7, "max_tokens": 20, "return_token_ids": True, "parse_special": True}
            first, second, third = [
                (await server.complete(prompt, **fields)).json()["choices"][0] for prompt in (text, ids, [ids])
            ]
            assert first == second == third

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts(serving: Any, stream: bool) -> None:
    async def main() -> None:
        async with serving() as server:
            prompts = ["one", [5, 6, 7], "three", "four"]
            fields = {"seed": 3, "max_tokens": 12, "return_token_ids": True, "ignore_eos": True}
            alone = [(await server.complete([p], **fields)).json()["choices"][0] for p in prompts]
            answer = await server.complete(prompts, stream=stream, **fields)
            if stream:
                found = chunks(answer.text)
                for index, expected in enumerate(alone):
                    mine = [c["choices"][0] for c in found if c["choices"][0]["index"] == index]
                    assert "".join(c["text"] for c in mine) == expected["text"]
                    assert [t for c in mine for t in c["token_ids"]] == expected["token_ids"]
                    assert [c["finish_reason"] for c in mine][-1] == "length"
                    assert mine[0]["prompt_token_ids"] == expected["prompt_token_ids"]
            else:
                body = answer.json()
                assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
                assert [{**c, "index": 0} for c in body["choices"]] == alone
                assert body["usage"]["completion_tokens"] == 48
            await server.idle()

    asyncio.run(main())


def test_stream_with_usage(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="hello") as server:
            options = {"include_usage": True}
            found = chunks((await server.complete(stream=True, stream_options=options)).text)
            assert found[-1]["choices"] == []
            assert found[-1]["usage"]["completion_tokens"] == 6
            assert all(c["usage"] is None for c in found[:-1])
            assert "".join(c["choices"][0]["text"] for c in found[:-1]) == "hello"

    asyncio.run(main())


def test_tokenize_and_detokenize_agree_with_the_server(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            text = "naïve <think> 😀"
            raw = (await server.post("/tokenize", {"prompt": text, "parse_special": True})).json()
            assert len(raw["tokens"]) == len(server.tokenizer.encode(text, special=True))
            answer = (await server.post("/tokenize", {"model": "sim", "prompt": text})).json()
            assert answer["tokens"] == server.tokenizer.encode(text)
            assert answer["count"] == len(answer["tokens"])
            assert answer["max_model_len"] == 4096
            completed = await server.complete(text)
            assert completed.json()["usage"]["prompt_tokens"] == answer["count"]
            asked = {"prompt": "a<think>é", "return_token_strs": True, "parse_special": True}
            assert (await server.post("/tokenize", asked)).json()["token_strs"] == ["a", "<think>", "\ufffd", "\ufffd"]
            back = await server.post("/detokenize", {"tokens": answer["tokens"]})
            assert back.json()["prompt"] == text
            messages = [{"role": "user", "content": text}]
            counted = (await server.post("/tokenize", {"messages": messages})).json()["count"]
            assert (await server.chat(text)).json()["usage"]["prompt_tokens"] == counted
            for body, param in (
                ({}, "prompt"),
                ({"prompt": "a", "messages": messages}, "prompt"),
                ({"prompt": 1}, "prompt"),
                ({"messages": []}, "messages"),
            ):
                error = await server.post("/tokenize", body)
                assert (error.status_code, error.json()["error"]["param"]) == (400, param)
            for ids in ([-1], [10**6], [2**70], ["a"], "a", [1.0], [True], None):
                error = await server.post("/detokenize", {"tokens": ids})
                assert error.status_code == 400
                assert error.json()["error"]["param"].startswith("tokens")

    asyncio.run(main())
