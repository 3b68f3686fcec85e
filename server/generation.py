"""One request's life in the API process: submit, collect, detokenize, parse, stop, count, abort."""

from collections import deque
from collections.abc import AsyncGenerator, Sequence
from typing import Literal
from uuid import uuid4

import msgspec
import numpy as np

from engine.client import EngineClient, EngineDeadError, RequestOutput
from engine.messages import (
    AddRequest,
    Grammar,
    LogprobRow,
    PromptLogprobColumns,
    RequestError,
    SamplingParams,
    pack_ids,
)
from server.text.calls import CallDelta as CallDelta
from server.text.parser import Delta, OutputParser, StartsIn
from server.text.stop import StopMatcher
from server.text.tokenizer import Tokenizer

ParseMode = Literal["chat", "raw"]
FinalReason = Literal["stop", "length", "tool_calls", "error"]

LEAST_LOGPROB = -9999.0
"""Stands for anything less likely, minus infinity too: JSON has no word for that."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    """Every token the model made, the one that stopped it included."""
    reasoning_tokens: int
    cached_tokens: int
    miss_reason: str | None = None
    """Why no more of the prompt was cached; None when all that could be expected was."""


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token_id: int
    token: str
    bytes: bytes
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token_id: int
    token: str
    """The token's own text: U+FFFD where it holds part of a character; `bytes` is exact."""
    bytes: bytes
    logprob: float
    top: tuple[TopLogprob, ...]
    """The likeliest tokens, best first."""
    reasoning: bool
    text_offset: int
    """Characters of this part (reasoning or content) in front of the token's text."""


class GenerationEvent(msgspec.Struct, frozen=True, kw_only=True):
    """News of one answer: reasoning goes before content, content before calls.

    The last event of a stream has a finish reason and the usage.
    """

    reasoning: str = ""
    content: str = ""
    calls: tuple[CallDelta, ...] = ()
    token_ids: tuple[int, ...] = ()
    """All tokens of this step, also those whose text is still held back or never shown."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens whose text is out now. Empty unless asked for; markers and the stop token have none."""
    finish_reason: FinalReason | None = None
    stop_reason: str | int | None = None
    """The stop string or the stop token id that ended the answer; None for the end of sequence token."""
    usage: Usage | None = None
    prompt_logprobs: PromptLogprobColumns | None = None
    """Once, beside the first token, when they were asked for."""
    error: RequestError | None = None
    """Set with finish reason "error"."""
    queued_seconds: float = 0.0


