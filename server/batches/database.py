"""Where files and batches are kept: one SQLite database, one connection, one thread.

Without a directory the database is in memory and ends with the server. With one, it is DIR/fathom.sqlite3, readable by
its owner only, and one server at a time may use it.
"""

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from server import logs
from server.config import ServerConfigError
from server.errors import overloaded

T = TypeVar("T")

_NAME = "fathom.sqlite3"
_VERSION = 1
_RETRY_SECONDS = 30

_SCHEMA = """
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    purpose TEXT NOT NULL,
    filename TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    batch INTEGER REFERENCES batches (seq) ON DELETE CASCADE,
    ok INTEGER
);
CREATE INDEX files_by_owner ON files (owner, seq);
CREATE INDEX files_by_batch ON files (batch) WHERE batch IS NOT NULL;
CREATE TABLE contents (
    file INTEGER PRIMARY KEY REFERENCES files (seq) ON DELETE CASCADE,
    data BLOB NOT NULL
);
CREATE TABLE batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL,
    completion_window TEXT NOT NULL,
    metadata TEXT,
    output_seconds INTEGER NOT NULL,
    status TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    in_progress_at INTEGER,
    expires_at INTEGER NOT NULL,
    finalizing_at INTEGER,
    completed_at INTEGER,
    failed_at INTEGER,
    expired_at INTEGER,
    cancelling_at INTEGER,
    cancelled_at INTEGER,
    output_file_id TEXT,
    error_file_id TEXT,
    errors TEXT,
    total INTEGER NOT NULL DEFAULT 0,
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    result_bytes INTEGER NOT NULL DEFAULT 0,
    input_tokens INTEGER NOT NULL DEFAULT 0,
    cached_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    reasoning_tokens INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX batches_by_owner ON batches (owner, seq);
CREATE INDEX batches_by_status ON batches (status);
CREATE TABLE lines (
    batch INTEGER NOT NULL REFERENCES batches (seq) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    custom_id TEXT NOT NULL,
    start INTEGER NOT NULL,
    size INTEGER NOT NULL,
    starts INTEGER NOT NULL DEFAULT 0,
    ok INTEGER,
    result BLOB,
    PRIMARY KEY (batch, number)
);
CREATE INDEX lines_to_do ON lines (batch, number) WHERE ok IS NULL;
"""


class Database:
    """Calls run one after the other, each in a transaction of its own, outside the event loop."""

    def __init__(self, connection: sqlite3.Connection, lock: int | None) -> None:
        self._connection = connection
        self._lock = lock
        self._thread = ThreadPoolExecutor(1, "database")

    @classmethod
    def open(cls, directory: str | None) -> "Database":
        """The database of a directory, which is made when absent; one in memory for None.

        Raises:
            ServerConfigError: the directory cannot be used, or another server uses it.
        """
        if directory is None:
            connection = _connect(":memory:")
            _prepare(connection)
            return cls(connection, None)
        folder = Path(directory)
        lock = -1
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # SQLite gives its journal files the permissions of the database.
            os.close(os.open(folder / _NAME, os.O_RDWR | os.O_CREAT, 0o600))
            connection = _connect(str(folder / _NAME))
            _prepare(connection)
        except BaseException as error:
            if lock >= 0:
                os.close(lock)
            if isinstance(error, BlockingIOError):
                raise ServerConfigError(f"--data-dir {directory} is in use by another server") from None
            if isinstance(error, OSError):
                raise ServerConfigError(f"--data-dir {directory}: {error.strerror or error}") from None
            if isinstance(error, sqlite3.Error):
                raise ServerConfigError(f"--data-dir {directory}: {_NAME} cannot be used: {error}") from None
            raise
        return cls(connection, lock)

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What `work` returns; its changes are kept when it returns and undone when it raises.

        Raises:
            ApiError: 503 when the disk is full or fails; and whatever `work` raises.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work)

    async def give_back_space(self) -> None:
        """After something was deleted: its pages and its traces in the journal go back to the file system."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._shrink)

    def _shrink(self) -> None:
        try:
            # A script, because `execute` would free one page.
            self._connection.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE);")
        except sqlite3.OperationalError as error:
            # Nothing is lost: the next deletion tries again.
            logs.server.error("the database of files and batches did not shrink: %s", error)

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                found = work(self._connection)
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
        except sqlite3.OperationalError as error:
            logs.server.error("the database of files and batches failed: %s", error)
            message = "The storage for files and batches does not work now."
            raise overloaded(message, _RETRY_SECONDS, code="storage_unavailable") from None
        return found

    def close(self) -> None:
        """Wait for running calls, then close the database. Nothing may be called afterwards."""
        self._thread.submit(self._connection.close)
        self._thread.shutdown(wait=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    return connection


def _prepare(connection: sqlite3.Connection) -> None:
    # What is deleted is overwritten and its space given back. A killed server loses nothing that was committed; after
    # a power cut the last lines of a batch may have to run again.
    for setting in (
        *("auto_vacuum = INCREMENTAL", "journal_mode = WAL", "synchronous = NORMAL"),
        *("foreign_keys = ON", "secure_delete = ON"),
    ):
        connection.execute(f"PRAGMA {setting}")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == 0:
        connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
    elif version != _VERSION:
        raise ServerConfigError(f"--data-dir: {_NAME} was written by another version of Fathom (format {version})")
