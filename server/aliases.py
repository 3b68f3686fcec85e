"""Other spellings of this server's paths: one table, applied before anything else looks at the path.

DeepSeek's API has no `/v1` in its paths, a `/beta` base for its beta features and an `/anthropic` base; NIM, vLLM and
SGLang have names of their own for probes and token routes. Only exact paths and the listed prefixes are rewritten.
"""

from typing import Literal

Dialect = Literal["openai", "deepseek"]

_DEEPSEEK = {
    base + path: "/v1" + path
    for base in ("", "/beta", "/beta/v1")
    for path in ("/chat/completions", "/completions", "/responses", "/models")
}
_DEEPSEEK_PREFIXES = {
    base + path: "/v1" + path for base in ("", "/beta", "/beta/v1") for path in ("/models/", "/responses/")
}
_OTHERS = {
    "/files": "/v1/files",
    "/batches": "/v1/batches",
    "/anthropic/v1/messages": "/v1/messages",
    "/anthropic/v1/messages/count_tokens": "/v1/messages/count_tokens",
    "/anthropic/v1/models": "/v1/models",
    "/v1/user/balance": "/user/balance",
    "/v1/tokenize": "/tokenize",
    "/v1/detokenize": "/detokenize",
    "/v1/render": "/render",
    "/v1/health/live": "/health/live",
    "/v1/health/ready": "/health/ready",
    "/ready": "/health/ready",
    "/ping": "/health",
}
_OTHER_PREFIXES = {
    "/files/": "/v1/files/",
    "/batches/": "/v1/batches/",
    "/anthropic/v1/models/": "/v1/models/",
}

ALIASES = _DEEPSEEK | _OTHERS
PREFIXES = _DEEPSEEK_PREFIXES | _OTHER_PREFIXES


def canonical(path: str) -> tuple[str, Dialect]:
    """The path that the routes know, and whose spelling the client used."""
    dialect: Dialect = "deepseek" if path in _DEEPSEEK else "openai"
    if path in ALIASES:
        return ALIASES[path], dialect
    for prefix, target in PREFIXES.items():
        if path.startswith(prefix):
            return target + path[len(prefix) :], "deepseek" if prefix in _DEEPSEEK_PREFIXES else "openai"
    return path, dialect
