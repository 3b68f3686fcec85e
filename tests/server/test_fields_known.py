"""Every field of the dialects that clients speak is honoured, refused by name or accepted without effect."""

import asyncio
from typing import Any

import pytest
from openai.types import completion_create_params as openai_completions
from openai.types.chat import completion_create_params as openai_chat

from server.errors import ApiError
from server.protocol.chat import ChatBody
from server.protocol.common import Body, FormatFields, ReasoningViewFields, SamplingFields, ThinkingFields
from server.protocol.completions import CompletionBody
from server.protocol.known_fields import ACCEPTED_WITHOUT_EFFECT, REASONS, REFUSED_EVERYWHERE
from server.protocol.messages_request import CountBody, MessagesBody
from server.protocol.responses_request import ResponsesBody

OPENAI = {
    ChatBody: {*openai_chat.CompletionCreateParamsBase.__annotations__, "stream"},
    CompletionBody: {*openai_completions.CompletionCreateParamsBase.__annotations__, "stream"},
}
DEEPSEEK = {
    ChatBody: """model messages thinking reasoning_effort max_tokens temperature top_p frequency_penalty
    presence_penalty stop n seed logprobs top_logprobs stream stream_options response_format tools
    tool_choice parallel_tool_calls user_id""",
    CompletionBody: """model prompt suffix echo max_tokens stop stream stream_options temperature top_p logprobs
    frequency_penalty presence_penalty""",
}
_VLLM = """use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids ignore_eos
    min_tokens include_stop_str_in_output skip_special_tokens spaces_between_special_tokens
    truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words
    add_special_tokens response_format structured_outputs priority request_id session_id
    return_tokens_as_token_ids return_token_ids routed_experts_prompt_start return_token_offsets
    return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs repetition_detection
    stream_interval thinking_token_budget best_of guided_json guided_regex guided_choice guided_grammar
    guided_decoding_backend guided_whitespace_pattern detokenize logits_processors early_stopping"""
VLLM = {
    ChatBody: _VLLM.replace("best_of", "")
    + """ echo add_generation_prompt continue_final_message documents chat_template chat_template_kwargs
    media_io_kwargs mm_processor_kwargs include_reasoning reasoning_effort return_prompt_text""",
    CompletionBody: _VLLM + " prompt_embeds",
}
_SGLANG = """return_hidden_states return_routed_experts routed_experts_start_len return_cached_tokens_details
    return_token_ids top_k min_p min_tokens regex ebnf repetition_penalty stop_token_ids stop_regex
    no_stop_trim ignore_eos skip_special_tokens lora_path session_id session_params custom_params
    custom_logit_processor images_config bootstrap_host bootstrap_port bootstrap_room routed_dp_rank
    disagg_prefill_dp_rank data_parallel_rank rid extra_key cache_salt ngram_corpus_id priority
    response_format"""
SGLANG = {
    ChatBody: _SGLANG
    + """ return_prompt_token_ids return_meta_info task continue_final_message separate_reasoning
    stream_reasoning chat_template_kwargs max_dynamic_patch min_dynamic_patch use_audio_in_video
    input_ids reasoning""",
    CompletionBody: _SGLANG + " json_schema custom_labels",
}
OTHERS = {ChatBody: "thinking_budget max_thinking_tokens", CompletionBody: "parse_special"}


def places(kind: type[Body], name: str) -> list[str]:
    honoured = name in kind.model_fields or name in kind.ALIASES or (name == "reasoning" and kind.knows(name))
    found = {"honoured": honoured, "refused": name in kind.REFUSED, "without effect": name in kind.IGNORED}
    return [place for place, there in found.items() if there]


@pytest.mark.parametrize("kind", [ChatBody, CompletionBody])
@pytest.mark.parametrize(
    "dialect", [OPENAI, DEEPSEEK, VLLM, SGLANG, OTHERS], ids=["openai", "deepseek", "vllm", "sglang", "others"]
)
def test_every_known_field_has_exactly_one_place(kind: type[Body], dialect: dict[type[Body], Any]) -> None:
    names = dialect[kind].split() if isinstance(dialect[kind], str) else dialect[kind]
    assert len(names) >= 1
    wrong = {name: places(kind, name) for name in names if len(places(kind, name)) != 1}
    assert not wrong


@pytest.mark.parametrize("kind", [ChatBody, CompletionBody])
def test_the_tables_do_not_overlap(kind: type[Body]) -> None:
    for name in {*kind.model_fields, *kind.REFUSED, *kind.IGNORED, *kind.ALIASES}:
        assert len(places(kind, name)) == 1, name
    assert set(kind.ALIASES.values()) <= set(kind.model_fields)
    assert set(REASONS) <= {*kind.REFUSED, *REFUSED_EVERYWHERE, "best_of"}
    assert not ACCEPTED_WITHOUT_EFFECT & set(REFUSED_EVERYWHERE)


BODIES: dict[str, tuple[type[Body], dict[str, Any]]] = {
    "/v1/chat/completions": (ChatBody, {"model": "sim", "messages": [{"role": "user", "content": "hi"}]}),
    "/v1/completions": (CompletionBody, {"model": "sim", "prompt": "hi"}),
}


@pytest.mark.parametrize("path", list(BODIES))
def test_refused_fields_are_named_and_their_neutral_values_pass(serving: Any, path: str) -> None:
    async def main() -> None:
        kind, base = BODIES[path]
        async with serving(answer="x") as server:
            for name, neutral in kind.REFUSED.items():
                answer = await server.post(path, {**base, name: {"surely": "not neutral"}})
                error = answer.json()["error"]
                assert (answer.status_code, error["param"], error["code"]) == (400, name, "unsupported_parameter")
                assert name in error["message"]
                for value in (*neutral, None):
                    assert (await server.post(path, {**base, name: value})).status_code == 200, (name, value)

    asyncio.run(main())


