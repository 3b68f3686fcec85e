"""Random changes somewhere in a good body never break the server."""

import asyncio
import copy
import json
import random
from typing import Any

from tests.server.request_bodies import BASE, CHAT, COMPLETIONS, check_error

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**40, 0.5, -0.0, 1e308, 5e-324),
    *("", "x", "hi" * 50, "\x00", "\u2028", "<｜User｜>", "</think>", "😀", "nan", "none", "max"),
    *([], [None], [1, "a"], [[[]]], {}, {"type": "text"}, {"a": {"b": [1]}}, [{"role": "user", "content": "x"}]),
]


def mutated(body: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """One to three random changes somewhere in a body."""
    body = copy.deepcopy(body)
    for _ in range(chance.randint(1, 3)):
        place: Any = body
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = chance.choice(keys) if keys else None
            if key is not None and isinstance(place[key], (dict, list)) and place[key] and chance.random() < 0.6:
                place = place[key]
                continue
            break
        kind = chance.randrange(4)
        if key is None or kind == 0:
            if isinstance(place, dict):
                place[chance.choice(["x", *CHAT, *COMPLETIONS])] = chance.choice(VALUES)
            else:
                place.append(chance.choice(VALUES))
        elif kind == 1:
            del place[key]
        elif kind == 2:
            place[key] = [place[key]]
        else:
            place[key] = chance.choice(VALUES)
    return body


def test_random_mutations_never_break_the_server(serving: Any) -> None:
    chance = random.Random(20261124)
    full = {
        "/v1/chat/completions": {
            **BASE["/v1/chat/completions"],
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "c", "reasoning_content": "d"},
                {"role": "user", "content": "e", "name": "n"},
            ],
            **{"temperature": 0.5, "top_p": 0.9, "stop": ["q"], "logit_bias": {"5": 1.0}, "seed": 1, "logprobs": True},
            **{"top_logprobs": 2, "thinking": {"type": "enabled"}, "reasoning_effort": "high"},
            **{"stop_token_ids": [7], "chat_template_kwargs": {"thinking": True}, "metadata": {"a": "b"}},
        },
        "/v1/completions": {
            **BASE["/v1/completions"],
            **{"prompt": [[5, 6], "x"], "logprobs": 1, "stop": "q", "logit_bias": {"5": 1.0}, "seed": 1, "top_k": 5},
        },
        "/tokenize": {"model": "sim", "messages": [{"role": "user", "content": "x"}]},
        "/detokenize": {"model": "sim", "tokens": [5, 6, 7]},
    }

    async def main() -> None:
        async with serving(answer="ab</think>cd") as server:
            seen = set()
            for n in range(1200):
                path = chance.choice(list(full))
                body = mutated(full[path], chance)
                if n % 10 == 0:
                    raw = bytearray(json.dumps(body).encode())
                    for _ in range(3):
                        raw[chance.randrange(len(raw))] = chance.randrange(256)
                    answer = await server.post_raw(path, bytes(raw))
                else:
                    answer = await server.post(path, body)
                seen.add(answer.status_code)
                assert answer.status_code in (200, 400, 404), (path, body, answer.text)
                if answer.status_code != 200:
                    check_error(answer, answer.status_code)
                elif answer.headers["content-type"].startswith("text/event-stream"):
                    assert '"error"' not in answer.text, (path, body)
            assert seen == {200, 400, 404}
            assert (await server.chat()).status_code == 200
            await server.idle()

    asyncio.run(main())
