"""`fathom chat` against the real server, typed through a pipe."""

import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def chat(typed: str, *flags: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "server", "chat", *flags]
    return subprocess.run(command, cwd=ROOT, input=typed, capture_output=True, text=True, check=False, timeout=60)


def test_two_turns(server: Any) -> None:
    done = chat("Hello\n/think off\nAgain\n", "--url", server.url, "--max-tokens", "4", "--no-thinking")
    assert done.returncode == 0, done.stderr
    assert "[thinking is off]" in done.stdout
    assert "[the answer reached its length limit]" in done.stdout


def test_an_unknown_model_is_a_sentence(server: Any) -> None:
    done = chat("Hello\n", "--url", server.url, "--model", "other")
    assert done.returncode == 1
    assert "HTTP 404" in done.stderr
    assert "Traceback" not in done.stderr
