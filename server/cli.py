"""`fathom`: one command, its subcommands imported when they run."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.config import EngineConfig
from server.config import VERSION, ServerConfig, ServerConfigError
from server.flags import add_flags, from_args

COMMANDS = {
    "serve": "serve a model over HTTP",
    "chat": "talk to a running server",
    "make-checkpoint": "write a random checkpoint in the official format",
    "openapi": "print the OpenAPI document of the server",
    "simulate": "run the scheduler on a virtual clock, against a trace",
    "selfcheck": "check that this machine, or a running server, computes the right thing",
}
USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] == "serve":
        return _serve(arguments[1:])
    if arguments and arguments[0] == "chat":
        from server.chat import main as chat

        return chat(arguments[1:])
    if arguments and arguments[0] == "make-checkpoint":
        from model.tools.make_checkpoint import main as make_checkpoint

        return make_checkpoint(arguments[1:])
    if arguments and arguments[0] == "openapi":
        return _openapi(arguments[1:])
    if arguments and arguments[0] == "simulate":
        from engine.tools.simulate import main as simulate

        return simulate(arguments[1:])
    if arguments and arguments[0] == "selfcheck":
        from embedded.selfcheck.command import main as selfcheck

        return selfcheck(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="fathom",
        description="A standalone inference server for DeepSeek-V4.",
        epilog="commands:\n" + "\n".join(f"  {name:16} {text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fathom {VERSION}")
    parser.add_argument("command", choices=COMMANDS, help="`fathom COMMAND --help` says more", metavar="COMMAND")
    parser.parse_args(arguments)
    raise AssertionError("argparse exits on everything that is not a command")


def _openapi(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="fathom openapi", description=COMMANDS["openapi"]).parse_args(argv)
    from server.app import openapi

    sys.stdout.write(openapi().decode() + "\n")
    return 0


def serve_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fathom serve", description="Serve a DeepSeek-V4 model over HTTP.")
    parser.add_argument(
        "model_dir",
        nargs="?",
        metavar="MODEL_DIR",
        help="Hugging Face directory of a DeepSeek-V4 model; a small embedded one when absent",
    )
    add_flags(parser, ServerConfig)
    add_flags(parser, EngineConfig, skip=frozenset({"model_dir"}))
    return parser


def _serve(argv: list[str]) -> int:
    arguments = serve_parser().parse_args(argv)
    from server.launch import serve

    def engine_config() -> EngineConfig:
        model_dir = arguments.model_dir or _default_model_dir()
        if not Path(model_dir).is_dir():
            raise ServerConfigError(f"{model_dir}: no such model directory")
        return from_args(EngineConfig, arguments, model_dir=model_dir)

    try:
        return serve(from_args(ServerConfig, arguments), engine_config)
    except ServerConfigError as error:
        print(f"fathom serve: {error}", file=sys.stderr)
        return USAGE_ERROR


def _default_model_dir() -> str:
    # In a process of its own: making the directory takes torch, which the server does without. Its working directory
    # makes the packages importable where Fathom is not installed, and keeps those of the user's directory out.
    root = Path(__file__).resolve().parents[1]
    made = subprocess.run(
        [sys.executable, "-m", "model.tools.default_model"], cwd=root, stdout=subprocess.PIPE, text=True, check=False
    )
    lines = made.stdout.strip().splitlines()
    if made.returncode or not lines:
        raise ServerConfigError("the embedded model could not be made; the lines above say why")
    return lines[-1]
