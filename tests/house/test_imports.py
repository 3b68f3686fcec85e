"""The house's import rules, checked on the syntax tree and in a real interpreter."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("server", "engine", "model", "embedded")

# What a package may import of its neighbours. Longest matching prefix of the importing module decides.
ALLOWED: dict[str, tuple[str, ...]] = {
    "server": ("server", "engine.config", "engine.messages", "engine.client", "engine.clients", "engine.vocabulary"),
    # The child processes that check grammars compile them as the engine will.
    "server.grammar.worker": ("server", "engine.grammar", "engine.vocabulary"),
    "server.launch": (
        "server",
        "engine.config",
        "engine.messages",
        "engine.client",
        "engine.clients",
        "engine.vocabulary",
        "engine.process",
    ),
    "engine": ("engine", "model.config", "model.kv_layout", "model.presets"),
    "engine.runner": ("engine", "model"),
    "model": ("model",),
    # It stands above the others: it renders as the server does, runs the engine and trains the model.
    "embedded": ("embedded", "server", "engine", "model"),
}
# Command line dispatch: a subcommand's module is imported when that subcommand runs, and not before.
LAZY_ALLOWED: dict[str, tuple[str, ...]] = {
    "server.cli": ("engine.tools", "model.tools", "embedded.selfcheck"),
    # The one place where the torch-free engine makes an executor that computes.
    "engine.process": ("engine.runner",),
}
TORCH_FREE_EXCEPT = ("engine.runner",)
TORCH_FREE_MODEL = ("model.config", "model.presets", "model.kv_layout", "model.batch", "model.quant")


def modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == p or module.startswith(p + ".") for p in prefixes)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(imported module, whether it is imported at module level and at run time)."""

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                base = child.module or ""
                yield from (
                    (f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base, top)
                    for alias in child.names
                )
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield from walk(child, top and isinstance(child, ast.ClassDef))
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                yield from ((name, False) for name, _ in walk(child, False))
            else:
                yield from walk(child, top)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_follow_the_house_rules(module: str) -> None:
    rule = max((p for p in ALLOWED if within(module, (p,))), key=len)
    for name, top in imports(MODULES[module]):
        if not within(name, PACKAGES):
            torch_free = within(module, ("server", "engine")) and not within(module, TORCH_FREE_EXCEPT)
            if (torch_free or module in TORCH_FREE_MODEL) and name.split(".")[0] == "torch":
                assert module in TORCH_FREE_MODEL and not top, f"{module} imports {name}"
            continue
        allowed = within(name, ALLOWED[rule]) or (not top and within(name, LAZY_ALLOWED.get(module, ())))
        assert allowed, f"{module} may not import {name}"


def test_there_is_no_import_cycle() -> None:
    graph = {
        module: {name for name, top in imports(path) if top and name in MODULES and name != module}
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module in done:
            return
        for name in sorted(graph[module]):
            visit(name, (*trail, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


@pytest.mark.parametrize("module", ["server.app", "server.cli", "engine.scheduler", "engine.core", "engine.clients"])
def test_torch_is_absent_after_import(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
