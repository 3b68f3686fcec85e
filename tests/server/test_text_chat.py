"""`fathom chat` against a small scripted HTTP server."""

import io
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from server.chat import Chat, ChatError, Connection, main, printable


class Scripted(ThreadingHTTPServer):
    """Answers each chat request with the next script: SSE lines, or (status, body)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.scripts: list[Any] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.hung_up = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Scripted

    def log_message(self, format: str, *args: Any) -> None:
        del format, args

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        self._send(200, json.dumps({"data": [{"id": "deep"}]}).encode())

    def do_POST(self) -> None:
        self.server.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        script = self.server.scripts.pop(0)
        if isinstance(script, tuple):
            self._send(*script)
            return
        self.send_response(200)
        self.end_headers()
        try:
            for line in script:
                self.wfile.write(f"{line}\n\n".encode())
                self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            self.server.hung_up.set()

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    server = Scripted()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def delta(finish: str | None = None, **parts: str) -> str:
    return "data: " + json.dumps({"choices": [{"index": 0, "delta": parts, "finish_reason": finish}]})


def answer(text: str) -> list[str]:
    return [": keep-alive", delta(content=text), delta("stop"), "data: [DONE]"]


def run(monkeypatch: pytest.MonkeyPatch, typed: str, *flags: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    monkeypatch.delenv("FATHOM_API_KEY", raising=False)
    return main(flags)


def test_a_conversation(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.scripts = [
        [delta(role="assistant"), delta(reasoning_content="hmm"), delta(content="Hé"), *answer("llo")],
        answer("again"),
        answer("fresh"),
    ]
    typed = "hi\n\nand?\n/reset\n/think off\n/nonsense\nnew\n/exit\nnever\n"
    assert run(monkeypatch, typed, "--url", scripted.url, "--system", "s", "--max-tokens", "9") == 0
    out = capsys.readouterr().out
    assert "hmm\n\nHéllo\n" in out
    assert "/think on|off" in out
    system, hi = {"role": "system", "content": "s"}, {"role": "user", "content": "hi"}
    said = {"role": "assistant", "content": "Héllo"}
    assert [r["messages"] for r in scripted.requests] == [
        [system, hi],
        [system, hi, said, {"role": "user", "content": "and?"}],
        [system, {"role": "user", "content": "new"}],
    ]
    assert [r["thinking"]["type"] for r in scripted.requests] == ["enabled", "enabled", "disabled"]
    assert all(r["stream"] is True and r["model"] == "deep" and r["max_tokens"] == 9 for r in scripted.requests)


def test_errors_are_sentences_and_leave_no_trace(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = {"error": {"message": "too long\x1b[2J", "type": "x"}}
    scripted.scripts = [
        (400, json.dumps(error).encode()),
        (502, b"<html>"),
        [delta(reasoning_content="x"), "data: " + json.dumps(error)],
        [delta(reasoning_content="x")],
        answer("ok"),
    ]
    assert run(monkeypatch, "a\nb\nc\nd\ne\n", "--url", scripted.url, "--model", "m") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fathom chat: too long[2J (HTTP 400)"
    assert "not its protocol" in lines[1]
    assert lines[2] == "fathom chat: too long[2J"
    assert "before the answer was complete" in lines[3]
    assert scripted.requests[-1]["messages"] == [{"role": "user", "content": "e"}]


def test_nobody_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{free.getsockname()[1]}"
        assert run(monkeypatch, "", "--url", url) == 1
    assert "Is `fathom serve` running there?" in capsys.readouterr().err
    for bad in ("ftp://x", "http://", "http://x:port"):
        with pytest.raises(ChatError, match="not an address"):
            Connection(bad, None)


def test_the_key_file(scripted: Scripted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("# mine\n\nsecret-1\n")
    assert run(monkeypatch, "", "--url", scripted.url + "/v1/", "--api-key-file", str(path)) == 0
    assert scripted.keys == ["Bearer secret-1"]
    path.write_text("# nothing\n")
    assert run(monkeypatch, "", "--url", scripted.url, "--api-key-file", str(path)) == 1


class Impatient(io.StringIO):
    """Presses Ctrl-C when `word` has been written."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word = word

    def write(self, text: str) -> int:
        written = super().write(text)
        if text == self.word:
            raise KeyboardInterrupt
        return written


def test_ctrl_c_stops_the_answer_and_hangs_up(scripted: Scripted) -> None:
    def endless() -> Iterator[str]:
        yield delta(content="some")
        yield delta(content="thing")
        while True:
            yield delta(content="x" * 1000)

    scripted.scripts = [endless(), [delta(reasoning_content="thing"), *answer("never")]]
    out = Impatient("thing")
    chat = Chat(Connection(scripted.url, None), "m", out)
    chat.ask("hi")
    assert out.getvalue() == "something\n[stopped]\n"
    assert scripted.hung_up.wait(5)
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "something"}]
    assert chat.messages == said
    # Stopped before any content: the turn is forgotten.
    chat.ask("more")
    assert chat.messages == said


def test_colors_end_and_control_characters_do_not_pass(scripted: Scripted) -> None:
    scripted.scripts = [[delta(reasoning_content="a\x1b]0;x\x07"), delta(content="b\r\x9bc\t"), *answer("\n")]]
    out = io.StringIO()
    Chat(Connection(scripted.url, None), "m", out, color=True).ask("hi")
    assert out.getvalue() == "\x1b[2ma]0;x\x1b[0m\n\nbc\t\n\x1b[0m\n"
    assert printable("é\u200d😀\x00\x7f") == "é\u200d😀"
