"""The batches and their lines. A line is answered when its result is committed, and that happens once.

validating -> in_progress -> finalizing -> completed
    |              |------------------------> expired      (what is not answered by then gets an error)
    |-> failed     |-> cancelling ----------> cancelled    (what is answered stays)
"""

import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from secrets import token_hex
from typing import Any, Literal

import msgspec

from server.batches.database import Database
from server.batches.files import UNFINISHED, find_file, insert_file, read_slice, used_bytes
from server.errors import ApiError, bad_request, echo

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
Outcome = Literal["completed", "expired", "cancelled"]

MOST_UNFINISHED = 100
"""Batches of one API key that are not finished."""
KEEP_SECONDS = 30 * 24 * 3600
MOST_STARTS = 10
"""A line that was begun so often without an answer may be what ends the server."""
_MOMENTS = (
    *("created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at", "expired_at"),
    *("cancelling_at", "cancelled_at"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A request of a batch: where it stands in the input file, in bytes."""

    number: int
    """Counted from 1, as an editor does."""
    custom_id: str
    start: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LineUsage:
    """Tokens of one answer."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a line is not run any more."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Batch:
    """A row of the table."""

    row: dict[str, Any]

    @property
    def seq(self) -> int:
        return int(self.row["seq"])

    @property
    def id(self) -> str:
        return str(self.row["id"])

    @property
    def owner(self) -> str:
        return str(self.row["owner"])

    @property
    def endpoint(self) -> str:
        return str(self.row["endpoint"])

    @property
    def input_file_id(self) -> str:
        return str(self.row["input_file_id"])

    @property
    def status(self) -> Status:
        status: Status = self.row["status"]
        return status

    @property
    def expires_at(self) -> int:
        return int(self.row["expires_at"])

    def to_dict(self, model: str) -> dict[str, Any]:
        """OpenAI's batch object."""
        row = self.row
        return {
            "id": row["id"],
            "object": "batch",
            "endpoint": row["endpoint"],
            "model": model,
            "errors": None if row["errors"] is None else {"object": "list", "data": msgspec.json.decode(row["errors"])},
            "input_file_id": row["input_file_id"],
            "completion_window": row["completion_window"],
            "status": row["status"],
            "output_file_id": row["output_file_id"],
            "error_file_id": row["error_file_id"],
            **{name: row[name] for name in _MOMENTS},
            "request_counts": {name: row[name] for name in ("total", "completed", "failed")},
            "usage": {
                "input_tokens": row["input_tokens"],
                "input_tokens_details": {"cached_tokens": row["cached_tokens"]},
                "output_tokens": row["output_tokens"],
                "output_tokens_details": {"reasoning_tokens": row["reasoning_tokens"]},
                "total_tokens": row["input_tokens"] + row["output_tokens"],
            },
            "metadata": None if row["metadata"] is None else msgspec.json.decode(row["metadata"]),
        }


class Batches:
    def __init__(self, database: Database, *, bytes_per_owner: int, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._bytes_per_owner = bytes_per_owner
        self._clock = clock

    async def create(
        self,
        owner: str,
        *,
        endpoint: str,
        input_file_id: str,
        completion_window: str,
        window_seconds: int,
        output_seconds: int,
        metadata: dict[str, str] | None,
    ) -> Batch:
        """A batch that waits to be validated.

        Raises:
            ApiError: 404 for an unknown file, 400 for one that is no input, 429 when too many are unfinished.
        """

        def work(connection: sqlite3.Connection) -> Batch:
            now = self._now()
            file = find_file(connection, owner, input_file_id, now, param="input_file_id")
            if file.purpose != "batch":
                raise bad_request("input_file_id: the file's purpose is not `batch`.", param="input_file_id")
            (unfinished,) = connection.execute(
                "SELECT COUNT(*) FROM batches WHERE owner = ? AND status IN (?, ?, ?, ?)", (owner, *UNFINISHED)
            ).fetchone()
            if unfinished >= MOST_UNFINISHED:
                message = f"This API key already has {unfinished} batches that are not finished."
                raise ApiError(429, message, type="rate_limit_error", code="rate_limit_exceeded")
            cursor = connection.execute(
                "INSERT INTO batches (id, owner, endpoint, input_file_id, completion_window, metadata, output_seconds,"
                " status, created_at, expires_at) VALUES (?, ?, ?, ?, ?, ?, ?, 'validating', ?, ?) RETURNING *",
                (
                    *("batch_" + token_hex(16), owner, endpoint, input_file_id, completion_window),
                    None if metadata is None else msgspec.json.encode(metadata).decode(),
                    *(output_seconds, now, now + window_seconds),
                ),
            )
            (row,) = cursor.fetchall()
            return Batch(dict(row))

        return await self._database.run(work)

    async def get(self, owner: str, batch_id: str) -> Batch:
        """Raises ApiError 404."""
        return await self._database.run(lambda connection: _find(connection, owner, batch_id))

    async def page(self, owner: str, *, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """Up to `limit` batches, the newest first, and whether there are more. Raises ApiError 404 for `after`."""

        def work(connection: sqlite3.Connection) -> list[Batch]:
            mark = 2**62 if after is None else _find(connection, owner, after, param="after").seq
            rows = connection.execute(
                "SELECT * FROM batches WHERE owner = ? AND seq < ? ORDER BY seq DESC LIMIT ?", (owner, mark, limit + 1)
            )
            return [Batch(dict(row)) for row in rows]

        found = await self._database.run(work)
        return found[:limit], len(found) > limit

    async def cancel(self, owner: str, batch_id: str) -> Batch:
        """Stop a batch that runs. Raises ApiError 404, and 400 for one that is finished."""

        def work(connection: sqlite3.Connection) -> Batch:
            batch = _find(connection, owner, batch_id)
            if batch.status in ("validating", "in_progress"):
                _set(connection, batch, "cancelling", self._now())
            elif batch.status != "cancelling":
                raise bad_request(f"A batch with status `{batch.status}` cannot be cancelled.", param="batch_id")
            return _find(connection, owner, batch_id)

        return await self._database.run(work)

    async def unfinished(self) -> list[Batch]:
        """Of all owners, the oldest first."""

        def work(connection: sqlite3.Connection) -> list[Batch]:
            rows = connection.execute("SELECT * FROM batches WHERE status IN (?, ?, ?, ?) ORDER BY seq", UNFINISHED)
            return [Batch(dict(row)) for row in rows]

        return await self._database.run(work)

    async def start(self, batch: Batch, lines: Sequence[Line]) -> None:
        """Validated: from here on these lines are to be answered."""

        def work(connection: sqlite3.Connection) -> None:
            if _status(connection, batch) != "validating":
                return  # Cancelled meanwhile.
            connection.executemany(
                "INSERT INTO lines (batch, number, custom_id, start, size) VALUES (?, ?, ?, ?, ?)",
                ((batch.seq, line.number, line.custom_id, line.start, line.size) for line in lines),
            )
            connection.execute("UPDATE batches SET total = ? WHERE seq = ?", (len(lines), batch.seq))
            _set(connection, batch, "in_progress", self._now())

        await self._database.run(work)

    async def fail(self, batch: Batch, errors: Sequence[dict[str, Any]]) -> None:
        """Not valid: nothing is run."""

        def work(connection: sqlite3.Connection) -> None:
            if _status(connection, batch) == "validating":
                text = msgspec.json.encode(errors).decode()
                connection.execute("UPDATE batches SET errors = ? WHERE seq = ?", (text, batch.seq))
                _set(connection, batch, "failed", self._now())

        await self._database.run(work)

    async def to_do(self, batch: Batch, after: int, limit: int) -> list[Line]:
        """The next lines behind number `after` that have no answer."""

        def work(connection: sqlite3.Connection) -> list[Line]:
            rows = connection.execute(
                "SELECT number, custom_id, start, size FROM lines WHERE batch = ? AND number > ? AND ok IS NULL"
                " ORDER BY number LIMIT ?",
                (batch.seq, after, limit),
            )
            return [Line(**dict(row)) for row in rows]

        return await self._database.run(work)

    async def take(self, batch: Batch, line: Line) -> bytes | Refused:
        """The text of a line that is run now, or why it is not."""

        def work(connection: sqlite3.Connection) -> bytes | Refused:
            key = (batch.seq, line.number)
            (starts,) = connection.execute(
                "UPDATE lines SET starts = starts + 1 WHERE batch = ? AND number = ? RETURNING starts", key
            ).fetchone()
            if starts > MOST_STARTS:
                return Refused("too_many_attempts", f"This request was begun {MOST_STARTS} times without an answer.")
            if used_bytes(connection, batch.owner) >= self._bytes_per_owner:
                return Refused("storage_quota_exceeded", "The files of this API key take all the space it may have.")
            return read_slice(connection, batch.input_file_id, line.start, line.size)

        return await self._database.run(work)

    async def record(self, batch: Batch, line: Line, result: bytes, *, ok: bool, usage: LineUsage) -> bool:
        """Keep the answer of a line, a line of JSON; False when it has one already."""

        def work(connection: sqlite3.Connection) -> bool:
            return _record(connection, batch, line.number, result, ok=ok, usage=usage)

        return await self._database.run(work)

    async def finalize(self, batch: Batch) -> None:
        """Every line has its answer."""
        await self._database.run(lambda connection: _set(connection, batch, "finalizing", self._now()))

    async def finish(self, batch: Batch, outcome: Outcome, unanswered: Callable[[str], bytes] | None = None) -> None:
        """The last state, with its files. `unanswered` makes the result of a line without an answer from its id."""

        def work(connection: sqlite3.Connection) -> None:
            now = self._now()
            if unanswered is not None:
                rows = connection.execute(
                    "SELECT number, custom_id FROM lines WHERE batch = ? AND ok IS NULL", (batch.seq,)
                ).fetchall()
                for row in rows:
                    result = unanswered(row["custom_id"])
                    _record(connection, batch, row["number"], result, ok=False, usage=LineUsage())
            (seconds,) = connection.execute("SELECT output_seconds FROM batches WHERE seq = ?", (batch.seq,)).fetchone()
            for ok, column, name in ((1, "output_file_id", "output"), (0, "error_file_id", "error")):
                (size,) = connection.execute(
                    "SELECT SUM(LENGTH(result)) FROM lines WHERE batch = ? AND ok = ?", (batch.seq, ok)
                ).fetchone()
                if size:
                    filename = f"{batch.id}_{name}.jsonl"
                    file = insert_file(
                        connection,
                        *(batch.owner, "batch_output", filename, size, now),
                        seconds=seconds,
                        batch=batch.seq,
                        ok=ok,
                    )
                    connection.execute(f"UPDATE batches SET {column} = ? WHERE seq = ?", (file.id, batch.seq))  # noqa: S608
            _set(connection, batch, outcome, now)

        await self._database.run(work)

    async def delete_old(self) -> None:
        """Batches that were created long ago, finished, and have no file any more."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(
                "DELETE FROM batches WHERE created_at < ? AND status NOT IN (?, ?, ?, ?)"
                " AND NOT EXISTS (SELECT 1 FROM files WHERE files.batch = batches.seq)",
                (self._now() - KEEP_SECONDS, *UNFINISHED),
            )

        await self._database.run(work)

    def _now(self) -> int:
        return int(self._clock())


def _find(connection: sqlite3.Connection, owner: str, batch_id: str, *, param: str = "batch_id") -> Batch:
    row = connection.execute("SELECT * FROM batches WHERE id = ? AND owner = ?", (batch_id, owner)).fetchone()
    if row is None:
        message = f"There is no batch `{echo(batch_id)}`."
        raise ApiError(404, message, type="not_found_error", code="batch_not_found", param=param)
    return Batch(dict(row))


def _status(connection: sqlite3.Connection, batch: Batch) -> Status:
    (status,) = connection.execute("SELECT status FROM batches WHERE seq = ?", (batch.seq,)).fetchone()
    found: Status = status
    return found


def _set(connection: sqlite3.Connection, batch: Batch, status: Status, now: int) -> None:
    """Every state but the first has a moment named after it."""
    connection.execute(f"UPDATE batches SET status = ?, {status}_at = ? WHERE seq = ?", (status, now, batch.seq))  # noqa: S608


def _record(
    connection: sqlite3.Connection, batch: Batch, number: int, result: bytes, *, ok: bool, usage: LineUsage
) -> bool:
    cursor = connection.execute(
        "UPDATE lines SET result = ?, ok = ? WHERE batch = ? AND number = ? AND ok IS NULL",
        (result, ok, batch.seq, number),
    )
    if not cursor.rowcount:
        return False
    connection.execute(
        "UPDATE batches SET completed = completed + ?, failed = failed + ?, result_bytes = result_bytes + ?,"
        " input_tokens = input_tokens + ?, cached_tokens = cached_tokens + ?, output_tokens = output_tokens + ?,"
        " reasoning_tokens = reasoning_tokens + ? WHERE seq = ?",
        (
            *(int(ok), int(not ok), len(result)),
            *(usage.input_tokens, usage.cached_tokens, usage.output_tokens, usage.reasoning_tokens),
            batch.seq,
        ),
    )
    return True
