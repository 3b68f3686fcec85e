"""The files of the Files API. Names that clients give are labels; ids are random; contents are in the database."""

import sqlite3
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from secrets import token_hex
from typing import Any, Literal

from server.batches.database import Database
from server.errors import ApiError, bad_request, echo

LONGEST_SECONDS = 30 * 24 * 3600
"""How long a file is kept when its owner does not say, and at most."""
SHORTEST_SECONDS = 3600
MOST_FILES = 10_000
"""Files of one API key."""
LONGEST_FILENAME = 255
CHUNK_BYTES = 2**20
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")

Purpose = Literal["batch", "batch_output"]


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A row of the table."""

    seq: int
    id: str
    owner: str
    purpose: Purpose
    filename: str
    bytes: int
    created_at: int
    """Unix seconds."""
    expires_at: int | None
    batch: int | None
    """The batch whose answers these are: they are read from its lines."""
    ok: int | None

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class Files:
    """Every call names the owner, and nobody sees what others own."""

    def __init__(self, database: Database, *, bytes_per_owner: int, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self.bytes_per_owner = bytes_per_owner
        self._clock = clock

    async def add(self, owner: str, filename: str, data: bytes, *, seconds: int = LONGEST_SECONDS) -> File:
        """Keep `data` for so many seconds.

        Raises:
            ApiError: 413 when the owner's files would take too much.
        """

        def work(connection: sqlite3.Connection) -> File:
            (count,) = connection.execute("SELECT COUNT(*) FROM files WHERE owner = ?", (owner,)).fetchone()
            if count >= MOST_FILES or used_bytes(connection, owner) + len(data) > self.bytes_per_owner:
                message = (
                    f"Files of one API key may take {self.bytes_per_owner} bytes and be {MOST_FILES}, results of "
                    "batches included. Delete some first."
                )
                raise ApiError(413, message, code="storage_quota_exceeded", param="file")
            file = insert_file(
                connection, owner, "batch", filename[:LONGEST_FILENAME], len(data), self._now(), seconds=seconds
            )
            connection.execute("INSERT INTO contents (file, data) VALUES (?, ?)", (file.seq, data))
            return file

        return await self._database.run(work)

    async def get(self, owner: str, file_id: str) -> File:
        """Raises ApiError 404."""
        return await self._database.run(lambda connection: find_file(connection, owner, file_id, self._now()))

    async def page(
        self, owner: str, *, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[File], bool]:
        """Up to `limit` files and whether there are more.

        Raises:
            ApiError: 404 for an unknown `after`.
        """

        def work(connection: sqlite3.Connection) -> list[File]:
            now = self._now()
            where, values = "owner = ? AND (expires_at IS NULL OR expires_at > ?)", [owner, now]
            if purpose is not None:
                where, values = where + " AND purpose = ?", [*values, purpose]
            if after is not None:
                mark = find_file(connection, owner, after, now, param="after")
                where, values = where + (" AND seq < ?" if newest_first else " AND seq > ?"), [*values, mark.seq]
            order = "DESC" if newest_first else "ASC"
            # Only fixed words are put together here; everything from outside is a parameter.
            query = f"SELECT * FROM files WHERE {where} ORDER BY seq {order} LIMIT ?"  # noqa: S608
            return [_file(row) for row in connection.execute(query, [*values, limit + 1])]

        found = await self._database.run(work)
        return found[:limit], len(found) > limit

    async def delete(self, owner: str, file_id: str) -> None:
        """Raises ApiError 404, and 400 while a batch that runs needs the file."""

        def work(connection: sqlite3.Connection) -> None:
            file = find_file(connection, owner, file_id, self._now())
            if _is_needed(connection, file):
                raise bad_request("A batch that is not finished needs this file.", param="file_id", code="file_in_use")
            delete_file(connection, file)

        await self._database.run(work)
        await self._database.give_back_space()

    async def read(self, file: File) -> AsyncGenerator[bytes, None]:
        """The contents, piece by piece. Ends early when the file is deleted meanwhile."""
        position = 0
        while True:
            piece, position = await self._database.run(
                lambda connection, start=position: read_piece(connection, file, start)  # type: ignore[misc]
            )
            if not piece:
                return
            yield piece

    async def read_all(self, owner: str, file_id: str) -> bytes:
        """The whole of an uploaded file. Raises ApiError 404."""
        file = await self.get(owner, file_id)
        return b"".join([piece async for piece in self.read(file)])

    async def delete_expired(self) -> None:
        def work(connection: sqlite3.Connection) -> bool:
            expired = connection.execute("SELECT * FROM files WHERE expires_at <= ?", (self._now(),)).fetchall()
            for row in expired:
                if not _is_needed(connection, _file(row)):
                    delete_file(connection, _file(row))
            return bool(expired)

        if await self._database.run(work):
            await self._database.give_back_space()

    def _now(self) -> int:
        return int(self._clock())


def used_bytes(connection: sqlite3.Connection, owner: str) -> int:
    """What an owner's files and the answers of unfinished batches take."""
    (files,) = connection.execute("SELECT SUM(bytes) FROM files WHERE owner = ?", (owner,)).fetchone()
    (results,) = connection.execute(
        "SELECT SUM(result_bytes) FROM batches WHERE owner = ? AND status IN (?, ?, ?, ?)", (owner, *UNFINISHED)
    ).fetchone()
    return (files or 0) + (results or 0)


