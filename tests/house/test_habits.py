"""Habits that a machine can check: no dangerous calls, no environment switches, files of a readable size."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for package in ("server", "engine", "model", "embedded") for p in (ROOT / package).rglob("*.py"))

FORBIDDEN_IMPORTS = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "jinja2", "yaml", "transformers"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__"}
SECRETS = {"FATHOM_API_KEY"}
# Directories and terminals of the user, read for their own purpose; none of them changes an answer.
USER_ENVIRONMENT = {"XDG_CACHE_HOME", "HOME", "NO_COLOR", "TERM"}
MOST_LINES = 500


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_dangerous_import_or_call(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {a.name.split(".")[0] for a in node.names} & FORBIDDEN_IMPORTS, f"line {node.lineno}"
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in FORBIDDEN_IMPORTS, f"line {node.lineno}"
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                assert node.func.id not in FORBIDDEN_CALLS, f"line {node.lineno}"
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                assert (node.func.value.id, node.func.attr) != ("torch", "load"), f"line {node.lineno}"
            shell = [k for k in node.keywords if k.arg == "shell"]
            assert not shell, f"line {node.lineno}: shell="


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_environment_variables_are_secrets_only(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        name = None
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            name = node.slice
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"os.getenv", "os.environ.get"}:
            name = node.args[0]
        if name is not None:
            assert isinstance(name, ast.Constant), f"line {node.lineno}: a computed environment variable"
            assert name.value in SECRETS | USER_ENVIRONMENT, f"line {node.lineno}: {name.value}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_hold_one_noun(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
