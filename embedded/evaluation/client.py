"""A server as the evaluation sees it: requests over HTTP, answers as values, numbers from /metrics. Standard library
only.
"""

import http.client
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")
R = TypeVar("R")

_ANSWER_SECONDS = 3600.0
"""A prompt of 128K tokens on two cores takes minutes before its first byte."""
_CONNECT_SECONDS = 10.0


class ClientError(Exception):
    """What went wrong between here and the server, as one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One choice of an answer."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    """Name and arguments, as they came, of each tool call."""
    token_ids: tuple[int, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()
    cached_tokens: int = 0
    finish_reason: str = ""
    logprobs: Mapping[str, Any] | None = None


class Client:
    """Requests to one server, from any number of threads. Every method raises ClientError."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """`api_key` None: that of FATHOM_API_KEY, if any."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError as error:
            raise ClientError(f"{url}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClientError(f"{url} is not an address of a server; one looks like http://127.0.0.1:8000")
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, port
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self._base}"
        self._headers = {"Content-Type": "application/json"}
        key = api_key or os.environ.get("FATHOM_API_KEY")
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._model: str | None = None

    @property
    def model(self) -> str:
        """Name of the first model that is served."""
        if self._model is None:
            self._model = str(_object(self._send("GET", "/v1/models"))["data"][0]["id"])
        return self._model

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a body, which gets the served model's name."""
        return _object(self._send("POST", path, {"model": self.model, **body}))

    def chat(self, body: Mapping[str, Any]) -> Reply:
        """The only choice of a chat completion, greedy unless the body says otherwise."""
        (reply,) = self.choices(body)
        return reply

    def choices(self, body: Mapping[str, Any]) -> tuple[Reply, ...]:
        """All choices of a chat completion."""
        answer = self.post("/v1/chat/completions", {"temperature": 0, "return_token_ids": True, **body})
        return tuple(_reply(answer, choice) for choice in answer["choices"])

    def streamed(self, body: Mapping[str, Any]) -> Reply:
        """The same as `chat`, put together from a stream."""
        raw = self._send(
            "POST",
            "/v1/chat/completions",
            {"model": self.model, "temperature": 0, "return_token_ids": True, **body, "stream": True},
        )
        text: dict[str, str] = {"content": "", "reasoning_content": ""}
        calls: list[tuple[str, str]] = []
        ids: list[int] = []
        finish_reason = ""
        for line in raw.decode("utf-8").splitlines():
            data = line.removeprefix("data:").strip()
            if not line.startswith("data:") or data == "[DONE]":
                continue
            chunk = _object(data)
            if "error" in chunk:
                raise ClientError(f"the stream ended with an error: {chunk['error']}")
            for choice in chunk["choices"]:
                delta = choice["delta"]
                for name in text:
                    text[name] += delta.get(name) or ""
                for call in delta.get("tool_calls") or ():
                    function = call["function"]
                    if call["index"] == len(calls):
                        calls.append((function["name"], ""))
                    name, arguments = calls[call["index"]]
                    calls[call["index"]] = (name, arguments + (function.get("arguments") or ""))
                ids += choice.get("token_ids") or ()
                finish_reason = choice["finish_reason"] or finish_reason
        return Reply(
            content=text["content"],
            reasoning=text["reasoning_content"],
            calls=tuple(calls),
            token_ids=tuple(ids),
            finish_reason=finish_reason,
        )

    def prompt_ids(self, body: Mapping[str, Any]) -> tuple[int, ...]:
        """Token ids of the prompt that a chat body makes."""
        return tuple(self.post("/v1/chat/completions/render", body)["token_ids"])

    def complete(self, prompt: Iterable[int], max_tokens: int, **fields: Any) -> Reply:
        """The greedy continuation of token ids; `content` holds its text, special tokens included."""
        answer = self.post(
            "/v1/completions",
            {
                "prompt": list(prompt),
                "max_tokens": max_tokens,
                "temperature": 0,
                "return_token_ids": True,
                "skip_special_tokens": False,
                **fields,
            },
        )
        (choice,) = answer["choices"]
        return Reply(
            content=choice["text"],
            token_ids=tuple(choice["token_ids"]),
            cached_tokens=_cached_tokens(answer),
            finish_reason=str(choice["finish_reason"]),
            logprobs=choice["logprobs"],
        )

    def margin(self, prompt: Iterable[int]) -> float:
        """How far apart the log probabilities of the two likeliest next tokens are, nats."""
        logprobs = self.complete(prompt, 1, logprobs=2, return_tokens_as_token_ids=True).logprobs
        assert logprobs is not None
        first, second = sorted(logprobs["top_logprobs"][0].values(), reverse=True)[:2]
        return float(first - second)

    def metric(self, name: str) -> float:
        """A number of /metrics without labels of its own; counters are named as there, with `_total`."""
        page = self._send("GET", "/metrics").decode("utf-8")
        found = re.search(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)
        if found is None:
            raise ClientError(f"/metrics of {self.url} has no {name}")
        return float(found[1])

    @property
    def cache_dtype(self) -> str:
        """How the server stores KV rows."""
        found = re.search(r'cache_config_info{[^}]*cache_dtype="([^"]+)"', self._send("GET", "/metrics").decode())
        if found is None:
            raise ClientError(f"/metrics of {self.url} does not tell how rows are stored")
        return found[1]

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=_CONNECT_SECONDS)
        try:
            connection.connect()
            connection.sock.settimeout(_ANSWER_SECONDS)
            encoded = None if body is None else json.dumps(body).encode()
            connection.request(method, self._base + path, encoded, self._headers)
            answer = connection.getresponse()
            raw = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise ClientError(f"no answer from {self.url}: {error or type(error).__name__}") from error
        finally:
            connection.close()
        if answer.status != http.client.OK:
            raise ClientError(f"{method} {path}: HTTP {answer.status}: {raw.decode('utf-8', 'replace')[:500]}")
        return raw


def at_once(
    function: Callable[[T], R], items: Iterable[T], num_threads: int, *, seconds_between: float = 0.0
) -> list[R]:
    """`function` of every item, in order, up to `num_threads` of them at a time; started `seconds_between` apart."""
    with ThreadPoolExecutor(num_threads) as pool:
        futures = []
        for item in items:
            futures.append(pool.submit(function, item))
            if seconds_between:
                time.sleep(seconds_between)
        return [future.result() for future in futures]


def _reply(answer: Mapping[str, Any], choice: Mapping[str, Any]) -> Reply:
    message = choice["message"]
    calls = ((call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ())
    return Reply(
        content=message["content"] or "",
        reasoning=message.get("reasoning_content") or "",
        calls=tuple(calls),
        token_ids=tuple(choice.get("token_ids") or ()),
        prompt_token_ids=tuple(answer.get("prompt_token_ids") or ()),
        cached_tokens=_cached_tokens(answer),
        finish_reason=str(choice["finish_reason"]),
        logprobs=choice.get("logprobs"),
    )


def _cached_tokens(answer: Mapping[str, Any]) -> int:
    details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


def _object(raw: bytes | str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ClientError("the server answered with something that is not its protocol")
    return value