class Generator:
    """Makes answers with one engine. Safe for any number of requests at once on one event loop."""

    def __init__(self, client: EngineClient, tokenizer: Tokenizer) -> None:
        self._client = client
        self._tokenizer = tokenizer

    async def start(
        self,
        prompt_ids: np.ndarray | Sequence[int],
        sampling: SamplingParams,
        *,
        parse: ParseMode = "chat",
        starts_in: StartsIn = "content",
        continues: bool = False,
        tools: bool = False,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        cache_salt: str = "",
        grammar: Grammar | None = None,
        priority: int = 0,
        deadline: float | None = None,
        arrival_time: float = 0.0,
        trace_id: str | None = None,
        tenant: str = "",
        skip_special: bool = True,
        snapshot_positions: Sequence[int] = (),
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Generate; one event per engine output, the last one with `finish_reason` and `usage`.

        The request is submitted when the first event is asked for. Closing the iterator early aborts it.
        parse "chat" splits reasoning from content (`starts_in` and `continues` come from the Prompt) and, with `tools`,
        both from tool calls, whose arguments are known to be JSON when there is a `grammar`; "raw" makes all of it
        content. `stop` strings end the answer before themselves (behind with `include_stop`); they are looked for in
        content, not in reasoning or calls, and not within the first `min_tokens` tokens. An answer that stopped inside
        an argument of a call ends with "length". Without `skip_special` BOS and its like are text too. Failures of the
        request and of the engine come as a last event with `error`; nothing is raised for them.
        """
        answer = Answer(
            OutputParser(
                self._tokenizer,
                starts_in=starts_in if parse == "chat" else "raw",
                continues=continues,
                tools=tools,
                streams_json=grammar is not None,
                skip_special=skip_special,
            ),
            self._tokenizer,
            hidden_ids=self._tokenizer.hidden_ids if skip_special else frozenset(),
            num_prompt_tokens=len(prompt_ids),
            sampling=sampling,
            stop=stop,
            include_stop=include_stop,
            eos_token_id=self._client.info.eos_token_id,
        )
        request = AddRequest(
            request_id=uuid4().hex,
            prompt_token_ids=pack_ids(np.asarray(prompt_ids)),
            sampling=sampling,
            grammar=grammar,
            priority=priority,
            deadline=deadline,
            cache_salt=cache_salt,
            arrival_time=arrival_time,
            trace_id=trace_id,
            tenant=tenant,
            snapshot_positions=pack_ids(list(snapshot_positions)),
        )
        outputs = self._client.submit(request)
        over = False
        try:
            async for output in outputs:
                event = answer.add(output)
                over = output.finish_reason is not None
                yield event
                if event.finish_reason is not None:
                    return
            over = True
            yield answer.fail(RequestError("internal", "The engine ended this request without an answer."))
        except EngineDeadError:
            over = True
            yield answer.fail(RequestError("internal", "The engine stopped while it worked on this request."))
        finally:
            if isinstance(outputs, AsyncGenerator):
                await outputs.aclose()
            elif not over:
                self._client.abort(request.request_id)


class Answer:
    """Engine outputs of one request to events; no input or output of its own."""

    def __init__(
        self,
        parser: OutputParser,
        tokenizer: Tokenizer,
        *,
        hidden_ids: frozenset[int],
        num_prompt_tokens: int,
        sampling: SamplingParams,
        stop: Sequence[str],
        include_stop: bool,
        eos_token_id: int,
    ) -> None:
        self._parser = parser
        self._tokenizer = tokenizer
        self._hidden_ids = hidden_ids
        self._num_prompt_tokens = num_prompt_tokens
        self._min_tokens = sampling.min_tokens
        self._matcher = StopMatcher(stop) if stop else None
        self._include_stop = include_stop
        self._eos_token_id = eos_token_id
        self._num_tokens = 0
        self._cached_tokens = 0
        self._miss_reason: str | None = None
        self._content_over = False
        """A block of calls has begun."""
        self._logprobs = _LogprobQueue(tokenizer) if sampling.logprobs is not None else None

    def add(self, output: RequestOutput) -> GenerationEvent:
        """The event of one engine output."""
        self._cached_tokens = output.cached_tokens or self._cached_tokens
        self._miss_reason = output.miss_reason or self._miss_reason
        token_ids, visible = output.token_ids, output.token_ids
        if output.stop_token_id is not None and not self._include_stop:
            visible = visible[:-1]
        if self._matcher is None and self._logprobs is None:
            self._num_tokens += len(token_ids)
            news = self._parser.push(visible)
        else:
            # One by one: what follows a stop string is no part of the answer, however many tokens came at once.
            pieces = []
            for n, token_id in enumerate(visible):
                pieces.append(self._push_one(token_id, output.logprobs[n] if output.logprobs is not None else None))
                if self._stopped:
                    token_ids = token_ids[: n + 1]
                    break
            else:
                self._num_tokens += len(token_ids) - len(visible)
            news = _joined(pieces)
        if output.finish_reason is None and not self._stopped:
            return GenerationEvent(
                reasoning=news.reasoning,
                content=news.content,
                calls=news.calls,
                token_ids=token_ids,
                logprobs=self._logprobs.take() if self._logprobs is not None else (),
                prompt_logprobs=output.prompt_logprobs,
                queued_seconds=output.queued_seconds,
            )
        return self._end(output, news, token_ids)

    def fail(self, error: RequestError) -> GenerationEvent:
        """The last event of a request that the engine gave up."""
        return GenerationEvent(finish_reason="error", error=error, usage=self._usage())

    @property
    def _stopped(self) -> bool:
        return self._matcher is not None and self._matcher.matched is not None

    def _push_one(self, token_id: int, row: LogprobRow | None) -> Delta:
        self._num_tokens += 1
        parser = self._parser
        hidden = parser.in_calls or token_id in self._hidden_ids or parser.is_marker(token_id)
        if self._logprobs is not None and row is not None and not hidden:
            self._logprobs.add(token_id, row, reasoning=parser.in_reasoning)
        return self._deliver(parser.push((token_id,)))

    def _deliver(self, news: Delta) -> Delta:
        """Content goes through the stop matcher; the log probabilities follow the text that comes out."""
        content = news.content
        if self._matcher is not None and content and self._num_tokens > self._min_tokens:
            content = self._matcher.push(content)
            if self._matcher.matched is not None and self._include_stop:
                content += self._matcher.matched
        if self._parser.in_calls and not self._content_over:
            # No more content comes: what could have been the beginning of a stop string is none.
            self._content_over = True
            if self._matcher is not None and not self._stopped:
                content += self._matcher.flush()
        if self._logprobs is not None:
            self._logprobs.move(reasoning=len(news.reasoning), content=len(news.content), delivered=len(content))
            if self._content_over:
                self._logprobs.drop_waiting()
        return Delta(news.reasoning, content, () if self._stopped else news.calls)

    def _end(self, output: RequestOutput, news: Delta, token_ids: tuple[int, ...]) -> GenerationEvent:
        if not self._stopped:
            news = _joined([news, self._deliver(self._parser.finish(cut=output.finish_reason != "stop"))])
        content = news.content
        if not self._stopped:
            content += self._matcher.flush() if self._matcher is not None else ""
            if self._logprobs is not None:
                self._logprobs.release_all()
        finish: FinalReason
        error: RequestError | None = None
        stop_reason: str | int | None = None
        if self._stopped:
            assert self._matcher is not None
            finish, stop_reason = "stop", self._matcher.matched
        elif output.finish_reason in ("stop", "length"):
            finish = output.finish_reason
            stop_reason = output.stop_token_id if output.stop_token_id != self._eos_token_id else None
            if finish == "stop" and self._parser.incomplete:
                # Only a stop token that the client asked for may stand in the middle of an argument.
                finish = "length" if stop_reason is None else "stop"
            elif finish == "stop" and self._parser.num_calls:
                finish = "tool_calls"
        else:
            finish = "error"
            error = output.error or RequestError("internal", "The request was aborted.")
        return GenerationEvent(
            reasoning=news.reasoning,
            content=content,
            calls=news.calls,
            token_ids=token_ids,
            logprobs=self._logprobs.take() if self._logprobs is not None else (),
            finish_reason=finish,
            stop_reason=stop_reason,
            usage=self._usage(),
            prompt_logprobs=output.prompt_logprobs,
            error=error,
            queued_seconds=output.queued_seconds,
        )

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_tokens,
            reasoning_tokens=self._parser.num_reasoning_tokens,
            cached_tokens=self._cached_tokens,
            miss_reason=self._miss_reason,
        )


def _joined(pieces: Sequence[Delta]) -> Delta:
    """What several pushes add, as one. Pieces of one call stay apart."""
    return Delta(
        "".join([p.reasoning for p in pieces]),
        "".join([p.content for p in pieces]),
        tuple(call for p in pieces for call in p.calls),
    )


class _LogprobQueue:
    """Log probabilities wait here until the text of their token is delivered, and are dropped if it never is."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._waiting: deque[TokenLogprob] = deque()
        self._released: list[TokenLogprob] = []
        self._num_reasoning = 0
        self._num_content = 0
        self._num_delivered = 0

    def add(self, token_id: int, row: LogprobRow, *, reasoning: bool) -> None:
        """The next token, before its text is parsed."""
        raw = self._tokenizer.bytes_table[token_id]
        self._waiting.append(
            TokenLogprob(
                token_id=token_id,
                token=raw.decode("utf-8", "replace"),
                bytes=raw,
                logprob=max(row.logprob, LEAST_LOGPROB),
                top=tuple(map(self._top, row.top_ids, row.top_logprobs)),
                reasoning=reasoning,
                text_offset=self._num_reasoning if reasoning else self._num_content,
            )
        )

    def move(self, *, reasoning: int, content: int, delivered: int) -> None:
        """So many more characters were parsed, and so many of the content delivered."""
        self._num_reasoning += reasoning
        self._num_content += content
        self._num_delivered += delivered
        waiting = self._waiting
        while waiting and (waiting[0].reasoning or waiting[0].text_offset < self._num_delivered):
            self._released.append(waiting.popleft())

    def drop_waiting(self) -> None:
        self._waiting.clear()

    def release_all(self) -> None:
        self._released.extend(self._waiting)
        self._waiting.clear()

    def take(self) -> tuple[TokenLogprob, ...]:
        released = tuple(self._released)
        self._released.clear()
        return released

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        raw = self._tokenizer.bytes_table[token_id]
        return TopLogprob(
            token_id=token_id, token=raw.decode("utf-8", "replace"), bytes=raw, logprob=max(logprob, LEAST_LOGPROB)
        )
