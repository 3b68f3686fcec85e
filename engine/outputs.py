"""The columns of a `StepOutputs` frame: filled row by row in the engine, split into rows again in the client."""

from collections.abc import Iterator, Sequence

from engine.client import RequestOutput
from engine.messages import (
    EngineStats,
    FinishReason,
    LogprobRow,
    PromptLogprobColumns,
    RequestError,
    StepOutputs,
    pack_ids,
    unpack_ids,
)
from engine.plan import PromptLogprobs, TokenLogprobs
from engine.request import Request


class OutputColumns:
    """News since the last frame; a request has at most one row in it."""

    def __init__(self) -> None:
        self._request_ids: list[str] = []
        self._cu_tokens: list[int] = [0]
        self._token_ids: list[int] = []
        self._finish: list[FinishReason | None] = []
        self._stop_ids: list[int | None] = []
        self._cached_tokens: list[int] = []
        self._logprobs: list[tuple[LogprobRow, ...] | None] = []
        self._errors: list[RequestError | None] = []
        self._queued_seconds: list[float] = []
        self._miss_reasons: list[str | None] = []
        self._prompt_logprobs: dict[str, PromptLogprobColumns] = {}

    def __len__(self) -> int:
        return len(self._request_ids)

    def add(self, request: Request, token_ids: Sequence[int] = (), logprobs: TokenLogprobs | None = None) -> None:
        """A row with the tokens that are new and the request's end, if it has come."""
        self._append(
            request.request_id,
            token_ids,
            finish=request.finish_reason,
            stop_id=request.stop_token_id,
            cached_tokens=request.num_cached_tokens,
            logprobs=None if logprobs is None else (_row(logprobs),),
            error=request.error,
            queued_seconds=request.queued_seconds,
            # What other tenants have cached is not this one's business.
            miss_reason="cold" if request.miss_reason == "salt" else request.miss_reason,
        )

    def add_prompt_logprobs(self, request_id: str, chunks: Sequence[PromptLogprobs]) -> None:
        """Beside the row of the request's first token; `chunks` cover its prompt in order."""
        self._prompt_logprobs[request_id] = _columns(chunks)

    def refuse(self, request_id: str, error: RequestError | None) -> None:
        """A row for a request that never came to be; without an error it was aborted."""
        self._append(request_id, (), finish="abort" if error is None else "error", error=error)

    def _append(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        finish: FinishReason | None,
        stop_id: int | None = None,
        cached_tokens: int = 0,
        logprobs: tuple[LogprobRow, ...] | None = None,
        error: RequestError | None = None,
        queued_seconds: float = 0.0,
        miss_reason: str | None = None,
    ) -> None:
        self._request_ids.append(request_id)
        self._token_ids.extend(token_ids)
        self._cu_tokens.append(len(self._token_ids))
        self._finish.append(finish)
        self._stop_ids.append(stop_id)
        self._cached_tokens.append(cached_tokens)
        self._logprobs.append(logprobs)
        self._errors.append(error)
        self._queued_seconds.append(queued_seconds)
        self._miss_reasons.append(miss_reason)

    def pack(self, stats: EngineStats) -> StepOutputs:
        return StepOutputs(
            request_ids=tuple(self._request_ids),
            cu_tokens=tuple(self._cu_tokens),
            token_ids=pack_ids(self._token_ids),
            finish=tuple(self._finish),
            stop_ids=tuple(self._stop_ids),
            cached_tokens=tuple(self._cached_tokens),
            logprobs=tuple(self._logprobs),
            errors=tuple(self._errors),
            queued_seconds=tuple(self._queued_seconds),
            stats=stats,
            miss_reasons=tuple(self._miss_reasons),
            prompt_logprobs=self._prompt_logprobs,
        )


def split(outputs: StepOutputs) -> Iterator[tuple[str, RequestOutput]]:
    """Rows of a frame as (request id, output)."""
    token_ids: list[int] = unpack_ids(outputs.token_ids).tolist()
    for i, request_id in enumerate(outputs.request_ids):
        yield (
            request_id,
            RequestOutput(
                token_ids=tuple(token_ids[outputs.cu_tokens[i] : outputs.cu_tokens[i + 1]]),
                finish_reason=outputs.finish[i],
                stop_token_id=outputs.stop_ids[i],
                cached_tokens=outputs.cached_tokens[i],
                miss_reason=outputs.miss_reasons[i] if outputs.miss_reasons else None,
                logprobs=outputs.logprobs[i],
                prompt_logprobs=outputs.prompt_logprobs.get(request_id),
                error=outputs.errors[i],
                queued_seconds=outputs.queued_seconds[i],
            ),
        )


def _row(logprobs: TokenLogprobs) -> LogprobRow:
    return LogprobRow(logprobs.logprob, logprobs.top_ids, logprobs.top_logprobs)


def _columns(chunks: Sequence[PromptLogprobs]) -> PromptLogprobColumns:
    def packed(column: str, dtype: str) -> bytes:
        return b"".join(getattr(chunk, column).astype(dtype).tobytes() for chunk in chunks)

    return PromptLogprobColumns(
        num_top=chunks[0].top_ids_NK.shape[1] if chunks else 0,
        logprobs=packed("logprobs_N", "<f4"),
        ranks=packed("ranks_N", "<i4"),
        top_ids=packed("top_ids_NK", "<i4"),
        top_logprobs=packed("top_logprobs_NK", "<f4"),
    )
