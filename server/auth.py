"""API keys: who may ask, decided on digests, and the salt that keeps one key's cache apart from another's."""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from server.config import ServerConfigError

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
"""Exact paths that need no key, after other spellings of them (server.aliases) have been replaced."""

ANONYMOUS = "anonymous"
SHORTEST_KEY = 8


class KeyRing:
    """The keys this server accepts. Only SHA-256 digests are kept."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in dict.fromkeys(keys)]
        self._secret = secrets.token_bytes(32)

    def __len__(self) -> int:
        return len(self._digests)

    def identify(self, headers: list[tuple[bytes, bytes]]) -> str | None:
        """Id of the key in `Authorization: Bearer` or `x-api-key`; None when there is none that fits.

        A server without keys knows everybody as "anonymous". All keys are compared, whichever fits.
        """
        if not self._digests:
            return ANONYMOUS
        presented = _presented(headers)
        if presented is None:
            return None
        digest = hashlib.sha256(presented).digest()
        found = None
        for known in self._digests:
            if hmac.compare_digest(known, digest):
                found = known
        return None if found is None else found.hex()[:8]

    def cache_salt(self, key_id: str, client_salt: str) -> str:
        """A salt that two keys never share, whatever the clients send (hex, 128 bits)."""
        message = f"{key_id}\0{client_salt}".encode("utf-8", "surrogatepass")
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()[:32]


def _presented(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    # Two different credentials in one request are an attempt to confuse somebody: none of them counts.
    found = set()
    for name, value in headers:
        if name == b"authorization":
            scheme, _, token = value.strip().partition(b" ")
            found.add(token.strip() if scheme.lower() == b"bearer" else b"")
        elif name == b"x-api-key":
            found.add(value.strip())
    return found.pop() if len(found) == 1 else None


def load_keys(key_file: str | None) -> KeyRing:
    """Keys of the file and of FATHOM_API_KEY.

    Raises:
        ServerConfigError: the file is unreadable or empty, or a key is too short to be one.
    """
    keys = []
    if key_file is not None:
        try:
            text = Path(key_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ServerConfigError(f"--api-key-file {key_file}: {_reason(error)}") from None
        keys = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise ServerConfigError(f"--api-key-file {key_file}: no key in it")
    from_environment = os.environ.get("FATHOM_API_KEY", "").strip()
    if from_environment:
        keys.append(from_environment)
    if any(len(key) < SHORTEST_KEY for key in keys):
        raise ServerConfigError(f"an API key must have at least {SHORTEST_KEY} characters")
    return KeyRing(keys)


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "not UTF-8 text"
