"""`make eval`: score a model on held-out examples through a server, and print the table.

    python -m embedded.evaluation [--url URL | MODEL_DIR] [--rows NAMES] [--examples N] [--out JSON] [--resume]

Rows are those of `embedded.evaluation.rows`, and `warm alone batch16 chunk128 chunk2048 hibernated`: the same questions
under other circumstances, token by token. Exit code: 0 every target is met, 1 one is not or the server failed, 2 usage.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from embedded.evaluation.client import Client, ClientError
from embedded.evaluation.identities import CIRCUMSTANCES, CIRCUMSTANCES_BY_NAME, Identities, epsilon_of
from embedded.evaluation.launched import launched
from embedded.evaluation.results import HEADER, Results, RowResult, fingerprint, table_line
from embedded.evaluation.rows import ROWS, ROWS_BY_NAME, Row
from embedded.evaluation.scoring import score

USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if (arguments.url is None) == (arguments.model_dir is None):
        parser.error("give MODEL_DIR or --url URL")
    model_dir: Path | None = arguments.model_dir
    if model_dir is not None and not (model_dir / "config.json").is_file():
        parser.error(f"{model_dir}: no such model directory")
    rows, circumstances = _chosen(parser, arguments.rows, own_server=model_dir is not None)
    try:
        server = launched(model_dir) if model_dir is not None else nullcontext(Client(arguments.url))
        return _run(server, model_dir, rows, circumstances, arguments)
    except (ClientError, ValueError) as error:
        print(f"embedded.evaluation: {error}", file=sys.stderr)
        return 1


def _run(
    server: AbstractContextManager[Client],
    model_dir: Path | None,
    rows: Sequence[Row],
    circumstances: Sequence[str],
    arguments: argparse.Namespace,
) -> int:
    shown: list[RowResult] = []
    errors = 0

    def show(row: RowResult) -> None:
        shown.append(row)
        print(table_line(row), flush=True)

    with server as client:
        # A running server does not say which weights it has; its model's name must do.
        model = fingerprint(model_dir) if model_dir is not None else f"{client.url} {client.model}"
        results = Results.open(model, arguments.out, resume=arguments.resume)
        print(HEADER)
        scored = []
        for row in rows:
            wanted = min(row.num_examples, arguments.examples or row.num_examples)
            try:
                if results.finished(row.name, wanted) is None:
                    results.add(score(client, row, wanted))
            except ClientError as error:
                # Such as a prompt that the server has no room for: the other rows have.
                errors += 1
                print(f"{row.name:28} {error}", flush=True)
                continue
            show(results.rows[row.name])
            scored.append(row)
        epsilon = epsilon_of(client) if arguments.epsilon is None else arguments.epsilon
        identities = Identities(client=client, model_dir=model_dir, results=results, show=show, epsilon=epsilon)
        # What nothing is asked of is not asked again.
        judged = [row for row in scored if row.target is not None]
        for name in circumstances:
            try:
                identities.check(CIRCUMSTANCES_BY_NAME[name], judged)
            except ClientError as error:
                errors += 1
                print(f"{name:28} {error}", flush=True)
    failed = [result for result in shown if result.passed is False]
    for result in failed:
        for line in result.differences:
            print(f"{result.name}: {line}")
    total = len(shown) + errors
    print(f"{total - len(failed) - errors} of {total} rows are as they should be")
    return 1 if failed or errors else 0


def _chosen(parser: argparse.ArgumentParser, names: str | None, *, own_server: bool) -> tuple[list[Row], list[str]]:
    """Rows and circumstances by their names."""
    possible = [c.name for c in CIRCUMSTANCES if own_server or c.flags is None]
    if names is None:
        return list(ROWS), possible
    wanted = names.split(",")
    for name in wanted:
        if name not in ROWS_BY_NAME and name not in possible:
            parser.error(f"--rows: no row {name!r}; there are {', '.join([*ROWS_BY_NAME, *possible])}")
    rows = [row for row in ROWS if row.name in wanted]
    return rows, [name for name in possible if name in wanted]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m embedded.evaluation", description="Score a model on held-out examples through a server."
    )
    parser.add_argument("model_dir", nargs="?", type=Path, metavar="MODEL_DIR", help="a server is started for it")
    parser.add_argument("--url", help="a running server instead; without the rows that need servers of their own")
    parser.add_argument("--rows", metavar="NAMES", help="rows and circumstances, separated by commas; all when absent")
    parser.add_argument("--examples", type=_count, metavar="N", help="at most so many examples of each row")
    parser.add_argument("--out", type=Path, metavar="JSON", help="results, written after each row")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out has of this model")
    parser.add_argument(
        "--epsilon",
        type=float,
        metavar="X",
        help="nats between the two likeliest tokens where answers may part; by the model's dtype when absent",
    )
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main())
