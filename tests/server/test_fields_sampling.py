"""Fields that change tokens, through HTTP: each really does what it says."""

import asyncio
from typing import Any

import numpy as np
import pytest

from engine.messages import ForcedToken, SamplingParams, unpack_ids
from server.errors import ApiError
from server.protocol.common import SamplingFields
from server.validation import check_prompt_logprobs, for_answer, sampling_params, truncated

FIXED = {"seed": 11, "max_tokens": 60, "ignore_eos": True, "return_token_ids": True}


def ids_of(answer: Any) -> list[int]:
    assert answer.status_code == 200, answer.text
    ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return ids


def test_allowed_tokens_and_bad_words(serving: Any) -> None:
    async def main() -> None:
        async with serving() as server:
            letters = server.tokenizer.encode("abc")
            for send in (server.complete, server.chat):
                assert set(ids_of(await send(allowed_token_ids=letters, **FIXED))) <= set(letters)
                answer = await send(allowed_token_ids=letters, bad_words=["b", "ca"], **FIXED)
                text = answer.json()["choices"][0]
                ids = ids_of(answer)
                shown = server.tokenizer.decode(ids)
                assert len(shown) == 60 and set(shown) <= set("ac") and "ca" not in shown, text

    asyncio.run(main())


def test_nothing_left_to_choose_is_the_client_s_error(serving: Any) -> None:
    async def main() -> None:
        async with serving() as server:
            a, b = server.tokenizer.encode("ab")
            answer = await server.complete(allowed_token_ids=[a, b], bad_words=["a", "b"])
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "allowed_token_ids")
            answer = await server.complete(allowed_token_ids=[1], min_tokens=2)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "allowed_token_ids")
            # Found out only on the way.
            answer = await server.complete(
                allowed_token_ids=[a, b], bad_words=["aa", "ab", "ba", "bb"], ignore_eos=True
            )
            assert answer.status_code == 400 and "no token" in answer.json()["error"]["message"]
            answer = await server.complete(
                allowed_token_ids=[a, b], bad_words=["aa", "ab", "ba", "bb"], ignore_eos=True, stream=True
            )
            assert answer.status_code == 200 and "no token" in answer.text and "[DONE]" not in answer.text
            await server.idle()

    asyncio.run(main())


def test_bad_words_are_plain_text_and_know_the_space_in_front(serving: Any) -> None:
    async def main() -> None:
        async with serving() as server:
            tokenizer = server.tokenizer
            fields = SamplingFields(model="m", bad_words=["</think>", "ab", " cd"])
            words = sampling_params(fields, server.state.serving(), None).bad_words
            plain = {tuple(tokenizer.encode(text)) for text in ("</think>", " </think>", "ab", " ab", " cd")}
            assert set(words) == plain
            assert tokenizer.special_id("</think>") not in {token for word in words for token in word}

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("budget", [0, 4, 9, 50])
def test_a_thinking_budget_ends_the_reasoning(serving: Any, budget: int, stream: bool) -> None:
    async def main() -> None:
        async with serving(answer="reasoning</think>content") as server:
            answer = await server.chat(thinking_token_budget=budget, stream=stream)
            assert answer.status_code == 200
            if stream:
                pieces = answer.text
                joined = "".join(part.split('"')[0] for part in pieces.split('"reasoning_content":"')[1:])
                assert joined == "reasoning"[:budget]
            else:
                message = answer.json()["choices"][0]["message"]
                assert (message["reasoning_content"], message["content"]) == ("reasoning"[:budget], "content")
                counts = answer.json()["usage"]["completion_tokens_details"]
                assert counts["reasoning_tokens"] >= min(budget, 9)

    asyncio.run(main())


def test_a_budget_is_nothing_where_nobody_thinks(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="content") as server:
            off = {"thinking": {"type": "disabled"}, "thinking_token_budget": 2}
            assert (await server.chat(**off)).json()["choices"][0]["message"]["content"] == "content"
            assert (await server.complete(thinking_token_budget=2)).json()["choices"][0]["text"] == "content"
            # A raw prompt that ends inside reasoning is reasoning.
            answer = await server.complete("x<think>", thinking_token_budget=2, parse_special=True)
            assert answer.json()["choices"][0]["text"].startswith("co</think>")
            answer = await server.complete("<think>x</think>", thinking_token_budget=2, parse_special=True)
            assert answer.json()["choices"][0]["text"] == "content"

    asyncio.run(main())


def test_special_tokens_are_shown_on_request(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="a<｜▁pad▁｜>b") as server:
            for shown, text in ((True, "ab"), (False, "a<｜▁pad▁｜>b")):
                answer = await server.complete(skip_special_tokens=shown, logprobs=0)
                choice = answer.json()["choices"][0]
                assert choice["text"] == text and choice["finish_reason"] == "stop"
                assert "".join(choice["logprobs"]["tokens"]) == text

    asyncio.run(main())


def test_stop_trimming_in_either_spelling(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="one two three") as server:
            for fields, text in (
                ({}, "one "),
                ({"include_stop_str_in_output": True}, "one two"),
                ({"no_stop_trim": True}, "one two"),
            ):
                answer = await server.complete(stop="two", **fields)
                assert answer.json()["choices"][0]["text"] == text

    asyncio.run(main())


