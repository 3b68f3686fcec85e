"""The engine: hear, plan, run, commit, answer. One thread; messages come in through `inbox`."""

import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import NamedTuple

import msgspec

from engine.executor import Executor, StepError
from engine.grammar.compiler import COPY_BYTES, GrammarCompiler, GrammarError
from engine.grammar.matcher import GrammarMatcher
from engine.kv.hashing import PageKeys
from engine.messages import (
    PROTOCOL_VERSION,
    AbortRequest,
    AddRequest,
    EngineDead,
    EngineInfo,
    EngineStats,
    FromEngine,
    Heartbeat,
    Ping,
    Shutdown,
    ToEngine,
    unpack_ids,
)
from engine.plan import StepPlan, StepResult
from engine.request import InvalidRequestError, Request
from engine.scheduler import Scheduler

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.5
"""Longest silence of a healthy step loop between steps."""


class Prepared(NamedTuple):
    """A request and the names of its pages."""

    request: AddRequest
    keys: PageKeys


class Compiled(NamedTuple):
    """The grammar of a request that waits for it."""

    request_id: str
    matcher: GrammarMatcher | GrammarError


class EngineCore:
    """One executor and its scheduler."""

    def __init__(
        self,
        executor: Executor,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(63),
        load_seconds: float = 0.0,
    ) -> None:
        layout = executor.config.layout(executor.model)
        self.executor = executor
        self.scheduler = Scheduler(executor.config, layout, eos_token_id=executor.eos_token_id)
        self._grammars = GrammarCompiler(
            executor.config.model_dir, vocab_size=executor.model.vocab_size, eos_token_id=executor.eos_token_id
        )
        self._compiling: dict[str, tuple[AddRequest, PageKeys | None]] = {}
        """Requests that the scheduler has not seen: it gets them with their matchers."""
        self.info = engine_info(executor, load_seconds=load_seconds)
        self.inbox: SimpleQueue[ToEngine | Prepared | Compiled | Exception] = SimpleQueue()
        """An exception in it ends the engine: that is how a broken link tells the loop."""
        self.outbox: deque[FromEngine] = deque()
        self._clock = clock
        self._draw_seed = draw_seed
        self._num_requests = 0
        self._leaving = False

    def step(self, wait_seconds: float = 0.0) -> None:
        """One turn. With nothing to do it waits for a message, at most `wait_seconds`."""
        self._receive(0.0 if self.scheduler.has_work else wait_seconds)
        plan = self.scheduler.schedule(self._clock())
        result = self._execute(plan)
        outputs = self.scheduler.update(plan, result, self._clock())
        if outputs.request_ids:
            self.outbox.append(msgspec.structs.replace(outputs, stats=self._with_grammars(outputs.stats)))

    def run(self, send: Callable[[FromEngine], None]) -> bool:
        """Step until a Shutdown comes (True) or the engine dies (False).

        The first frame is EngineInfo; dying, the last one is EngineDead.
        """
        try:
            self._grammars.warm()
            send(self.info)
            last_sent = self._clock()
            while not self._leaving:
                self.step(max(0.0, last_sent + HEARTBEAT_SECONDS - self._clock()))
                if not self.outbox and self._clock() - last_sent >= HEARTBEAT_SECONDS:
                    self.outbox.append(Heartbeat(stats=self._stats()))
                while self.outbox:
                    send(self.outbox.popleft())
                    last_sent = self._clock()
        except Exception as error:
            logger.exception("the engine ends")
            send(EngineDead(reason=f"{type(error).__name__}: {error}"))
            return False
        finally:
            self._grammars.close()
            self.scheduler.grammars.close()
            self.executor.close()
        return True

    def _receive(self, wait_seconds: float) -> None:
        try:
            message = self.inbox.get(timeout=wait_seconds) if wait_seconds > 0 else self.inbox.get_nowait()
            while True:
                self._handle(message)
                message = self.inbox.get_nowait()
        except Empty:
            return

    def _handle(self, message: ToEngine | Prepared | Compiled | Exception) -> None:
        match message:
            case AddRequest():
                self._take(message, None)
            case Prepared():
                self._take(message.request, message.keys)
            case Compiled():
                self._take_compiled(message)
            case AbortRequest():
                if self._compiling.pop(message.request_id, None) is not None:
                    self.scheduler.refuse(message.request_id, None)
                self.scheduler.abort(message.request_id)
            case Ping():
                self.outbox.append(Heartbeat(stats=self._stats(), nonce=message.nonce))
            case Shutdown():
                self._leaving = True
            case Exception():
                raise message

    def prepare(self, message: ToEngine) -> "ToEngine | Prepared":
        """Name the pages of a prompt, which takes time where it is long; on any thread but the step loop's."""
        if not isinstance(message, AddRequest) or not message.prompt_token_ids or len(message.prompt_token_ids) % 4:
            return message
        hasher = self.scheduler.hasher
        if hasher is None:
            return message
        return Prepared(message, PageKeys(hasher, message.cache_salt, unpack_ids(message.prompt_token_ids)))

    def _take(self, message: AddRequest, keys: PageKeys | None) -> None:
        """A request from outside: at once to the scheduler, or when its grammar is compiled."""
        if message.request_id in self.scheduler.requests or message.request_id in self._compiling:
            # An answer would end the stream of the request that has the id.
            logger.error("request id %s came twice; the second one is dropped", message.request_id)
            return
        if message.grammar is None:
            self._add(message, keys)
            return
        matcher = self._grammars.find(message.grammar)
        if matcher is not None:
            self._add(message, keys, matcher)
            return
        self._compiling[message.request_id] = (message, keys)
        self._grammars.start(message.grammar, lambda result: self.inbox.put(Compiled(message.request_id, result)))

    def _take_compiled(self, compiled: Compiled) -> None:
        waiting = self._compiling.pop(compiled.request_id, None)
        if waiting is None:
            return
        if isinstance(compiled.matcher, GrammarError):
            self.scheduler.refuse(compiled.request_id, str(compiled.matcher))
        else:
            self._add(*waiting, compiled.matcher)

    def _add(self, message: AddRequest, keys: PageKeys | None, matcher: GrammarMatcher | None = None) -> None:
        self._num_requests += 1
        try:
            request = Request(
                message,
                vocab_size=self.executor.model.vocab_size,
                order=self._num_requests,
                seed=self._draw_seed(),
            )
        except InvalidRequestError as error:
            logger.warning("request %s refused: %s", message.request_id, error)
            self.scheduler.refuse(message.request_id, str(error))
        except Exception:
            logger.exception("request %s cannot be read", message.request_id)
            self.scheduler.refuse(message.request_id, "The engine could not read this request.")
        else:
            request.keys = keys
            if matcher is not None:
                self.scheduler.grammars.add(request.request_id, matcher)
            self.scheduler.add(request)

    def _stats(self) -> EngineStats:
        return self._with_grammars(self.scheduler.stats())

    def _with_grammars(self, stats: EngineStats) -> EngineStats:
        num_grammars = len(self.scheduler.grammars) + len(self._compiling)
        return msgspec.structs.replace(
            stats, num_grammars=num_grammars, grammar_bytes=self._grammars.used_bytes + COPY_BYTES * num_grammars
        )

    def _execute(self, plan: StepPlan) -> StepResult:
        if not plan.scheduled and not plan.finished:
            return StepResult(step_id=plan.step_id)
        try:
            return self.executor.execute(plan)
        except StepError as error:
            logger.exception("step %d failed; its %d requests end", plan.step_id, len(plan.scheduled))
            failed = {s.request_id: str(error) for s in plan.scheduled}
            return StepResult(step_id=plan.step_id, failed=failed, lost=True)


def engine_info(executor: Executor, *, load_seconds: float = 0.0) -> EngineInfo:
    """First frame of an engine that runs `executor` in this process."""
    config = executor.config
    layout = config.layout(executor.model)
    return EngineInfo(
        protocol_version=PROTOCOL_VERSION,
        model_dir=config.model_dir,
        vocab_size=executor.model.vocab_size,
        max_model_len=config.max_model_len,
        eos_token_id=executor.eos_token_id,
        page_tokens=layout.page_tokens,
        num_pages=config.num_pages,
        num_slots=config.max_num_seqs,
        kv_bytes_per_page=layout.bytes_per_page,
        dtype=config.dtype,
        kv_cache_dtype=config.row_format,
        numerics=config.numerics,
        pid=os.getpid(),
        enable_prefix_cache=config.enable_prefix_cache,
        is_preview=executor.model.is_preview,
        load_seconds=load_seconds,
    )
