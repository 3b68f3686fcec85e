"""Completions: echo and scores, fill in the middle, choices and prompts together, streamed and whole."""

import asyncio
import json
import math
from typing import Any

import pytest

from server.config import ServerConfig

COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def chunks(text: str) -> list[Any]:
    blocks = text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def folded(found: list[Any]) -> list[dict[str, Any]]:
    """The choices that the chunks of a stream add up to."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in found:
        for piece in chunk["choices"]:
            choice = choices.setdefault(piece["index"], {"text": "", "logprobs": None, "finish_reason": None})
            assert choice["finish_reason"] is None, "a chunk after the end"
            choice["text"] += piece["text"]
            choice["finish_reason"] = piece["finish_reason"]
            for name in ("token_ids", "prompt_token_ids"):
                if name in piece:
                    choice[name] = choice.get(name, []) + piece[name]
            if piece["logprobs"] is not None:
                before = choice["logprobs"] or {name: [] for name in COLUMNS}
                choice["logprobs"] = {name: before[name] + piece["logprobs"][name] for name in COLUMNS}
    return [choices[index] | {"index": index} for index in sorted(choices)]


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 3},
        {"prompt": ["a", [5, 6, 7], "é"], "n": 2},
        {"echo": True, "prompt": ["one é", [70, 71, 72]]},
        {"echo": True, "logprobs": 2, "prompt": ["one é", [70, 71, 72]], "n": 2},
        {"echo": True, "logprobs": 0, "max_tokens": 0, "prompt": "x"},
        {"echo": True, "max_tokens": 0, "prompt": ["abc", "de"]},
        {"logprobs": 3, "return_token_ids": True, "return_tokens_as_token_ids": True},
        {"suffix": "end", "echo": True, "return_token_ids": True},
    ],
    ids=str,
)
def test_a_stream_adds_up_to_the_whole_answer(serving: Any, fields: dict[str, Any]) -> None:
    async def main() -> None:
        async with serving() as server:
            common = {"prompt": "say", "seed": 5, "max_tokens": 9, "ignore_eos": True, **fields}
            prompt = common.pop("prompt")
            whole = (await server.complete(prompt, **common)).json()
            options = {"include_usage": True}
            found = chunks((await server.complete(prompt, stream=True, stream_options=options, **common)).text)
            assert folded(found[:-1]) == whole["choices"]
            counts = {name: n for name, n in whole["usage"].items() if name.endswith("_tokens") and "cache" not in name}
            assert {name: found[-1]["usage"][name] for name in counts} == counts
            await server.idle()

    asyncio.run(main())


def test_choices_of_one_prompt(serving: Any) -> None:
    async def main() -> None:
        async with serving() as server:
            fields = {"seed": 5, "max_tokens": 10, "ignore_eos": True, "return_token_ids": True}
            one = (await server.complete("hello", **fields)).json()
            many = (await server.complete("hello", n=8, **fields)).json()
            assert [c["index"] for c in many["choices"]] == list(range(8))
            assert many["choices"][0]["token_ids"] == one["choices"][0]["token_ids"]
            assert len({tuple(c["token_ids"]) for c in many["choices"]}) == 8
            # The prompt counts once.
            assert many["usage"]["prompt_tokens"] == 5 and many["usage"]["completion_tokens"] == 80
            again = (await server.complete("hello", n=8, **fields)).json()
            assert again["choices"] == many["choices"]
            for best_of, status in ((8, 200), (1, 400), (9, 400)):
                answer = await server.complete("hello", n=8, best_of=best_of, **fields)
                assert answer.status_code == status
            answer = await server.complete(["x"] * 33, n=8)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
            await server.idle()

    asyncio.run(main())


@pytest.mark.parametrize("prompt", ["naïve 😀 <｜User｜>", [70, 71, 0, 200, 201, 72], "x", [5]], ids=str)
def test_scores_of_a_prompt(serving: Any, prompt: Any) -> None:
    """What lm-eval asks for: a list of ids, echo, logprobs, and no more than one token."""

    async def main() -> None:
        async with serving(answer="yes") as server:
            tokenizer = server.tokenizer
            ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            text = tokenizer.decode(ids)
            for max_tokens, answer in ((0, ""), (1, "y"), (9, "yes")):
                body = (await server.complete(prompt, echo=True, logprobs=2, max_tokens=max_tokens)).json()
                (choice,) = body["choices"]
                assert choice["text"] == text + answer
                assert choice["finish_reason"] == ("stop" if max_tokens == 9 else "length")
                rows = choice["logprobs"]
                assert {len(rows[name]) for name in COLUMNS} == {len(ids) + len(answer)}
                assert rows["token_logprobs"][0] is None and rows["top_logprobs"][0] is None
                assert rows["token_logprobs"][1:] == pytest.approx([-math.log(2)] * (len(ids) + len(answer) - 1))
                for token, top in zip(rows["tokens"][1:], rows["top_logprobs"][1:], strict=True):
                    assert token in top and 1 <= len(top) <= 3
                assert rows["text_offset"] == sorted(rows["text_offset"]) and rows["text_offset"][0] == 0
                assert rows["text_offset"][len(ids) :] == [len(text) + n for n in range(len(answer))]
                for token_id, offset in zip(ids, rows["text_offset"], strict=False):
                    raw = tokenizer.bytes_table[token_id]
                    assert not raw.isascii() or text.startswith(raw.decode(), offset)
                usage = body["usage"]
                assert usage["prompt_tokens"] == len(ids)
                assert usage["completion_tokens"] == {0: 0, 1: 1, 9: 4}[max_tokens]
            await server.idle()

    asyncio.run(main())


def test_prompt_logprobs_by_id(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="yes") as server:
            ids = server.tokenizer.encode("abc")
            for n, count in ((0, 1), (2, 2)):
                body = (await server.complete("abc", prompt_logprobs=n, max_tokens=2)).json()
                rows = body["choices"][0]["prompt_logprobs"]
                assert rows[0] is None and len(rows) == 3
                for token_id, row in zip(ids[1:], rows[1:], strict=True):
                    assert len(row) == count
                    assert row[str(token_id)]["decoded_token"] == server.tokenizer.decode([token_id])
                    assert row[str(token_id)]["rank"] == 1 and row[str(token_id)]["logprob"] < 0
            # Echo shows no more than logprobs asks for, and both can be asked for at once.
            body = (await server.complete("abc", prompt_logprobs=5, echo=True, logprobs=1, max_tokens=1)).json()
            choice = body["choices"][0]
            assert [len(row) for row in choice["prompt_logprobs"][1:]] == [5, 5]
            assert [len(row) for row in choice["logprobs"]["top_logprobs"][1:3]] == [1, 1]
            error = (await server.complete("abc", prompt_logprobs=1, stream=True)).json()["error"]
            assert error["param"] == "prompt_logprobs"

    asyncio.run(main())


def test_fill_in_the_middle(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="middle") as server:
            tokenizer = server.tokenizer
            begin, hole, end = (tokenizer.special_id(f"<｜fim▁{part}｜>") for part in ("begin", "hole", "end"))
            fields = {"return_token_ids": True}
            answer = (await server.complete("be<｜fim▁hole｜>", suffix="af<｜User｜>", **fields)).json()
            (choice,) = answer["choices"]
            before, after = tokenizer.encode("be<｜fim▁hole｜>"), tokenizer.encode("af<｜User｜>")
            assert choice["prompt_token_ids"] == [begin, *before, hole, *after, end]
            assert choice["text"] == "middle"
            assert (await server.complete("be", suffix="af", echo=True)).json()["choices"][0]["text"] == "bemiddle"
            plain = (await server.complete("be", suffix="", **fields)).json()["choices"][0]
            assert plain["prompt_token_ids"] == tokenizer.encode("be")
            for wrong, param in (
                ({"prompt": [5, 6]}, "suffix"),
                ({"prompt": "a", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
                ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
            ):
                answer = await server.complete(suffix="x", **wrong)
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
            # A tokenizer without these tokens cannot.
            tokenizer._special_ids.pop("<｜fim▁hole｜>")
            answer = await server.complete("a", suffix="b")
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "suffix")

    asyncio.run(main())


def test_max_tokens_zero_needs_something_to_say(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="yes") as server:
            for fields, status in (
                ({}, 400),
                ({"logprobs": 1}, 400),
                ({"echo": True, "min_tokens": 1}, 400),
                ({"echo": True}, 200),
                ({"prompt_logprobs": 0}, 200),
            ):
                answer = await server.complete("abc", max_tokens=0, **fields)
                assert answer.status_code == status, (fields, answer.text)

    asyncio.run(main())


def test_usage_in_the_words_of_the_dialect(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="hello") as server:
            options = {"include_usage": True, "continuous_usage_stats": True}
            found = chunks((await server.complete(stream=True, stream_options=options, n=2)).text)
            assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == 12
            counted = [chunk["usage"]["completion_tokens"] for chunk in found]
            assert counted == sorted(counted) and counted[0] < 12
            found = chunks((await server.complete(stream=True)).text)
            assert not any("usage" in chunk for chunk in found)
        async with serving(answer="hello", config=ServerConfig(api_compat="deepseek")) as server:
            for options in (None, {"include_usage": True}):
                fields = {} if options is None else {"stream_options": options}
                found = chunks((await server.complete(stream=True, n=2, **fields)).text)
                assert all(chunk["choices"] for chunk in found)
                assert found[-1]["choices"][0]["finish_reason"] == "stop"
                assert found[-1]["usage"]["completion_tokens"] == 12
                assert all(chunk.get("usage") is None for chunk in found[:-1])

    asyncio.run(main())


def test_many_scores_are_bounded(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x", max_model_len=65536) as server:
            for fields, status in (
                ({"prompt_logprobs": 20, "prompt": [7] * 60_000}, 400),
                ({"echo": True, "logprobs": 20, "prompt": [[7] * 30_000] * 2}, 400),
                ({"echo": True, "logprobs": 0, "prompt": [[7] * 20_000] * 2}, 200),
            ):
                answer = await server.complete(max_tokens=1, **fields)
                assert answer.status_code == status
                if status == 400:
                    assert answer.json()["error"]["param"] in fields

    asyncio.run(main())