def insert_file(
    connection: sqlite3.Connection,
    owner: str,
    purpose: Purpose,
    filename: str,
    num_bytes: int,
    now: int,
    *,
    seconds: int,
    batch: int | None = None,
    ok: int | None = None,
) -> File:
    """A new file without contents."""
    cursor = connection.execute(
        "INSERT INTO files (id, owner, purpose, filename, bytes, created_at, expires_at, batch, ok)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING *",
        ("file-" + token_hex(16), owner, purpose, filename, num_bytes, now, now + seconds, batch, ok),
    )
    (row,) = cursor.fetchall()
    return _file(row)


def find_file(connection: sqlite3.Connection, owner: str, file_id: str, now: int, *, param: str = "file_id") -> File:
    """Raises ApiError 404 for what does not exist, is expired or is somebody else's."""
    row = connection.execute(
        "SELECT * FROM files WHERE id = ? AND owner = ? AND (expires_at IS NULL OR expires_at > ?)",
        (file_id, owner, now),
    ).fetchone()
    if row is None:
        message = f"There is no file `{echo(file_id)}`."
        raise ApiError(404, message, type="not_found_error", code="file_not_found", param=param)
    return _file(row)


def delete_file(connection: sqlite3.Connection, file: File) -> None:
    connection.execute("DELETE FROM files WHERE seq = ?", (file.seq,))
    if file.batch is not None:
        connection.execute("UPDATE lines SET result = NULL WHERE batch = ? AND ok = ?", (file.batch, file.ok))


def read_piece(connection: sqlite3.Connection, file: File, position: int) -> tuple[bytes, int]:
    """About CHUNK_BYTES of a file from `position` on, and where the next piece starts; empty at the end."""
    if file.batch is None:
        try:
            blob = connection.blobopen("contents", "data", file.seq, readonly=True)
        except sqlite3.OperationalError:  # The file was deleted.
            return b"", position
        with blob:
            blob.seek(position)
            piece = blob.read(CHUNK_BYTES)
        return piece, position + len(piece)
    parts: list[bytes] = []
    size = 0
    for row in connection.execute(
        "SELECT number, result FROM lines WHERE batch = ? AND ok = ? AND number >= ? AND result IS NOT NULL"
        " ORDER BY number",
        (file.batch, file.ok, position),
    ):
        position = row["number"] + 1
        parts.append(row["result"])
        size += len(row["result"])
        if size >= CHUNK_BYTES:
            break
    return b"".join(parts), position


def read_slice(connection: sqlite3.Connection, file_id: str, start: int, size: int) -> bytes:
    """Part of an uploaded file."""
    row = connection.execute("SELECT seq FROM files WHERE id = ?", (file_id,)).fetchone()
    assert row is not None, "a file that an unfinished batch needs is never deleted"
    with connection.blobopen("contents", "data", row["seq"], readonly=True) as blob:
        blob.seek(start)
        return blob.read(size)


def _is_needed(connection: sqlite3.Connection, file: File) -> bool:
    return (
        connection.execute(
            "SELECT 1 FROM batches WHERE input_file_id = ? AND status IN (?, ?, ?, ?)", (file.id, *UNFINISHED)
        ).fetchone()
        is not None
    )


def _file(row: sqlite3.Row) -> File:
    return File(**dict(row))
