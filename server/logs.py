"""Logging: time, level, where, and never a prompt, an output, a header or a key."""

import logging
import sys
import time
import traceback

access = logging.getLogger("fathom.access")
server = logging.getLogger("fathom.server")

MOST_PATH = 100


def configure(level: int = logging.INFO) -> None:
    """One handler on stderr for everything; uvicorn speaks only when something is wrong."""
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    # A closed stderr is no reason to fail a request.
    logging.raiseExceptions = False
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def plain(text: str) -> str:
    """A client's text on one ASCII line, shortened."""
    return ascii(text[:MOST_PATH])[1:-1]


def failure(error: BaseException) -> str:
    """Where and with which type something failed; the message stays out because it may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    where = " < ".join(f"{frame.filename.rsplit('/', 2)[-1]}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__name__} at {where or 'unknown place'}"
