"""Bodies of requests: good ones, and for each field values that are wrong."""

from typing import Any

HUGE = 10**30
NOT_A_NUMBER = ["1", [], {}, True]
NOT_AN_INTEGER = ["1", [], {}, True, 1.5, 1.0]
NOT_A_BOOLEAN = ["true", 1, 0, [], {}]

BAD_FUNCTIONS = [
    *({"name": name} for name in (1, "", "a b", "é", "x" * 129, None)),
    *({"name": "f", "description": 1}, {"name": "f", "parameters": []}, {"name": "f", "strict": "yes"}),
]

COMMON: dict[str, list[Any]] = {
    "model": [1, "", [], {}, True],
    "stream": NOT_A_BOOLEAN,
    "stream_options": [1, "x", [], True, {"include_usage": True}],
    "max_tokens": [*NOT_AN_INTEGER, 0, -1, HUGE, 2**31],
    "min_tokens": [*NOT_AN_INTEGER, -1, HUGE, 100],
    "temperature": [*NOT_A_NUMBER, -0.1, 2.1, HUGE],
    "top_p": [*NOT_A_NUMBER, 0, -1, 1.01, HUGE],
    "top_k": [*NOT_AN_INTEGER, -2, HUGE],
    "min_p": [*NOT_A_NUMBER, -0.1, 1.1],
    "presence_penalty": [*NOT_A_NUMBER, -2.1, 2.1],
    "frequency_penalty": [*NOT_A_NUMBER, -2.1, 2.1],
    "repetition_penalty": [*NOT_A_NUMBER, 0, -1, 11],
    "logit_bias": [1, "x", [], True, {"a": 1}, {"1": "x"}, {"1": 101}, {"-1": 1}, {"99999": 1}, {"²": 1}, {"1": True}],
    "seed": [*NOT_AN_INTEGER, HUGE, 2**63],
    "stop": [1, {}, True, "", ["a", ""], ["a", 1], ["x"] * 17, "y" * 1025, [["a"]]],
    "stop_token_ids": [1, "x", {}, True, [-1], [2048], [HUGE], ["a"], [1.5], [True], [1] * 129],
    "include_stop_str_in_output": NOT_A_BOOLEAN,
    "ignore_eos": NOT_A_BOOLEAN,
    "return_token_ids": NOT_A_BOOLEAN,
    "priority": [*NOT_AN_INTEGER, HUGE, -1001],
    "cache_salt": [1, [], {}, True, "s" * 257],
    "extra_key": [1, [], {}, True, "s" * 257],
    "user_id": [1, [], {}, True, "", "a b", "é", "u" * 513],
    "n": [0, 9, -1, "1", 1.0, True, HUGE],
    "use_beam_search": [True],
    "bad_words": [1, "x", {}, [1], [""], ["x" * 1025], ["x"] * 129],
    "allowed_token_ids": [1, "x", {}, [], ["a"], [-1], [2048], [HUGE], [1.0], [True]],
    "prompt_logprobs": [*NOT_AN_INTEGER, -1, 21],
    "thinking_token_budget": [*NOT_AN_INTEGER, -2, HUGE],
    "thinking_budget": [*NOT_AN_INTEGER, -2, HUGE],
    "max_thinking_tokens": [*NOT_AN_INTEGER, -2, HUGE],
    "skip_special_tokens": NOT_A_BOOLEAN,
    "return_tokens_as_token_ids": NOT_A_BOOLEAN,
    "no_stop_trim": NOT_A_BOOLEAN,
    "truncation_side": [1, "up", [], True],
    "detokenize": [False, 1],
    "stop_regex": ["a+"],
    "logprob_token_ids": [[1]],
    "return_hidden_states": [True],
    "prompt_embeds": ["AAAA"],
    "structured_outputs": [{"regex": "(a"}, {"structural_tag": "{}"}, {"json": {}, "regex": "a"}, {"banana": 1}],
    "guided_json": [1, "x", {"not": {}}, {"type": "banana"}, False],
    "guided_regex": [1, "", "(a", "(a)\\1"],
    "response_format": [{"type": "json_schema"}, "text", {"type": "banana"}, {}],
    "guided_choice": [[], "a", [1], [""]],
    "guided_grammar": [1, "", "root := x", "start: <[1]>", "start: %json {}"],
    "truncate_prompt_tokens": [*NOT_AN_INTEGER, -2, 0, HUGE],
    "kv_transfer_params": [{"host": "10.0.0.1"}],
    "custom_logit_processor": ["x"],
}
CHAT = COMMON | {
    "messages": [1, "x", {}, True, [], [1], ["x"], [[]]],
    "max_completion_tokens": [*NOT_AN_INTEGER, 0, -1, HUGE],
    "thinking": [1, "enabled", [], True, {}, {"type": "banana"}, {"type": 1}],
    "reasoning_effort": [1, [], {}, True, "banana", ""],
    "chat_template_kwargs": [
        1,
        "x",
        [],
        True,
        {"thinking": 1},
        {"enable_thinking": "no"},
        {"reasoning_effort": 3},
        {"x": 1},
    ],
    "reasoning": [1, "high", [], {"enabled": 1}, {"exclude": "yes"}, {"summary": "auto"}],
    "include_reasoning": NOT_A_BOOLEAN,
    "separate_reasoning": NOT_A_BOOLEAN,
    "stream_reasoning": NOT_A_BOOLEAN,
    "logprobs": [*NOT_A_BOOLEAN, 5],
    "top_logprobs": [*NOT_AN_INTEGER, -1, 21, 5],
    "tools": [
        *({}, "x", [1], [{}], [{"type": "web_search"}], [{"type": "function"}], [{"type": "function", "function": {}}]),
        *([{"type": "function", "function": function}] for function in BAD_FUNCTIONS),
        [{"type": "function", "function": {"name": "f"}}] * 2,
        [{"type": "function", "function": {"name": f"f{n}"}} for n in range(129)],
    ],
    "tool_choice": [
        *("required", "x", 1, [], {}, {"type": "function"}, {"type": "function", "function": {"name": "f"}}),
        *({"type": "custom", "custom": {"name": "f"}}, {"type": "allowed_tools"}),
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": [{"type": "function"}]}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function"}]}},
    ],
    "parallel_tool_calls": NOT_A_BOOLEAN,
    "functions": [[{"name": "f"}]],
    "audio": [{"voice": "a"}],
    "modalities": [["text", "audio"]],
    "prediction": [{"type": "content", "content": "x"}],
    "web_search_options": [{}],
    "chat_template": ["{{ 1 }}"],
    "continue_final_message": [True],
    "add_generation_prompt": [False],
}
COMPLETIONS = COMMON | {
    "prompt": [
        1,
        {},
        True,
        "",
        [],
        [""],
        [[]],
        [1, "a"],
        [[1, "a"]],
        [-1],
        [2048],
        [HUGE],
        [[2048]],
        [1.5],
        [True],
        ["a"] * 129,
    ],
    "logprobs": [*NOT_AN_INTEGER, -1, 21],
    "echo": NOT_A_BOOLEAN,
    "best_of": [*NOT_AN_INTEGER, 0, 2, HUGE],
    "suffix": [1, [], {}, True],
    "parse_special": NOT_A_BOOLEAN,
    "max_tokens": [*NOT_AN_INTEGER, 0, -1, HUGE, 2**31],
}
BASE = {
    "/v1/chat/completions": {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    "/v1/completions": {"model": "sim", "prompt": "hi", "max_tokens": 4},
}
TABLES = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETIONS}


def check_error(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.content) < 16 * 1024
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error
