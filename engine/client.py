"""The server's view of an engine. Routes and generation know this interface only, never a transport."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from engine.messages import (
    AddRequest,
    EngineInfo,
    EngineStats,
    FinishReason,
    LogprobRow,
    PromptLogprobColumns,
    RequestError,
)


class EngineDeadError(RuntimeError):
    """The engine is gone; the text says why and may be shown to an operator, not to a client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """News of one request: tokens since the last one and, once, how it ended."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    cached_tokens: int = 0
    miss_reason: str | None = None
    """Why no more of the prompt was cached; None when all that could be expected was."""
    logprobs: tuple[LogprobRow, ...] | None = None
    prompt_logprobs: PromptLogprobColumns | None = None
    """Once, beside the first token, when they were asked for."""
    error: RequestError | None = None
    queued_seconds: float = 0.0


def joined(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """Several outputs of one request, in order, as one."""
    last = outputs[-1]
    rows = [row for output in outputs for row in output.logprobs or ()]
    return replace(
        last,
        token_ids=tuple(token_id for output in outputs for token_id in output.token_ids),
        cached_tokens=max(output.cached_tokens for output in outputs),
        miss_reason=next((o.miss_reason for o in outputs if o.miss_reason is not None), None),
        logprobs=tuple(rows) if any(output.logprobs is not None for output in outputs) else None,
        prompt_logprobs=next((o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None), None),
        queued_seconds=max(output.queued_seconds for output in outputs),
    )


class EngineClient(Protocol):
    """One engine. All methods are called on the server's event loop."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def stats(self) -> EngineStats:
        """The newest statistics frame."""
        ...

    @property
    def dead_reason(self) -> str | None:
        """None while the engine lives."""
        ...

    def seconds_since_progress(self, now: float) -> float:
        """Age of the newest frame whose step counter moved, or of the newest frame at all when the engine is idle."""
        ...

    def submit(self, request: AddRequest) -> AsyncIterator[RequestOutput]:
        """Send a request; the iterator ends after the output with a finish reason. What came since the last output was
        asked for is one output.

        Closing the iterator early aborts the request. Raises EngineDeadError when the engine is dead or dies.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Idempotent; unknown ids are ignored."""
        ...

    async def close(self) -> None: ...
