"""The columns of a `StepOutputs` frame: filled row by row in the engine, split into rows again in the client."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.client import RequestOutput
from engine.kv.resume import MissReason
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Refused:
    """Stands in for a request that never came to be."""

    request_id: str
    error: RequestError | None
    """None: it was aborted."""
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    queued_seconds: float = 0.0
    miss_reason: MissReason | None = None

    @property
    def finish_reason(self) -> FinishReason:
        return "abort" if self.error is None else "error"


class OutputColumns:
    """News since the last frame; a request has at most one row in it, and does not change until the frame is packed."""

    def __init__(self) -> None:
        self._rows: list[Request | _Refused] = []
        self._cu_tokens: list[int] = [0]
        self._token_ids: list[int] = []
        self._logprobs: dict[int, TokenLogprobs] = {}
        """By row."""
        self._prompt_logprobs: dict[str, PromptLogprobColumns] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, request: Request, token_ids: Sequence[int] = (), logprobs: TokenLogprobs | None = None) -> None:
        """A row with the tokens that are new and the request's end, if it has come."""
        if logprobs is not None:
            self._logprobs[len(self._rows)] = logprobs
        self._rows.append(request)
        self._token_ids += token_ids
        self._cu_tokens.append(len(self._token_ids))

    def add_prompt_logprobs(self, request_id: str, chunks: Sequence[PromptLogprobs]) -> None:
        """Beside the row of the request's first token; `chunks` cover its prompt in order."""
        self._prompt_logprobs[request_id] = _columns(chunks)

    def refuse(self, request_id: str, error: RequestError | None) -> None:
        """A row for a request that never came to be; without an error it was aborted."""
        self._rows.append(_Refused(request_id=request_id, error=error))
        self._cu_tokens.append(len(self._token_ids))

    def pack(self, stats: EngineStats) -> StepOutputs:
        rows = self._rows
        logprobs: list[tuple[LogprobRow, ...] | None] = [None] * len(rows)
        for i, found in self._logprobs.items():
            logprobs[i] = (LogprobRow(found.logprob, found.top_ids, found.top_logprobs),)
        return StepOutputs(
            request_ids=tuple([row.request_id for row in rows]),
            cu_tokens=tuple(self._cu_tokens),
            token_ids=pack_ids(self._token_ids),
            finish=tuple([row.finish_reason for row in rows]),
            stop_ids=tuple([row.stop_token_id for row in rows]),
            cached_tokens=tuple([row.num_cached_tokens for row in rows]),
            logprobs=tuple(logprobs),
            errors=tuple([row.error for row in rows]),
            queued_seconds=tuple([row.queued_seconds for row in rows]),
            stats=stats,
            # What other tenants have cached is not this one's business.
            miss_reasons=tuple(["cold" if row.miss_reason == "salt" else row.miss_reason for row in rows]),
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