@pytest.mark.parametrize("path", list(BODIES))
def test_accepted_fields_change_nothing(serving: Any, path: str) -> None:
    async def main() -> None:
        kind, base = BODIES[path]
        async with serving() as server:
            fields = {"seed": 4, "max_tokens": 12, "return_token_ids": True}
            plain = await server.post(path, {**base, **fields})
            assert "x-fathom-ignored-fields" not in plain.headers
            everything = {name: {"a": ["b"]} for name in kind.IGNORED}
            answer = await server.post(path, {**base, **fields, **everything})
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"] == plain.json()["choices"]
            assert "x-fathom-ignored-fields" not in answer.headers
            assert "fathom_unknown_fields_total 0.0" in (await server.http.get("/metrics")).text

    asyncio.run(main())


def test_unknown_fields_are_ignored_counted_and_named(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x") as server:
            answer = await server.chat(frobnicate=1, another={"deep": []}, absent=None)
            assert answer.status_code == 200
            assert answer.headers["x-fathom-ignored-fields"] == "frobnicate, another"
            assert "fathom_unknown_fields_total 2.0" in (await server.http.get("/metrics")).text
            # A failing request names them too, and a stream.
            assert (await server.chat(frobnicate=1, stream=True)).headers["x-fathom-ignored-fields"] == "frobnicate"
            assert (
                (await server.chat(frobnicate=1, n=3, best_of=9)).headers["x-fathom-ignored-fields"].startswith("frob")
            )
            # Bounded, and nothing of a client's bytes in a header but names.
            hostile = {f"a\r\nx-evil: {n}\x00é{'y' * 500}": 1 for n in range(300)}
            answer = await server.chat(**hostile)
            value = answer.headers["x-fathom-ignored-fields"]
            assert answer.status_code == 200 and len(value) < 2048 and value.endswith("...")
            assert set(value) <= set("abcdefghijklmnopqrstuvwxyz0123456789?-_., ") and "x-evil" not in answer.headers

    asyncio.run(main())


def test_alias_spellings(serving: Any) -> None:
    raw = {"model": "m", "messages": [{}], "thinking_budget": 7, "no_stop_trim": True}
    body, unknown = ChatBody.from_object(dict(raw))
    assert (body.thinking_token_budget, body.include_stop_str_in_output, unknown) == (7, True, [])
    body, unknown = ChatBody.from_object({**raw, "thinking_token_budget": 7})
    assert body.thinking_token_budget == 7

    async def main() -> None:
        async with serving(answer="x") as server:
            for fields in (
                {"thinking_token_budget": 5, "max_thinking_tokens": 6},
                {"thinking_budget": 5, "max_thinking_tokens": 6},
            ):
                error = (await server.chat(**fields)).json()["error"]
                assert error["param"] == "max_thinking_tokens" and "different" in error["message"]
            assert (await server.chat(thinking_budget=5, max_thinking_tokens=5)).status_code == 200

    asyncio.run(main())


def test_one_object_for_reasoning() -> None:
    base = {"model": "m", "messages": [{}]}
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"reasoning": {"effort": "low", "max_tokens": 9}}, {"reasoning_effort": "low", "thinking_token_budget": 9}),
        ({"reasoning": {"enabled": False}}, {"thinking": {"type": "disabled"}}),
        ({"reasoning": {"enable": True, "effort": None}}, {"thinking": {"type": "enabled"}, "reasoning_effort": None}),
        ({"reasoning": {"effort": "low"}, "reasoning_effort": "max"}, {"reasoning_effort": "max"}),
        ({"thinking": {"type": "enabled", "budget_tokens": 8}}, {"thinking_token_budget": 8}),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 8}, "thinking_token_budget": 3},
            {"thinking_token_budget": 3},
        ),
    ]
    for sent, expected in cases:
        body, unknown = ChatBody.from_object({**base, **sent})
        assert unknown == []
        assert {name: getattr(body, name) for name in expected} == expected


def test_the_salt_tells_parts_apart() -> None:
    def salt(**fields: Any) -> str:
        return SamplingFields(model="m", **fields).salt

    salts = [
        *(salt(), salt(user_id="a"), salt(cache_salt="a"), salt(extra_key="a"), salt(user_id="a", cache_salt="a")),
        *(salt(cache_salt="1:a"), salt(cache_salt="1:a0:"), salt(user_id="a", extra_key="a"), salt(cache_salt="aa")),
    ]
    assert len(set(salts)) == len(salts) and salt() == ""


def test_mixins_share_no_field() -> None:
    kinds = (SamplingFields, ThinkingFields, ReasoningViewFields, FormatFields)
    names = [name for kind in kinds for name in kind.model_fields]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("kind", [ResponsesBody, MessagesBody, CountBody])
def test_the_other_apis_forget_none_of_them(kind: type[Body]) -> None:
    """What chat or completions honour is known there too: honoured, or refused where an answer has no place for it."""
    shared = {*SamplingFields.model_fields, *ReasoningViewFields.model_fields, *FormatFields.model_fields}
    assert all(kind.knows(name) for name in shared)
    # What `SamplingFields` declares and such an answer cannot show is refused before it is read.
    for name, value in (("n", 2), ("prompt_logprobs", 1), ("return_token_ids", True)):
        content = {"input": "x"} if kind is ResponsesBody else {"messages": [{}]}
        with pytest.raises(ApiError) as raised:
            kind.from_object({"model": "m", "max_tokens": 1, **content, name: value})
        assert raised.value.param == name
