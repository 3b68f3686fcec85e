"""Files of batches: what is taken in, what is kept, and what goes."""

import asyncio
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from server.batches import files as files_module
from server.batches.check import MOST_LINES, InvalidBatch, read_body, read_lines
from server.batches.database import Database
from server.config import ServerConfig, ServerConfigError
from server.errors import ApiError
from tests.server.batch_client import (
    CHAT,
    jsonl,
    request_line,
    running,
    until,
    upload,
)

BAD_FILES: list[tuple[bytes, str, int | None]] = [
    (b"\n \n", "empty_file", None),
    (b"{", "invalid_json_line", 1),
    (b"[1]\n", "invalid_json_line", 1),
    (b"\xff\xfe\n", "invalid_json_line", 1),
    (b"[" * 1000 + b"\n", "invalid_json_line", 1),
    (jsonl([request_line("a"), request_line("b"), request_line("a")]), "duplicate_custom_id", 3),
    (jsonl([request_line("a"), {}]), "invalid_custom_id", 2),
    (jsonl([request_line(7)]), "invalid_custom_id", 1),
    (jsonl([request_line("")]), "invalid_custom_id", 1),
    (jsonl([request_line("x" * 1000)]), "invalid_custom_id", 1),
    (jsonl([{**request_line("a"), "method": "GET"}]), "invalid_method", 1),
    (jsonl([{**request_line("a"), "url": "/v1/files"}]), "mismatched_url", 1),
    (jsonl([{**request_line("a"), "url": "http://evil/v1/chat/completions"}]), "mismatched_url", 1),
    (jsonl([{**request_line("a"), "body": "x"}]), "invalid_body", 1),
]