def test_truncated_prompts(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x", max_model_len=512) as server:
            ids = list(range(3, 103))
            for fields, kept in (
                ({"truncate_prompt_tokens": 10}, ids[-10:]),
                ({"truncate_prompt_tokens": 10, "truncation_side": "right"}, ids[:10]),
                ({"truncate_prompt_tokens": 500}, ids),
                ({"truncate_prompt_tokens": -1}, ids),
            ):
                answer = await server.complete(ids, return_token_ids=True, **fields)
                assert answer.json()["choices"][0]["prompt_token_ids"] == kept
            # What is far too long fits.
            answer = await server.complete("z" * 5000, truncate_prompt_tokens=-1, max_tokens=12)
            assert answer.json()["usage"]["prompt_tokens"] == 500
            fields = {"return_token_ids": True, "thinking": {"type": "disabled"}}
            answer = await server.chat("z" * 5000, truncate_prompt_tokens=100, **fields)
            whole = (await server.chat("z" * 90, **fields)).json()["prompt_token_ids"]
            assert answer.json()["prompt_token_ids"][-20:] == whole[-20:]
            assert answer.json()["usage"]["prompt_tokens"] == 100

    asyncio.run(main())


def test_user_ids_do_not_share_a_cache(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            prompt, seen = "p" * 3500, []
            for fields in ({}, {}, {"user_id": "a"}, {"user_id": "a"}, {"user_id": "b"}, {"cache_salt": "a"}):
                usage = (await server.complete(prompt, **fields)).json()["usage"]
                seen.append(usage["prompt_cache_hit_tokens"] > 0)
            assert seen == [False, True, False, True, False, False]

    asyncio.run(main())


def test_choices_have_seeds_of_their_own() -> None:
    params = SamplingParams(seed=2**63 - 1, prompt_logprobs=2, forced_token=ForcedToken(token_id=5, after=3))
    answers = [for_answer(params, max_tokens=7, choice=n, reasoning=n == 0) for n in range(8)]
    assert answers[0].seed == params.seed and len({a.seed for a in answers}) == 8
    assert all(a.seed is not None and 0 <= a.seed < 2**63 and a.max_tokens == 7 for a in answers)
    assert [a.prompt_logprobs for a in answers] == [2] + [None] * 7
    assert [a.forced_token is not None for a in answers] == [True] + [False] * 7
    assert for_answer(SamplingParams(), max_tokens=1, choice=3).seed is None
    with pytest.raises(ApiError) as raised:
        for_answer(SamplingParams(min_tokens=8), max_tokens=7)
    assert raised.value.param == "min_tokens"


def test_the_validator_speaks_for_the_engine(serving: Any) -> None:
    async def main() -> None:
        async with serving(max_model_len=512) as server:
            known = server.state.serving()
            width = known.info.vocab_size
            for fields, param in (
                ({"stop_token_ids": [width]}, "stop_token_ids"),
                ({"allowed_token_ids": [0, width]}, "allowed_token_ids"),
                ({"logit_bias": {str(width): 1.0}}, "logit_bias"),
            ):
                with pytest.raises(ApiError) as raised:
                    sampling_params(SamplingFields(model="m", **fields), known, None)
                assert raised.value.param == param
            fields = SamplingFields(model="m", allowed_token_ids=[9, 3, 9], thinking_token_budget=6)
            params = sampling_params(fields, known, 4)
            assert unpack_ids(params.allowed_token_ids or b"").tolist() == [3, 9]
            assert params.forced_token is not None and params.forced_token.after == 6
            assert params.forced_token.token_id == known.tokenizer.required_id("</think>")
            unbound = sampling_params(SamplingFields(model="m", thinking_token_budget=-1), known, None)
            assert unbound.forced_token is None

    asyncio.run(main())


def test_log_probabilities_of_prompts_are_bounded() -> None:
    check_prompt_logprobs([1000, 2**20 - 1000], 0, "p")
    check_prompt_logprobs([10**9], None, "p")
    for lengths, num_top in (([2**20 + 1], 0), ([2**16, 1], 15), ([10**6], 20)):
        with pytest.raises(ApiError) as raised:
            check_prompt_logprobs(lengths, num_top, "p")
        assert raised.value.param == "p"


def test_truncation_keeps_one_token_at_least() -> None:
    ids = np.arange(10, dtype=np.int32)
    assert truncated(ids, SamplingFields(model="m", truncate_prompt_tokens=-1), 5, 9).tolist() == [9]
    assert truncated(ids, SamplingFields(model="m", truncate_prompt_tokens=-1), 5, None).tolist() == [6, 7, 8, 9]
    assert truncated(ids, SamplingFields(model="m"), 5, None) is ids


def test_prompt_logprobs_of_a_chat(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="why</think>because") as server:
            answer = (await server.chat(prompt_logprobs=2, return_token_ids=True)).json()
            rows, ids = answer["prompt_logprobs"], answer["prompt_token_ids"]
            assert len(rows) == len(ids) and rows[0] is None
            for token_id, row in zip(ids[1:], rows[1:], strict=True):
                assert len(row) == 2 and row[str(token_id)]["rank"] == 1
            assert answer["choices"][0]["message"]["content"] == "because"
            assert "prompt_logprobs" not in (await server.chat()).json()
            answer = await server.chat(prompt_logprobs=0, stream=True)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt_logprobs")

    asyncio.run(main())
