"""Reading a multipart/form-data body that is already in memory and bounded. Nothing is spooled to disk."""

from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from server.errors import ApiError, bad_request

MOST_PARTS = 32
LONGEST_VALUE = 4096
"""Bytes of a part that is no file."""


@dataclass(frozen=True, slots=True)
class Form:
    fields: dict[str, str]
    files: dict[str, tuple[str, bytes]]
    """Name of the part to the client's file name and the contents."""


@dataclass(slots=True)
class _Part:
    headers: dict[bytes, bytes] = field(default_factory=dict)
    data: list[bytes] = field(default_factory=list)


def read_form(content_type: bytes, body: bytes) -> Form:
    """The parts of `body`.

    Raises:
        ApiError: 415 for another content type, 400 for a body that does not follow it.
    """
    media_type, options = parse_options_header(content_type.decode("latin-1"))
    boundary = options.get(b"boundary", b"")
    if media_type != b"multipart/form-data" or not boundary:
        message = "The request body must have the content type multipart/form-data, with a boundary."
        raise ApiError(415, message, code="unsupported_media_type")
    reader = _Reader()
    try:
        parser = MultipartParser(boundary, reader.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise _malformed() from None
    if not reader.ended:
        raise _malformed()
    fields: dict[str, str] = {}
    files: dict[str, tuple[str, bytes]] = {}
    for part in reader.parts:
        disposition, options = parse_options_header(part.headers.get(b"content-disposition", b"").decode("latin-1"))
        if disposition != b"form-data" or b"name" not in options:
            raise _malformed()
        name, data = options[b"name"].decode("utf-8", "replace"), b"".join(part.data)
        if b"filename" in options:
            files[name] = (options[b"filename"].decode("utf-8", "replace"), data)
        elif len(data) <= LONGEST_VALUE:
            fields[name] = data.decode("utf-8", "replace")
        else:
            raise bad_request(f"A field of the form has more than {LONGEST_VALUE} bytes.")
    return Form(fields, files)


class _Reader:
    """Collects what the parser calls out."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self.ended = False
        self._name = b""
        self._value = b""

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.parts) >= MOST_PARTS:
            raise FormParserError("too many parts")
        self.parts.append(_Part())

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self.parts[-1].headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].data.append(data[start:end])

    def _end(self) -> None:
        self.ended = True


def _malformed() -> ApiError:
    return bad_request("The request body is not valid multipart/form-data.", code="invalid_form")
