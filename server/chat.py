"""`fathom chat`: talk to a running server from a terminal. Standard library only."""

import argparse
import contextlib
import http.client
import importlib
import json
import os
import ssl
import sys
import unicodedata
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_SECONDS = 10.0
HELP = """/think on|off   let the model think before it answers, or not
/reset          forget the conversation
/exit           leave (as does Ctrl-D); Ctrl-C stops an answer"""

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class ChatError(Exception):
    """What went wrong, as one sentence for the person at the terminal."""


class Connection:
    """Requests to one server; streams hold a connection of their own, so closing it aborts the answer."""

    def __init__(self, url: str, api_key: str | None) -> None:
        """Raises ChatError for a URL that is none."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ChatError(f"{url} is not an address of a server; one looks like {DEFAULT_URL}.")
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, port
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self._base}"
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def models(self) -> list[str]:
        """Names of the models that are served."""
        with self._request("GET", "/v1/models", None) as answer:
            return [str(entry["id"]) for entry in _json(answer.read())["data"]]

    def chat(self, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The chunks of a streamed answer. Closing the iterator closes the connection."""
        with self._request("POST", "/v1/chat/completions", {**body, "stream": True}) as answer:
            while line := answer.readline():
                data = line.decode("utf-8", "replace").strip()
                if not data.startswith("data:"):
                    continue
                data = data.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                chunk = _json(data)
                if "error" in chunk:
                    raise ChatError(_error_text(chunk))
                yield chunk
            raise ChatError("The server closed the stream before the answer was complete.")

    @contextlib.contextmanager
    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> Iterator[http.client.HTTPResponse]:
        connection = (
            http.client.HTTPSConnection(self._host, self._port, timeout=CONNECT_SECONDS)
            if self._secure
            else http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_SECONDS)
        )
        try:
            connection.connect()
            # The first token may take as long as the prompt needs.
            connection.sock.settimeout(None)
            encoded = None if body is None else json.dumps(body).encode()
            connection.request(method, self._base + path, encoded, self._headers)
            answer = connection.getresponse()
            if answer.status != http.client.OK:
                raise ChatError(f"{_error_text(_json(answer.read()))} (HTTP {answer.status})")
            yield answer
        except ssl.SSLError as error:
            raise ChatError(f"No secure connection to {self.url}: {error.reason}.") from error
        except (OSError, http.client.HTTPException) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
            raise ChatError(f"No answer from {self.url}: {reason}. Is `fathom serve` running there?") from error
        finally:
            connection.close()


class Chat:
    """One conversation: what was said so far, and how the next answer is shown."""

    def __init__(
        self,
        connection: Connection,
        model: str,
        out: TextIO,
        *,
        system: str | None = None,
        max_tokens: int | None = None,
        color: bool = False,
    ) -> None:
        self._connection = connection
        self._model = model
        self._out = out
        self._system = system
        self._max_tokens = max_tokens
        self._color = color
        self.thinking = True
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def ask(self, text: str) -> None:
        """Send `text`, show the answer as it comes and remember both.

        Ctrl-C stops the answer; what came of it is remembered. After an error nothing is. Raises ChatError.
        """
        self.messages.append({"role": "user", "content": text})
        content: list[str] = []
        answered = False
        try:
            with contextlib.closing(self._deltas()) as deltas:
                try:
                    self._show(deltas, content)
                except KeyboardInterrupt:
                    self._write(self._plain() + "\n[stopped]")
            answered = bool(content)
        finally:
            self._write(self._plain() + "\n")
            if answered:
                self.messages.append({"role": "assistant", "content": "".join(content)})
            else:
                self.messages.pop()

    def _deltas(self) -> Generator[tuple[str, str], None, None]:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": self.messages,
            "thinking": {"type": "enabled" if self.thinking else "disabled"},
        }
        if self._max_tokens is not None:
            body["max_tokens"] = self._max_tokens
        with contextlib.closing(self._connection.chat(body)) as chunks:
            for chunk in chunks:
                for choice in chunk.get("choices", []):
                    delta = choice.get("delta", {})
                    for part in ("reasoning_content", "content"):
                        if delta.get(part):
                            yield part, delta[part]
                    if choice.get("finish_reason") == "length":
                        yield "note", "\n[the answer reached its length limit]"

    def _show(self, deltas: Iterator[tuple[str, str]], content: list[str]) -> None:
        before = ""
        for part, text in deltas:
            if part != before:
                if before == "reasoning_content":
                    self._write(self._plain() + "\n\n")
                if part in ("reasoning_content", "note") and self._color:
                    self._write(_DIM)
                before = part
            if part == "content":
                content.append(text)
            self._write(printable(text))

    def _plain(self) -> str:
        return _PLAIN if self._color else ""

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def printable(text: str) -> str:
    """`text` without control characters: a model shall not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def main(argv: Sequence[str] | None = None) -> int:
    """`fathom chat`; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except ChatError as error:
        print(f"fathom chat: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fathom chat", description="Talk to a running server.", epilog=HELP)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--url", default=DEFAULT_URL, help=f"address of the server (default {DEFAULT_URL})")
    parser.add_argument("--model", help="name of the model; the first one served when absent")
    parser.add_argument("--api-key-file", type=Path, help="file with the API key; FATHOM_API_KEY when absent")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--max-tokens", type=int, help="most tokens of one answer")
    parser.add_argument("--no-thinking", action="store_true", help="begin with /think off")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    connection = Connection(arguments.url, _api_key(arguments.api_key_file))
    model = arguments.model
    if model is None:
        names = connection.models()
        if not names:
            raise ChatError(f"{connection.url} serves no model.")
        model = names[0]
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    chat = Chat(connection, model, sys.stdout, system=arguments.system, max_tokens=arguments.max_tokens, color=color)
    chat.thinking = not arguments.no_thinking
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # line editing in input()
        print(f"{model} at {connection.url}\n{HELP}\n")
    return _converse(chat, interactive)


def _converse(chat: Chat, interactive: bool) -> int:
    failed = False
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return 1 if failed else 0
        except KeyboardInterrupt:
            print()
            continue
        text = line.strip()
        if text == "/exit":
            return 1 if failed else 0
        try:
            if text.startswith("/"):
                print(_command(chat, text))
            elif text:
                chat.ask(text)
        except ChatError as error:
            failed = not interactive
            print(f"fathom chat: {error}", file=sys.stderr)


def _command(chat: Chat, text: str) -> str:
    match text.split():
        case ["/reset"]:
            chat.reset()
            return "[the conversation is forgotten]"
        case ["/think", ("on" | "off") as switch]:
            chat.thinking = switch == "on"
            return f"[thinking is {switch}]"
        case _:
            return HELP


def _api_key(path: Path | None) -> str | None:
    if path is None:
        return os.environ.get("FATHOM_API_KEY") or None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ChatError(f"The API key file {path} cannot be read: {error}.") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys or not keys[0].isascii():
        raise ChatError(f"The API key file {path} holds no key.")
    return keys[0]


def _json(raw: bytes | str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ChatError("The server answered with something that is not its protocol.")
    return value


def _error_text(body: dict[str, Any]) -> str:
    error = body.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return printable(str(message or "The server reported an error without a message."))
