"""Coding agents run headless against the server: one turn in words, and one loop through a tool of theirs."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from scripted_server import GREETING, MODEL, REPORT

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]

COMMAND = "echo fathom-$((40 + 2))"
PRINTED = "fathom-42"

Run = Callable[..., str]


@dataclass(frozen=True)
class Agent:
    name: str
    call: str
    """What the user says so that the scripted model calls the agent's shell tool."""
    run: Callable[[Run, Path, str, Path, str], str]
    """(run, bin, url, config directory, prompt) to everything that the agent printed."""


def _codex(run: Run, binaries: Path, url: str, config: Path, prompt: str) -> str:
    provider = (
        f'model_providers.fathom={{name="fathom",base_url="{url}/v1",wire_api="responses",env_key="FATHOM_TOKEN"}}'
    )
    options = ("--skip-git-repo-check", "--sandbox", "danger-full-access", "--json", "--model", MODEL)
    overrides = ("-c", "model_provider=fathom", "-c", provider)
    environment = {"CODEX_HOME": str(config), "FATHOM_TOKEN": "none"}
    return run(binaries / "codex", "exec", *options, *overrides, prompt, environment=environment)


def _claude(run: Run, binaries: Path, url: str, config: Path, prompt: str) -> str:
    environment = {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": "none",
        "ANTHROPIC_MODEL": MODEL,
        "ANTHROPIC_SMALL_FAST_MODEL": MODEL,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CONFIG_DIR": str(config),
    }
    options = ("--output-format", "json", "--allowedTools", "Bash")
    return run(binaries / "claude", "--print", prompt, *options, environment=environment)


def _opencode(run: Run, binaries: Path, url: str, config: Path, prompt: str) -> str:
    model = {"name": "V4", "tool_call": True, "limit": {"context": 200_000, "output": 8192}}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "Fathom",
        "options": {"baseURL": f"{url}/v1", "apiKey": "none"},
        "models": {MODEL: model},
    }
    path = config / "opencode.json"
    path.write_text(json.dumps({"provider": {"fathom": provider}, "model": f"fathom/{MODEL}"}))
    return run(binaries / "opencode", "run", "--format", "json", prompt, environment={"OPENCODE_CONFIG": str(path)})


def _continue(run: Run, binaries: Path, url: str, config: Path, prompt: str) -> str:
    path = config / "config.yaml"
    path.write_text(
        f"name: fathom\nversion: 0.0.1\nschema: v1\nmodels:\n  - name: v4\n    provider: openai\n    model: {MODEL}\n"
        f"    apiBase: {url}/v1\n    apiKey: none\n    roles: [chat]\n    capabilities: [tool_use]\n"
    )
    return run(binaries / "cn", "--print", "--auto", "--config", path, prompt)


def _cline(run: Run, binaries: Path, url: str, config: Path, prompt: str) -> str:
    data = ("--data-dir", str(config))
    account = ("--provider", "openai", "--apikey", "none", "--modelid", MODEL, "--baseurl", f"{url}/v1")
    run(binaries / "cline", "auth", *account, *data)
    return run(binaries / "cline", "--json", *data, prompt)


AGENTS = (
    Agent("codex", "exec_command", _codex),
    Agent("claude", "Bash", _claude),
    Agent("opencode", "bash", _opencode),
    Agent("continue", "Bash", _continue),
    Agent("cline", "run_commands", _cline),
)


@pytest.fixture(params=AGENTS, ids=lambda agent: agent.name)
def agent(request: pytest.FixtureRequest) -> Agent:
    found: Agent = request.param
    return found


def test_a_turn_in_words(agent: Agent, scripted_url: str, npm_bin: Path, tmp_path: Path, run_client: Run) -> None:
    assert GREETING in agent.run(run_client, npm_bin, scripted_url, tmp_path, "Say hello")


def test_a_loop_through_a_tool(agent: Agent, scripted_url: str, npm_bin: Path, tmp_path: Path, run_client: Run) -> None:
    key = "cmd" if agent.name == "codex" else "command"
    arguments = {"commands": [COMMAND]} if agent.name == "cline" else {key: COMMAND}
    if agent.name == "opencode":
        arguments["description"] = "adds"
    printed = agent.run(run_client, npm_bin, scripted_url, tmp_path, f"CALL {agent.call} {json.dumps(arguments)}")
    # The model quotes the tool's result, so it went out and came back.
    assert REPORT in printed
    assert PRINTED in printed.split(REPORT)[-1]
