"""What `fathom serve` lets the user say about the HTTP side; the engine's own flags stand in engine.config."""

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal

VERSION = "0.1.0"

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s,?#@]+")

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000


class ServerConfigError(ValueError):
    """Flags that cannot work together: one sentence that says what would work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Flags of `fathom serve` that the HTTP process reads."""

    host: str = DEFAULT_HOST
    """Address to listen on; anything but loopback needs an API key."""
    port: int = DEFAULT_PORT
    """TCP port; 0 takes a free one."""
    served_model_name: str | None = None
    """Name that clients send as `model`; the name of the model directory when absent."""
    effort_table: Literal["auto", "preview", "release"] = "auto"
    """Texts that tell the model how hard to think; auto: those of the checkpoint."""
    api_compat: Literal["openai", "deepseek"] = "openai"
    """deepseek: what api.deepseek.com does, with its forced sampling when thinking, its usage in streams and its error
    bodies."""
    api_key_file: str | None = None
    """File with one API key in each line; lines that start with # are skipped. FATHOM_API_KEY adds one more."""
    body_limit: int = 32 * 2**20
    """Largest request body; a million tokens of text take 4 to 8 MiB."""
    body_timeout: float = 60.0
    """Seconds for a client to send a whole request body."""
    header_timeout: float = 10.0
    """Seconds for a client to send a request head."""
    write_timeout: float = 60.0
    """Seconds after which a client that does not read its stream is cut off."""
    keep_alive_interval: float = 10.0
    """Seconds between comments in a stream that has nothing to say yet."""
    max_queued_requests: int = 2048
    """Requests that may wait for their first token; more get 503."""
    max_queued_tokens: int | None = None
    """Prompt tokens that may wait; None: sixteen contexts, a million at least."""
    max_requests_per_key: int | None = None
    """Requests of one API key in flight; more get 429. None: no bound."""
    replay_bytes: int = 64 * 2**20
    """Bytes of sampled turns that are remembered, so that a conversation goes on with the tokens it had; 0: none."""
    queue_timeout: float = 600.0
    """Seconds after which a request that has not started gets 503."""
    response_store_bytes: int = 256 * 2**20
    """Memory for answers of /v1/responses that clients may ask for again; the oldest go first. 0: keep none."""
    response_ttl: float = 86400.0
    """Seconds that such an answer is kept."""
    drain_timeout: float = 30.0
    """Seconds that running requests get to finish after SIGTERM."""
    progress_timeout: float = 30.0
    """Seconds without a step of the engine after which the server is not ready."""
    data_dir: str | None = None
    """Directory for files and batches, which then survive a restart; kept in memory and lost at the end when absent."""
    file_quota: int | None = None
    """Bytes that the files and batch results of one API key may take; None: 8 GiB in --data-dir, 256 MiB in memory."""
    cors_origin: str | None = None
    """Origins whose pages may call this server, separated by commas, or *; none when absent."""
    enable_docs: bool = False
    """Serve the OpenAPI document at /openapi.json and a page of it at /docs."""

    def check(self, *, num_keys: int) -> None:
        """Raise ServerConfigError for values out of range and for an open server without a key."""
        if not 0 <= self.port <= 65535:
            raise ServerConfigError(f"--port must be 0 to 65535, found {self.port}")
        for name in ("body_limit", "max_queued_requests", "max_queued_tokens", "max_requests_per_key", "file_quota"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ServerConfigError(f"--{name.replace('_', '-')} must be at least 1, found {value}")
        for name in ("replay_bytes", "response_store_bytes"):
            if getattr(self, name) < 0:
                raise ServerConfigError(f"--{name.replace('_', '-')} must not be negative, found {getattr(self, name)}")
        timeouts = ("body_timeout", "header_timeout", "write_timeout", "keep_alive_interval", "queue_timeout")
        for name in (*timeouts, "progress_timeout", "response_ttl"):
            if not getattr(self, name) > 0:
                raise ServerConfigError(f"--{name.replace('_', '-')} must be positive, found {getattr(self, name)}")
        if not self.drain_timeout >= 0:
            raise ServerConfigError(f"--drain-timeout must not be negative, found {self.drain_timeout}")
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ServerConfigError(f"--cors-origin: {origin!r} is no origin such as https://example.org:8443")
        if self.served_model_name is not None and not 0 < len(self.served_model_name) <= 200:
            raise ServerConfigError("--served-model-name must have 1 to 200 characters")
        if num_keys == 0 and not is_loopback(self.host):
            raise ServerConfigError(
                f"--host {self.host} is reachable from other machines and no API key is set: give --api-key-file FILE "
                "or FATHOM_API_KEY, or listen on 127.0.0.1"
            )

    @property
    def file_bytes_per_key(self) -> int:
        if self.file_quota is not None:
            return self.file_quota
        return 256 * 2**20 if self.data_dir is None else 8 * 2**30

    @property
    def cors_origins(self) -> tuple[str, ...]:
        return tuple(part.strip() for part in (self.cors_origin or "").split(",") if part.strip())


def is_loopback(host: str) -> bool:
    """True for `localhost` and loopback addresses; other names are taken as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
