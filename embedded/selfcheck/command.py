"""`fathom selfcheck`: does this machine compute the right thing?

Every operation's backend against the reference, then a suite of prompts through the engine with its features on and
off. Exit code: 0 all passed, 1 a check failed, 2 usage.
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from embedded.evaluation.client import Client, ClientError
from embedded.evaluation.identities import epsilon_of
from embedded.evaluation.launched import launched
from embedded.selfcheck.features import FeatureChecks
from embedded.selfcheck.prompts import MOST_TOKENS, SuitePrompt, built_in_prompts, load_prompts, save_prompts
from embedded.selfcheck.report import Check, Outcome, header, line, run_check, run_checks

USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.url is not None and (arguments.model_dir is not None or arguments.write_expected):
        parser.error("--url goes with neither MODEL_DIR nor --write-expected")
    began = time.monotonic()
    try:
        if arguments.url is not None:
            outcomes = _check_url(arguments.url)
        else:
            model_dir = arguments.model_dir or _default_model_dir()
            if not (model_dir / "config.json").is_file():
                parser.error(f"{model_dir}: no such model directory")
            outcomes = _check_machine(model_dir, write_expected=arguments.write_expected)
    except (ClientError, OSError, ValueError) as error:
        parser.error(str(error))
    failed = sum(not outcome.passed for outcome in outcomes)
    print(f"{len(outcomes) - failed} of {len(outcomes)} checks passed in {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


def _check_url(url: str) -> list[Outcome]:
    """The prompts only: the server's machine may be another one, and its model any."""
    client = Client(url)
    print(f"server {client.url}, model {client.model}; its answers are compared with each other only")
    print(header())
    features = FeatureChecks(lambda: client, built_in_prompts(), None, epsilon=epsilon_of(client))
    return run_checks(features.checks(), _show)


def _check_machine(model_dir: Path, *, write_expected: bool) -> list[Outcome]:
    # torch takes its seconds, and --url does without it.
    from embedded.selfcheck.machine import describe, devices
    from embedded.selfcheck.op_checks import op_checks

    suite = built_in_prompts(MOST_TOKENS) if write_expected else load_prompts(model_dir)
    print(describe())
    print(f"model {model_dir}; {_told(suite)}")
    print(header())
    with ExitStack() as stack:

        @cache
        def connect() -> Client:
            return stack.enter_context(launched(model_dir))

        start = run_check(Check("a server with the default flags", lambda: connect().model and None))
        _show(start)
        outcomes = [start, *run_checks(op_checks(devices()), _show)]
        if not start.passed:
            return outcomes
        features = FeatureChecks(connect, suite, model_dir, epsilon=epsilon_of(connect()))
        outcomes += run_checks(features.checks(), _show)
        if write_expected and all(outcome.passed for outcome in outcomes):
            print(f"expected answers written to {save_prompts(model_dir, suite, features.answers)}")
    return outcomes


def _told(suite: Sequence[SuitePrompt]) -> str:
    if any(prompt.expected is not None for prompt in suite):
        return "its answers are known"
    return "no known answers (random weights?): its answers are compared with each other only"


def _show(outcome: Outcome) -> None:
    print(line(outcome), flush=True)


def _default_model_dir() -> Path:
    from model.tools.default_model import default_model_dir

    return default_model_dir()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fathom selfcheck", description="Check that this machine, or a running server, computes the right thing."
    )
    parser.add_argument("model_dir", nargs="?", type=Path, metavar="MODEL_DIR", help="the embedded model when absent")
    parser.add_argument("--url", help="a running server: the prompts only, compared with each other")
    parser.add_argument(
        "--write-expected",
        action="store_true",
        help="when all passes, keep this model's answers beside it: they are the right ones from then on",
    )
    return parser
