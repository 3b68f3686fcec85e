"""Coding agents from npm, headless, against a scripted server: one turn with one tool call each."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("npm") is None or shutil.which("node") is None, reason="node or npm is missing"),
    pytest.mark.timeout(600),
]

CODEX = "@openai/codex@0.169.0"
CLAUDE_CODE = "@anthropic-ai/claude-code@2.1.330"
QUESTION = "What does hello.txt say?"
ANSWER = "The file says good morning."
DSML = "｜DSML｜"
PROVIDER = """
model = "scripted"
model_provider = "fathom"
[model_providers.fathom]
name = "fathom"
base_url = "{url}/v1"
wire_api = "responses"
env_key = "FATHOM_TEST_KEY"
"""


def install(directory: Path, package: str) -> Path:
    """The directory of the installed programs."""
    (directory / "package.json").write_text('{"name": "agent-test", "private": true}')
    command = ["npm", "install", "--no-audit", "--no-fund", package]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return directory / "node_modules" / ".bin"


def run(command: list[str], home: Path, **environment: str) -> str:
    """Run an agent in a directory with hello.txt; returns what it prints."""
    work = home / "work"
    work.mkdir()
    (work / "hello.txt").write_text("good morning\n")
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    done = subprocess.run(
        command,
        cwd=work,
        env={**kept, "HOME": str(home), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def reads_the_file(scripted: Any, tool: str, **arguments: str) -> None:
    """Script the answers: a call of `tool` first, then what the file says if the tool's result has it."""
    lines = [
        f'<{DSML}parameter name="{key}" string="true">{value}</{DSML}parameter>\n' for key, value in arguments.items()
    ]
    call = f'<{DSML}invoke name="{tool}">\n{"".join(lines)}</{DSML}invoke>'

    def say(prompt: str) -> str:
        thought = "I look.</think>" if prompt.endswith("<think>") else ""
        if "### Available Tool Schemas" not in prompt:
            return thought + "A title."
        result = prompt.rpartition("<tool_result>")[2] if "</tool_result>" in prompt else ""
        if "good morning" in result:
            return thought + ANSWER
        return f"{thought}Let me look.\n\n<{DSML}tool_calls>\n{call}\n</{DSML}tool_calls>"

    scripted.say = say


def turns(scripted: Any) -> tuple[list[int], list[int]]:
    """The prompt with the tool's result, and what it should begin with."""
    (last,) = [n for n, ids in enumerate(scripted.answers) if ANSWER in scripted.tokenizer.decode(ids)]
    first = max(n for n in range(last) if DSML in scripted.tokenizer.decode(scripted.answers[n]))
    return scripted.prompts[last], [*scripted.prompts[first], *scripted.answers[first], 1]


def test_codex(scripted: Any, tmp_path: Path) -> None:
    programs = install(tmp_path, CODEX)
    reads_the_file(scripted, "exec_command", cmd="cat hello.txt")
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text(PROVIDER.format(url=scripted.url))
    flags = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    printed = run(
        [str(programs / "codex"), "exec", *flags, QUESTION], home, CODEX_HOME=str(home), FATHOM_TEST_KEY="none"
    )
    assert ANSWER in printed
    prompt, expected = turns(scripted)
    assert prompt[: len(expected)] == expected, "the first turn came back as it was sampled"


def test_claude_code(scripted: Any, tmp_path: Path) -> None:
    programs = install(tmp_path, CLAUDE_CODE)
    reads_the_file(scripted, "Bash", command="cat hello.txt", description="Read it")
    home = tmp_path / "home"
    home.mkdir()
    printed = run(
        [str(programs / "claude"), "-p", QUESTION, "--allowedTools", "Bash"],
        home,
        ANTHROPIC_BASE_URL=scripted.url,
        ANTHROPIC_AUTH_TOKEN="none",
        ANTHROPIC_MODEL=scripted.MODEL,
        ANTHROPIC_SMALL_FAST_MODEL=scripted.MODEL,
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
    )
    assert ANSWER in printed
    prompt, expected = turns(scripted)
    assert prompt[: len(expected)] == expected, "the first turn came back as it was sampled"
