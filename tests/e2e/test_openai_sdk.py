"""The `openai` Python SDK, the client most people have, against the real server and the embedded model."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

NO_THINKING: dict[str, Any] = {"thinking": {"type": "disabled"}}
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
NUM_STREAMS = 200
READY_SECONDS = 10.0


@pytest.fixture
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def reasoning_of(part: Any) -> str:
    return getattr(part, "reasoning_content", None) or ""


def test_models(client: openai.OpenAI, server: Any) -> None:
    (model,) = client.models.list().data
    assert model.id == server.model
    assert client.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize("thinking", [True, False])
def test_a_streamed_answer_equals_the_whole_one(client: openai.OpenAI, server: Any, thinking: bool) -> None:
    request: dict[str, Any] = {
        "model": server.model,
        "messages": HELLO,
        "max_tokens": 10,
        "temperature": 0,
        "extra_body": {"thinking": {"type": "enabled" if thinking else "disabled"}, "ignore_eos": True},
    }
    whole = client.chat.completions.create(**request)
    stream = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    message = whole.choices[0].message
    assert message.role == "assistant"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 10
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 10
    assert whole.choices[0].finish_reason == "length"
    deltas = [chunk.choices[0] for chunk in stream[:-1]]
    assert deltas[0].delta.role == "assistant"
    assert "".join(d.delta.content or "" for d in deltas) == (message.content or "")
    assert "".join(reasoning_of(d.delta) for d in deltas) == reasoning_of(message)
    assert [d.finish_reason for d in deltas if d.finish_reason] == ["length"]
    assert deltas[-1].finish_reason == "length"
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in stream}) == 1
    assert [chunk.usage is None for chunk in stream] == [True] * len(deltas) + [False]
    assert stream[-1].choices == []
    again = stream[-1].usage
    assert again is not None
    assert (again.prompt_tokens, again.completion_tokens, again.total_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
        whole.usage.total_tokens,
    )
    assert again.completion_tokens_details == whole.usage.completion_tokens_details
    # The same prompt once more: what opens the turn was kept.
    assert again.prompt_tokens_details is not None
    assert again.prompt_tokens - 2 <= (again.prompt_tokens_details.cached_tokens or 0) < again.prompt_tokens
    if thinking:
        assert reasoning_of(message)
        details = whole.usage.completion_tokens_details
        assert details is not None
        assert details.reasoning_tokens


def test_no_usage_unless_asked(client: openai.OpenAI, server: Any) -> None:
    stream = client.chat.completions.create(
        model=server.model, messages=HELLO, max_tokens=4, stream=True, extra_body=NO_THINKING
    )
    chunks = list(stream)
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)


def test_completions(client: openai.OpenAI, server: Any) -> None:
    request: dict[str, Any] = {
        "model": server.model,
        "prompt": "Once upon a time",
        "max_tokens": 6,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.completions.create(**request)
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**request, stream=True))
    assert streamed == whole.choices[0].text
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len("Once upon a time"), 6)
    ids = client.completions.create(**{**request, "prompt": [5, 6, 7], "logprobs": 2})
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 3
    logprobs = ids.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None and logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs)
    assert all(p is not None and p <= 0 for p in logprobs.token_logprobs)


def test_chat_logprobs(client: openai.OpenAI, server: Any) -> None:
    answer = client.chat.completions.create(
        model=server.model,
        messages=HELLO,
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        extra_body=NO_THINKING,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content
    for token in logprobs.content:
        assert token.bytes is not None
        assert bytes(token.bytes).decode("utf-8", "replace") == token.token
        assert len(token.top_logprobs) == 3
        # Greedy: the sampled token is the likeliest one.
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)


def test_a_stop_string(client: openai.OpenAI, server: Any) -> None:
    request: dict[str, Any] = {
        "model": server.model,
        "prompt": "abc",
        "max_tokens": 20,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    text = client.completions.create(**request).choices[0].text
    assert len(text) >= 4
    stop = text[len(text) // 2 :][:2]
    cut = client.completions.create(**request, stop=[stop])
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == text[: text.index(stop)]


def test_seeds_repeat(client: openai.OpenAI, server: Any) -> None:
    request: dict[str, Any] = {"model": server.model, "messages": HELLO, "max_tokens": 8, "extra_body": NO_THINKING}
    texts = [client.chat.completions.create(**request, seed=n).choices[0].message.content for n in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("changes", "error", "code", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found", "model"),
        ({"messages": "hi"}, openai.BadRequestError, None, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, openai.BadRequestError, None, "messages[0].content"),
        ({"temperature": "hot"}, openai.BadRequestError, None, "temperature"),
        ({"temperature": 9}, openai.BadRequestError, None, "temperature"),
        ({"max_tokens": 0}, openai.BadRequestError, None, "max_tokens"),
        (
            {"messages": [{"role": "user", "content": "x" * 9000}]},
            openai.BadRequestError,
            "context_length_exceeded",
            None,
        ),
    ],
)
def test_errors_become_the_sdk_s_own(
    client: openai.OpenAI,
    server: Any,
    changes: dict[str, Any],
    error: type[openai.APIStatusError],
    code: str,
    param: str,
) -> None:
    for stream in (False, True):
        with pytest.raises(error) as caught:
            client.chat.completions.create(**{"model": server.model, "messages": HELLO, "stream": stream, **changes})
        assert isinstance(caught.value.body, dict)
        if code is not None:
            assert caught.value.code == code
        if param is not None:
            assert caught.value.param == param
        assert len(caught.value.message) < 1000
    if code == "context_length_exceeded":
        assert "maximum context length is 4096 tokens" in caught.value.message


def test_a_dropped_connection_frees_its_pages(client: openai.OpenAI, server: Any) -> None:
    server.wait_for(server.is_empty, "an idle server")
    request: dict[str, Any] = {
        "model": server.model,
        "messages": HELLO,
        "max_tokens": 3000,
        "extra_body": {**NO_THINKING, "ignore_eos": True},
    }
    with client.chat.completions.create(**request, stream=True) as stream:
        for _ in zip(range(4), stream, strict=False):
            pass
        assert server.metric("fathom_pages_free") < server.metric("fathom_pages_total")
    server.wait_for(server.is_empty, "the pages of the dropped stream")
    # A whole answer that nobody waits for any more.
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(**request)
    server.wait_for(server.is_empty, "the pages of the dropped answer")


def test_200_streams_at_once(server: Any) -> None:
    server.wait_for(server.is_empty, "an idle server")

    async def one(client: openai.AsyncOpenAI, n: int) -> tuple[str, int]:
        stream = await client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": f"Hello {n}"}],
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={**NO_THINKING, "ignore_eos": True},
        )
        finish, tokens = "", 0
        async for chunk in stream:
            for choice in chunk.choices:
                finish = choice.finish_reason or finish
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
        return finish, tokens

    async def main() -> list[tuple[str, int]]:
        limits = httpx.Limits(max_connections=NUM_STREAMS)
        async with (
            httpx.AsyncClient(limits=limits, timeout=120) as http,
            openai.AsyncOpenAI(
                base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120, http_client=http
            ) as client,
        ):
            return await asyncio.gather(*[one(client, n) for n in range(NUM_STREAMS)])

    assert asyncio.run(main()) == [("length", 4)] * NUM_STREAMS
    server.wait_for(server.is_empty, "all pages and slots")


def test_a_key_and_a_drain(launcher: Callable[..., Any]) -> None:
    with launcher("--drain-timeout", "120", environment={"FATHOM_API_KEY": "a-long-secret"}) as live:
        url = f"{live.url}/v1"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="a-wrong-secret", max_retries=0).models.list()
        client = openai.OpenAI(base_url=url, api_key="a-long-secret", max_retries=0, timeout=60)
        model = client.models.list().data[0].id
        request: dict[str, Any] = {"model": model, "messages": HELLO, "extra_body": {**NO_THINKING, "ignore_eos": True}}
        children = live.descendants()
        assert children
        start = time.monotonic()
        client.chat.completions.create(**request, max_tokens=20)
        seconds_per_token = (time.monotonic() - start) / 20
        # Long enough to outlive the requests below, whatever the machine.
        num_tokens = min(max(int(3 / seconds_per_token), 10), 3000)
        stream = client.chat.completions.create(**request, max_tokens=num_tokens, stream=True)
        chunks = [next(stream), next(stream)]
        live.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        with pytest.raises(openai.InternalServerError) as refused:
            client.chat.completions.create(**request, max_tokens=1)
        assert refused.value.status_code == 503
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert httpx.get(f"{live.url}/health/ready").status_code == 503
        assert httpx.get(f"{live.url}/health/live").status_code == 200
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert live.process.wait(30) == 0
        assert not [pid for pid in children if os.path.exists(f"/proc/{pid}")]


def test_start_to_ready(launcher: Callable[..., Any], server: Any) -> None:
    """Warm starts: the model directory is there. The best of three, since other tests may hold the cores."""
    seconds = []
    for _ in range(3):
        with launcher() as live:
            seconds.append(live.ready_seconds)
        if seconds[-1] < READY_SECONDS:
            break
    print(f"ready after {server.ready_seconds:.1f} s with an empty cache, {min(seconds):.1f} s after that")
    assert min(seconds) < READY_SECONDS


def test_threads_may_share_a_client(client: openai.OpenAI, server: Any) -> None:
    def ask(n: int) -> int:
        answer = client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": "x" * n}],
            max_tokens=3,
            extra_body={**NO_THINKING, "ignore_eos": True},
        )
        assert answer.usage is not None
        return answer.usage.prompt_tokens - n

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(1, 13)))) == 1