def test_files_that_are_no_batch(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x") as server, running(server):
            for data, code, line in BAD_FILES:
                file = (await upload(server, data)).json()["id"]
                body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
                failed = await until(server, (await server.post("/v1/batches", body)).json(), "failed")
                assert failed["failed_at"] is not None
                error = failed["errors"]["data"][0]
                assert (error["code"], error["line"]) == (code, line), data
                assert failed["request_counts"] == {"total": 0, "completed": 0, "failed": 0}

    asyncio.run(main())


def test_lines_of_a_file() -> None:
    data = b"\r\n" + jsonl([request_line("a")]) + b"\n  \n" + jsonl([request_line("b", x="\u2028é")]).rstrip(b"\n")
    first, second = read_lines(data, CHAT)
    assert (first.number, second.number) == (2, 5)
    for line, custom_id in ((first, "a"), (second, "b")):
        text = data[line.start : line.start + line.size]
        assert json.loads(text)["custom_id"] == custom_id
        assert json.loads(read_body(text)) == json.loads(text)["body"]
    with pytest.raises(InvalidBatch) as many:
        read_lines(b"{\n" * 500, CHAT)
    assert len(many.value.errors) == 100
    short = b'{"custom_id":"%d","method":"POST","url":"/v1/chat/completions","body":{}}\n'
    with pytest.raises(InvalidBatch) as long:
        read_lines(b"".join(short % n for n in range(MOST_LINES + 1)), CHAT)
    assert long.value.errors[0]["code"] == "too_many_requests"
    with pytest.raises(ApiError, match="background"):
        read_body(b'{"body": {"background": true}}')


def test_uploads(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="x", config=ServerConfig(body_limit=5000, file_quota=10_000)) as server:
            good = await upload(
                server, b"x" * 3000, **{"expires_after[anchor]": "created_at"} | {"expires_after[seconds]": "3600"}
            )
            file = good.json()
            assert {name: file[name] for name in ("object", "bytes", "filename", "purpose", "status")} == {
                **{"object": "file", "bytes": 3000, "filename": "in.jsonl", "purpose": "batch", "status": "processed"},
            }
            assert file["expires_at"] == file["created_at"] + 3600
            content = await server.http.get(f"/v1/files/{file['id']}/content")
            assert content.content == b"x" * 3000
            assert content.headers["content-type"] == "application/octet-stream"
            assert content.headers["content-disposition"].startswith("attachment")
            # Names are labels: none of them becomes a path.
            for name in ("../../etc/passwd", "a/b", "x" * 1000, "\0", "ü"):
                answer = await server.http.post("/v1/files", files={"file": (name, b"x")}, data={"purpose": "batch"})
                assert answer.status_code == 200
                assert len(answer.json()["filename"]) <= files_module.LONGEST_FILENAME
            assert (await upload(server, b"x" * 6000)).status_code == 413
            assert (await upload(server, b"x" * 4000)).status_code == 200
            full = await upload(server, b"x" * 4000)
            assert (full.status_code, full.json()["error"]["code"]) == (413, "storage_quota_exceeded")
            assert (await server.http.delete(f"/v1/files/{file['id']}")).json()["deleted"] is True
            assert (await server.http.get(f"/v1/files/{file['id']}/content")).status_code == 404
            assert (await upload(server, b"x" * 4000)).status_code == 200

            refused: list[tuple[dict[str, Any], int, str | None]] = [
                ({"files": {"file": ("a", b"x")}, "data": {"purpose": "fine-tune"}}, 400, "purpose"),
                ({"files": {"file": ("a", b"x")}}, 400, "purpose"),
                ({"files": {"other": ("a", b"x")}, "data": {"purpose": "batch"}}, 400, "file"),
                ({"files": {"file": ("a", b"")}, "data": {"purpose": "batch"}}, 400, "file"),
                ({"json": {"purpose": "batch", "file": "x"}}, 415, None),
                ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 415, None),
                ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400, None),
                (
                    {"content": b"--b\r\n\r\n", "headers": {"content-type": "multipart/form-data; boundary=b"}},
                    400,
                    None,
                ),
                (
                    {"files": {"file": ("a", b"x")}, "data": {"purpose": "batch", "expires_after[anchor]": "now"}},
                    *(400, "expires_after[anchor]"),
                ),
                (
                    {
                        "files": {"file": ("a", b"x")},
                        "data": {
                            **{"purpose": "batch", "expires_after[anchor]": "created_at"},
                            "expires_after[seconds]": "5",
                        },
                    },
                    *(400, "expires_after[seconds]"),
                ),
                (
                    {
                        **{"files": {"file": ("a", b"x")}, "data": {"purpose": "batch"}},
                        "headers": {"origin": "http://evil"},
                    },
                    *(403, None),
                ),
            ]
            for arguments, status, param in refused:
                answer = await server.http.post("/v1/files", **arguments)
                assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), arguments

    asyncio.run(main())


def test_the_directory(tmp_path: Path, serving: Any) -> None:
    directory = tmp_path / "a" / "data"
    database = Database.open(str(directory))
    with pytest.raises(ServerConfigError, match="in use"):
        Database.open(str(directory))

    async def use() -> None:
        await database.run(lambda c: c.execute("SELECT 1"))
        with pytest.raises(ZeroDivisionError):
            await database.run(lambda c: [c.execute("DELETE FROM files"), 1 / 0])

    asyncio.run(use())
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {path.name for path in directory.iterdir()} >= {"fathom.sqlite3", "lock"}
    for path in directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    database.close()
    Database.open(str(directory)).close()
    (directory / "fathom.sqlite3").write_bytes(b"no database at all" * 100)
    with pytest.raises(ServerConfigError, match="cannot be used"):
        Database.open(str(directory))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ServerConfigError, match="--data-dir"):
        Database.open(str(tmp_path / "file"))


def test_what_is_deleted_is_gone_from_the_disk(tmp_path: Path) -> None:
    async def main() -> None:
        database = Database.open(str(tmp_path))
        files = files_module.Files(database, bytes_per_owner=2**30)

        def traces() -> int:
            return sum(path.read_bytes().count(b"FILECANARY") for path in tmp_path.iterdir())

        kept = await files.add("k", "kept", b"x")
        file = await files.add("k", "gone", b"FILECANARY" * 200_000)
        assert traces() > 190_000, "some stand across two pages"
        await files.delete("k", file.id)
        assert traces() == 0
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 400_000
        assert await files.read_all("k", kept.id) == b"x"
        database.close()

    asyncio.run(main())
