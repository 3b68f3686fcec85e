"""Libraries that agents are built with: tool loops free and forced, thinking or not, streamed and whole; schemas."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted_server import REPORT, SCHEMA_ANSWER

pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]

PACKAGES = {
    "litellm": ("litellm==1.106.2", "mcp"),
    "langchain": ("langchain-openai==1.7.3", "langchain-deepseek==1.1.1"),
    "pydanticai": ("pydantic-ai-slim[openai]==2.38.0",),
    "agents": ("openai-agents==0.24.0",),
}


@pytest.mark.parametrize("library", PACKAGES)
def test_loops(
    library: str, scripted_url: str, client_python: Callable[..., Path], run_client: Callable[..., str]
) -> None:
    python = client_python(library, *PACKAGES[library])
    # One library would ask the internet for prices first.
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    script = Path(__file__).with_name("loops.py")
    printed = run_client(python, script, library, scripted_url, environment=environment, seconds=600)
    results: dict[str, dict[str, Any]] = json.loads(printed.splitlines()[-1])
    assert results
    for name, result in results.items():
        if "parsed" in result:
            assert result["parsed"] == json.loads(SCHEMA_ANSWER), name
            continue
        expected = [["add", {"a": 40, "b": 2}], ["add", {"a": 1, "b": 1}]]
        assert result["calls"] == (expected if "parallel" in name else expected[:1]), name
        # The model quotes the last result: it went out as a call and came back.
        assert result["text"] == f"{REPORT} {'2' if 'parallel' in name else '42'}", name
