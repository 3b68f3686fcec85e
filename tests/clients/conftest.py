"""Clients that speak to a running server: installed once into `.clients/`, a Python environment for each.

They pin one another's libraries, so no two share an environment, and none is part of the test environment.
"""

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / ".clients"
NPM_PACKAGES = (
    "@openai/codex@0.169.0",
    "@anthropic-ai/claude-code@2.1.197",
    "opencode-ai@1.18.33",
    "@continuedev/cli@1.5.47",
    "cline@3.0.65",
)
INSTALL_SECONDS = 900


@pytest.fixture(scope="session")
def scripted_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose answers follow from the prompt (scripted_server.py)."""
    log = tmp_path_factory.mktemp("scripted") / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("scripted_server.py"))],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert url, log.read_text()[-2000:]
    yield url
    process.terminate()
    process.wait(20)
    process.stdout.close()
    assert " failed: " not in log.read_text()


@pytest.fixture(scope="session")
def client_python() -> Callable[..., Path]:
    """`client_python("name", "package==1", ...)`: the interpreter of an environment that has these packages."""

    def make(name: str, *packages: str) -> Path:
        home = CLIENTS / name
        python = home / "bin" / "python"
        if not (home / ".ready").exists():
            venv.create(home, with_pip=True, clear=True)
            subprocess.run(
                [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages],
                check=True,
                timeout=INSTALL_SECONDS,
            )
            (home / ".ready").touch()
        return python

    return make


@pytest.fixture(scope="session")
def npm_bin() -> Path:
    """The directory of the coding agents' commands."""
    if shutil.which("npm") is None:
        pytest.skip("npm is missing")
    home = CLIENTS / "npm"
    if not (home / ".ready").exists():
        home.mkdir(parents=True, exist_ok=True)
        (home / "package.json").write_text('{"private": true}')
        # Their install steps fetch nothing but their own platform packages, and two of them need these.
        options = ("--no-audit", "--no-fund", "--allow-scripts=opencode-ai,@anthropic-ai/claude-code,cline")
        subprocess.run(["npm", "install", *options, *NPM_PACKAGES], cwd=home, check=True, timeout=INSTALL_SECONDS)
        (home / ".ready").touch()
    return home / "node_modules" / ".bin"


@pytest.fixture
def run_client(tmp_path: Path) -> Callable[..., str]:
    """Run a command in an empty directory with an empty home; returns what it printed, fails when it fails."""

    def run(*command: Any, environment: dict[str, str] | None = None, seconds: float = 240.0) -> str:
        work, home = tmp_path / "work", tmp_path / "home"
        work.mkdir(exist_ok=True)
        home.mkdir(exist_ok=True)
        done = subprocess.run(
            [str(part) for part in command],
            cwd=work,
            env={
                **{k: v for k, v in os.environ.items() if not k.endswith("_API_KEY")},
                **{"HOME": str(home), "XDG_CONFIG_HOME": str(home), "XDG_DATA_HOME": str(home)},
                **(environment or {}),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    return run
