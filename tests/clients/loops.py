"""Runs inside a client's own environment: a tool loop through one library, printed as JSON.

    python loops.py LIBRARY BASE_URL

Prints {"case": {"calls": [[name, arguments], ...], "text": ..., "parsed": ...}, ...}: what the library made of the
answers. A case that fails prints its error and the exit status says so.
"""

import asyncio
import json
import sys
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

MODEL = "deepseek-v4-flash"
ASK = 'CALL add {"a": 40, "b": 2}'
WEATHER = 'How is the weather? CALL Weather {"city": "Paris", "degrees": 21}'
PARALLEL = 'CALL add {"a": 40, "b": 2}\nCALL add {"a": 1, "b": 1}'
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two integers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
NAMED = {"type": "function", "function": {"name": "add"}}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "degrees": {"type": "integer"}},
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
OFF = {"thinking": {"type": "disabled"}}

Cases = dict[str, Callable[[], Any]]

_loop = asyncio.new_event_loop()


def finish(work: Coroutine[Any, Any, Any]) -> Any:
    """Run to its end; always on the same loop, which the libraries' connections belong to."""
    return _loop.run_until_complete(work)


def litellm_cases(url: str) -> Cases:
    import litellm

    def options(provider: str, **extra: Any) -> dict[str, Any]:
        base = url if provider == "anthropic" else f"{url}/v1"
        return {"model": f"{provider}/{MODEL}", "api_base": base, "api_key": "none", **extra}

    def loop(provider: str, *, choice: Any = "auto", stream: bool = False, ask: str = ASK, **extra: Any) -> Any:
        messages: list[Any] = [{"role": "user", "content": ask}]
        more = {"tools": [ADD], **options(provider, **extra)}
        answer = litellm.completion(messages=messages, tool_choice=choice, stream=stream, **more)
        if stream:
            answer = litellm.stream_chunk_builder(list(answer), messages=messages)
        message = answer.choices[0].message
        calls = [[c.function.name, json.loads(c.function.arguments)] for c in message.tool_calls]
        messages.append(message.model_dump(exclude_none=True))
        for call, (_, arguments) in zip(message.tool_calls, calls, strict=True):
            result = str(arguments["a"] + arguments["b"])
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        final = litellm.completion(messages=messages, **more)
        return {"calls": calls, "text": final.choices[0].message.content}

    cases: Cases = {}
    for provider in ("openai", "hosted_vllm", "deepseek", "anthropic"):
        for stream in (False, True):
            name = f"{provider}-{'stream' if stream else 'whole'}"
            cases[name] = lambda p=provider, s=stream: loop(p, stream=s)
    cases["forced"] = lambda: loop("openai", choice="required")
    cases["named-plain"] = lambda: loop("openai", choice=NAMED, extra_body=OFF)
    cases["parallel"] = lambda: loop("openai", ask=PARALLEL)
    return cases


def langchain_cases(url: str) -> Cases:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_deepseek import ChatDeepSeek
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel

    @tool
    def add(a: int, b: int) -> int:
        """Adds two integers."""
        return a + b

    class Weather(BaseModel):
        """The weather somewhere."""

        city: str
        degrees: int

    def openai(**extra: Any) -> Any:
        return ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key="none", max_retries=0, **extra)

    def deepseek(**extra: Any) -> Any:
        return ChatDeepSeek(model=MODEL, api_base=f"{url}/v1", api_key="none", max_retries=0, **extra)

    def loop(model: Any, *, choice: Any = None, stream: bool = False, ask: str = ASK) -> Any:
        bound = model.bind_tools([add], **({"tool_choice": choice} if choice else {}))
        messages: list[Any] = [HumanMessage(ask)]
        if stream:
            answer = None
            for chunk in bound.stream(messages):
                answer = chunk if answer is None else answer + chunk
        else:
            answer = bound.invoke(messages)
        messages.append(answer)
        calls = [[c["name"], c["args"]] for c in answer.tool_calls]
        messages += [ToolMessage(str(add.invoke(c["args"])), tool_call_id=c["id"]) for c in answer.tool_calls]
        final = model.bind_tools([add]).invoke(messages)
        return {"calls": calls, "text": final.text if isinstance(final.text, str) else final.text()}

    def structured(model: Any, **extra: Any) -> Any:
        found = model.with_structured_output(Weather, **extra).invoke(WEATHER)
        return {"parsed": found.model_dump()}

    return {
        "openai-whole": lambda: loop(openai()),
        "openai-stream": lambda: loop(openai(), stream=True),
        "openai-forced": lambda: loop(openai(), choice="required"),
        "openai-named-plain": lambda: loop(openai(extra_body=OFF), choice="add"),
        "openai-parallel": lambda: loop(openai(), ask=PARALLEL),
        "openai-responses": lambda: loop(openai(use_responses_api=True)),
        "openai-responses-stream": lambda: loop(openai(use_responses_api=True), stream=True),
        "deepseek-whole": lambda: loop(deepseek()),
        "deepseek-stream": lambda: loop(deepseek(), stream=True),
        "deepseek-forced": lambda: loop(deepseek(), choice="required"),
        "structured-schema": lambda: structured(openai(), method="json_schema"),
        "structured-schema-plain": lambda: structured(openai(extra_body=OFF), method="json_schema"),
        "structured-call": lambda: structured(openai(), method="function_calling"),
        "structured-deepseek": lambda: structured(deepseek(), method="function_calling"),
    }


