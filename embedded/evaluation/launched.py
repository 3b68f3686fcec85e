"""A server of its own for a model directory: `with launched(DIR, "--flag") as client`."""

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from embedded.evaluation.client import Client, ClientError

_STOP_SECONDS = 40.0
_ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def launched(model_dir: Path, *flags: str) -> Iterator[Client]:
    """`fathom serve MODEL_DIR` on a free port, ended when the block ends.

    Raises:
        ClientError: it did not come up; its last lines say why.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        # The working directory makes the packages importable where Fathom is not installed.
        process = subprocess.Popen(  # noqa: S603 - this program again
            [sys.executable, "-m", "server", "serve", str(model_dir.resolve()), "--port", "0", *flags],
            cwd=_ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            url = re.search(r"http://\S+", line)
            if url is None:
                process.wait()
                log.seek(0)
                raise ClientError(f"the server did not start ({' '.join(flags) or 'no flags'}): {log.read()[-2000:]}")
            yield Client(url[0])
        finally:
            _stop(process)
            process.stdout.close()


def _stop(process: "subprocess.Popen[str]") -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
