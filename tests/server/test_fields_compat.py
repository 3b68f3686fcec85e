"""The switches: which effort texts, and api.deepseek.com's habits."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from engine.messages import AddRequest, SamplingParams
from model.presets import preset
from server.chat_request import ChatRequest, Tool, ToolChoice
from server.compat import as_deepseek, in_dialect
from server.config import ServerConfig
from server.errors import ApiError, bad_request, overloaded
from server.protocol.common import SamplingFields
from server.text.effort import table_of


@pytest.mark.parametrize(
    ("model_dir", "is_preview", "table"),
    [
        ("/models/DeepSeek-V4-Flash", True, "preview"),
        ("/models/DeepSeek-V4-Flash", False, "release"),
        ("/models/DeepSeek-V4-Flash-0731", True, "release"),
        ("/models/deepseek-v4-pro-0813-fp8", False, "release"),
        ("/models/DeepSeek-V4-Flash-DSpark", False, "preview"),
        ("/models/DeepSeek-V4-Flash-0731-DSpark", False, "release"),
        ("/hub/models--deepseek-ai--DeepSeek-V4-Flash-DSpark/snapshots/0123abcd", False, "preview"),
        ("/hub/models--deepseek-ai--DeepSeek-V4-Pro-0813/snapshots/0123abcd", True, "release"),
        ("/data/0731/archive/of/models/tiny", False, "release"),
        ("", False, "release"),
    ],
)
def test_the_effort_table_follows_the_checkpoint(model_dir: str, is_preview: bool, table: str) -> None:
    assert table_of(model_dir, is_preview=is_preview) == table


def test_a_preview_is_flash_or_pro_with_its_mtp_layer() -> None:
    assert preset("flash").is_preview and preset("pro").is_preview
    assert not replace(preset("flash"), draft_kind="dspark").is_preview
    assert not replace(preset("pro"), draft_kind="none").is_preview
    assert not any(preset(name).is_preview for name in ("nano", "mini", "flash-slice-4"))


@pytest.mark.parametrize(
    ("table", "tiers"),
    [("auto", (0, 476, 526)), ("release", (0, 476, 526)), ("preview", (0, 0, 476))],
)
def test_effort_texts(serving: Any, table: Any, tiers: tuple[int, ...]) -> None:
    """In characters (chat-protocol 1.3); text B holds one em dash, three bytes and so three tokens here."""

    async def main() -> None:
        async with serving(answer="x", config=ServerConfig(effort_table=table)) as server:
            off = (await server.chat(thinking={"type": "disabled"})).json()["usage"]["prompt_tokens"]
            found = []
            for effort in ("low", "high", "max"):
                usage = (await server.chat(reasoning_effort=effort)).json()["usage"]
                found.append(usage["prompt_tokens"] - off)
            assert found == [n + 2 * (n == 526) for n in tiers]

    asyncio.run(main())


def chat(*, thinking: bool, tools: bool = False, mode: Any = "auto", **fields: Any) -> ChatRequest:
    return ChatRequest(
        messages=[{"role": "user", "content": "hi"}],
        thinking=thinking,
        tools=(Tool(name="f", description="", parameters={}),) if tools else (),
        tool_choice=ToolChoice(mode=mode),
        fields=SamplingFields(model="m", **fields),
    )


SENT = {"temperature": 0.3, "top_p": 0.5, "presence_penalty": 1.0, "frequency_penalty": 1.0, "seed": 3}


@pytest.mark.parametrize(
    ("request_", "temperature", "top_p"),
    [
        (chat(thinking=True, **SENT), 1.0, 1.0),
        (chat(thinking=True, tools=True, **SENT), 1.0, 0.95),
        (chat(thinking=True, tools=True, mode="none", **SENT), 1.0, 1.0),
        (chat(thinking=False, tools=True, **SENT), 0.3, 0.5),
    ],
)
def test_forced_sampling(request_: ChatRequest, temperature: float, top_p: float) -> None:
    fields = as_deepseek(request_).fields
    assert (fields.temperature, fields.top_p) == (temperature, top_p)
    assert (fields.presence_penalty, fields.frequency_penalty, fields.seed) == (0, 0, 3)
    assert request_.fields.temperature == 0.3, "the request itself is left as it is"


@pytest.mark.parametrize("compat", ["openai", "deepseek"])
def test_the_engine_hears_what_the_dialect_says(serving: Any, compat: Any) -> None:
    async def main() -> None:
        async with serving(answer="x", config=ServerConfig(api_compat=compat)) as server:
            heard: list[SamplingParams] = []
            submit = server.engine.submit

            def listening(request: AddRequest) -> Any:
                heard.append(request.sampling)
                return submit(request)

            server.engine.submit = listening
            assert (await server.chat(temperature=0.25)).status_code == 200
            assert (await server.chat(temperature=0.25, thinking={"type": "disabled"})).status_code == 200
            assert [s.temperature for s in heard] == [1.0 if compat == "deepseek" else 0.25, 0.25]

    asyncio.run(main())


def test_errors_in_deepseek_s_words(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x", config=ServerConfig(api_compat="deepseek"), keys=["sesame-open"]) as server:
            key = {"authorization": "Bearer sesame-open"}
            for fields, words in (
                ({"temperature": 3}, "Invalid temperature value, the valid range of temperature is [0, 2]"),
                ({"top_p": 0}, "Invalid top_p value, the valid range of top_p is (0, 1.0]"),
                ({"n": 2}, "Invalid n value (currently only n = 1 is supported)"),
                ({"stream_options": {}}, "stream_options should be set along with stream = true"),
            ):
                body = {"model": "sim", "messages": [{"role": "user", "content": "x"}], **fields}
                answer = await server.post("/v1/chat/completions", body, headers=key)
                assert answer.status_code == 400
                bad = "invalid_request_error"
                assert answer.json()["error"] == {"message": words, "type": bad, "param": None, "code": bad}
            answer = await server.post("/v1/chat/completions", {})
            assert (answer.status_code, answer.json()["error"]["param"]) == (401, None)

    asyncio.run(main())


def test_only_bad_requests_lose_their_code() -> None:
    busy = in_dialect(overloaded("busy", 7), "deepseek")
    assert (busy.status, busy.code, busy.headers["Retry-After"]) == (503, "server_overloaded", "7")
    error = bad_request("x", param="stop", code="context_length_exceeded")
    assert in_dialect(error, "openai") is error
    assert isinstance(in_dialect(error, "deepseek"), ApiError)
    assert (in_dialect(error, "deepseek").code, in_dialect(error, "deepseek").param) == ("invalid_request_error", None)