def pydanticai_cases(url: str) -> Cases:
    from pydantic import BaseModel
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Weather(BaseModel):
        city: str
        degrees: int

    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    models = {
        "chat": OpenAIChatModel(MODEL, provider=provider),
        "responses": OpenAIResponsesModel(MODEL, provider=provider),
    }

    def agent(model: Any, calls: list[Any], **extra: Any) -> Any:
        made = Agent(model, **extra)

        @made.tool_plain
        def add(a: int, b: int) -> int:
            """Adds two integers."""
            calls.append(["add", {"a": a, "b": b}])
            return a + b

        return made

    def whole(model: Any) -> Any:
        calls: list[Any] = []
        return {"text": finish(agent(model, calls).run(ASK)).output, "calls": calls}

    def streamed(model: Any) -> Any:
        calls: list[Any] = []

        async def run() -> str:
            async with agent(model, calls).run_stream(ASK) as result:
                return "".join([piece async for piece in result.stream_text(delta=True)])

        return {"text": finish(run()), "calls": calls}

    def parsed(model: Any) -> Any:
        found = finish(Agent(model, output_type=NativeOutput(Weather)).run("How is the weather in Paris?"))
        return {"parsed": found.output.model_dump()}

    cases: Cases = {}
    for name, model in models.items():
        cases[f"{name}-whole"] = lambda m=model: whole(m)
        cases[f"{name}-stream"] = lambda m=model: streamed(m)
    cases["chat-native-output"] = lambda: parsed(models["chat"])
    cases["responses-native-output"] = lambda: parsed(models["responses"])
    return cases


def agents_cases(url: str) -> Cases:
    from agents import (
        Agent,
        ModelSettings,
        OpenAIChatCompletionsModel,
        OpenAIResponsesModel,
        Runner,
        function_tool,
        set_tracing_disabled,
    )
    from openai import AsyncOpenAI
    from pydantic import BaseModel

    set_tracing_disabled(True)

    class Weather(BaseModel):
        city: str
        degrees: int

    def model(kind: Any) -> Any:
        return kind(MODEL, AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))

    def loop(kind: Any, *, stream: bool = False, **settings: Any) -> Any:
        calls: list[Any] = []

        @function_tool
        def add(a: int, b: int) -> int:
            """Adds two integers."""
            calls.append(["add", {"a": a, "b": b}])
            return a + b

        agent = Agent(name="t", model=model(kind), tools=[add], model_settings=ModelSettings(**settings))

        async def run() -> str:
            if not stream:
                return (await Runner.run(agent, ASK)).final_output
            result = Runner.run_streamed(agent, ASK)
            async for _ in result.stream_events():
                pass
            return result.final_output

        return {"text": finish(run()), "calls": calls}

    def parsed(kind: Any) -> Any:
        agent = Agent(name="t", model=model(kind), output_type=Weather)
        return {"parsed": finish(Runner.run(agent, "How is the weather in Paris?")).final_output.model_dump()}

    chat, responses = OpenAIChatCompletionsModel, OpenAIResponsesModel
    return {
        "chat-whole": lambda: loop(chat),
        "chat-stream": lambda: loop(chat, stream=True),
        "chat-forced": lambda: loop(chat, tool_choice="required"),
        "responses-whole": lambda: loop(responses),
        "responses-stream": lambda: loop(responses, stream=True),
        "responses-forced": lambda: loop(responses, tool_choice="required"),
        "chat-parsed": lambda: parsed(chat),
        "responses-parsed": lambda: parsed(responses),
    }


LIBRARIES = {
    "litellm": litellm_cases,
    "langchain": langchain_cases,
    "pydanticai": pydanticai_cases,
    "agents": agents_cases,
}


def main() -> int:
    library, url = sys.argv[1:]
    results: dict[str, Any] = {}
    failed = 0
    for name, case in LIBRARIES[library](url).items():
        try:
            results[name] = case()
        except Exception:
            failed += 1
            print(f"{name}:\n{traceback.format_exc(limit=-3)}", file=sys.stderr)
    print(json.dumps(results))
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
