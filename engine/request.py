"""One request inside the engine: tokens known, tokens computed, and what it holds. There are no phases."""

from enum import Enum

import msgspec
import numpy as np

from engine.kv.grant import Grant
from engine.kv.hashing import PageKeys
from engine.kv.resume import MissReason
from engine.kv.snapshot_store import SnapshotKind
from engine.messages import AddRequest, FinishReason, RequestError, SamplingParams, unpack_ids
from engine.plan import PromptLogprobs
from engine.policy import ServiceClass


class RequestStatus(Enum):
    QUEUED = "queued"
    PARKED = "parked"
    """In the queue, until another request has computed the pages that they share."""
    RUNNING = "running"
    FINISHED = "finished"


class InvalidRequestError(ValueError):
    """A request that the server should have refused; nothing of it reached the engine's state."""


class Request:
    """State of one request, changed by the scheduler only.

    `token_ids` grows; a step raises `num_computed_tokens` toward `num_tokens`, and the row of the last known token
    samples the next one.
    """

    __slots__ = (
        "_tokens",
        "arrival_time",
        "bypassed_seconds",
        "cache_salt",
        "deadline",
        "error",
        "finish_reason",
        "first_scheduled_time",
        "grant",
        "keys",
        "last_chunk_time",
        "last_step_id",
        "latest_start",
        "miss_reason",
        "most_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_ever_computed",
        "num_preemptions",
        "num_prompt_tokens",
        "num_tokens",
        "order",
        "prefill_seconds",
        "priority",
        "prompt_logprobs",
        "queued_seconds",
        "request_id",
        "sampling",
        "service",
        "settled",
        "snapshot_positions",
        "status",
        "stop_ids",
        "stop_token_id",
        "stops",
        "tenant",
        "total_seconds",
        "trace_id",
        "wait_until",
    )

    def __init__(self, message: AddRequest, *, vocab_size: int, order: int, seed: int) -> None:
        """`order` breaks ties of arrival; `seed` is used when the message has none.

        Raises:
            InvalidRequestError: an id outside 0 .. vocab_size - 1, an empty prompt, an impossible count.
        """
        _check(message, vocab_size)
        prompt = unpack_ids(message.prompt_token_ids)
        sampling = message.sampling
        self.request_id = message.request_id
        self.sampling: SamplingParams = (
            sampling if sampling.seed is not None else msgspec.structs.replace(sampling, seed=seed)
        )
        self.priority = message.priority
        self.deadline = message.deadline
        self.arrival_time = message.arrival_time
        self.cache_salt = message.cache_salt
        self.trace_id = message.trace_id
        self.tenant = message.tenant
        self.snapshot_positions: tuple[int, ...] = tuple(unpack_ids(message.snapshot_positions).tolist())
        self.order = order
        self.num_prompt_tokens = len(prompt)
        self.num_tokens = len(prompt)
        self.num_computed_tokens = 0
        self.num_ever_computed = 0
        """Most tokens that were ever computed; more than `num_computed_tokens` after a preemption."""
        self.num_cached_tokens = 0
        """Tokens of the prompt that were not computed when the request first started."""
        self.keys: PageKeys | None = None
        """None: nothing of the request is looked up or cached."""
        self.prompt_logprobs: list[PromptLogprobs] | None = None if sampling.prompt_logprobs is None else []
        """Chunks that cover the computed part of the prompt; None when they are not wanted (any more)."""
        self.miss_reason: MissReason | None = None
        """Why no more was cached, from the first start on."""
        self.stops: dict[int, SnapshotKind] = dict.fromkeys(self.snapshot_positions, "prompt_end")
        """Positions ahead at which a chunk ends and a snapshot is taken."""
        self.settled = True
        """Whether the slot stood at `num_computed_tokens` when the request ended."""
        self._tokens = prompt.astype(np.int32)
        self.grant: Grant | None = None
        self.status = RequestStatus.QUEUED
        self.finish_reason: FinishReason | None = None
        self.stop_token_id: int | None = None
        self.error: RequestError | None = None
        self.first_scheduled_time: float | None = None
        self.queued_seconds = 0.0
        """Arrival to first scheduled step; 0 until then."""
        self.stop_ids: frozenset[int] = frozenset(sampling.stop_token_ids)
        """Tokens that end the answer, once it has its least length; the scheduler adds EOS."""
        self.most_tokens = self.num_prompt_tokens + sampling.max_tokens
        """Tokens known at which the answer ends; the scheduler knows the engine's own limit."""
        self.last_step_id = 0
        self.last_chunk_time = 0.0
        """When it was last given prompt rows."""
        self.wait_until: float | None = None
        """Until when it may wait for another request's prefix; None: it has never waited."""
        self.num_preemptions = 0
        self.service = ServiceClass.INTERACTIVE
        # Predictions of the moment in which the request was queued; the scheduler sets them.
        self.prefill_seconds = 0.0
        """To compute the tokens known."""
        self.total_seconds = 0.0
        """The same and the expected answer."""
        self.latest_start = 0.0
        self.bypassed_seconds = 0.0
        """Work that started past it while it did not fit."""

    @property
    def token_ids(self) -> np.ndarray:
        """int32 [num_tokens]; a view that later tokens never change."""
        return self._tokens[: self.num_tokens]

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def chunk_limit(self) -> int:
        """Where the next chunk must end at the latest: the next of `stops`, or the last token known."""
        return self.limit_after(self.num_computed_tokens)

    def limit_after(self, start: int) -> int:
        """Where a chunk that begins at `start` must end at the latest."""
        return min((position for position in self.stops if position > start), default=self.num_tokens)

    @property
    def sampling_due(self) -> SamplingParams:
        """What is left to do: log probabilities of the prompt that have been delivered are not computed again."""
        if self.prompt_logprobs is None and self.sampling.prompt_logprobs is not None:
            return msgspec.structs.replace(self.sampling, prompt_logprobs=None)
        return self.sampling

    @property
    def lookup_keys(self) -> PageKeys | None:
        """Names of the pages that may be taken from the cache; None: nothing may, every row must be computed."""
        return self.keys if self.prompt_logprobs is None else None

    @property
    def slot(self) -> int | None:
        return None if self.grant is None else self.grant.slot

    @property
    def page_ids(self) -> tuple[int, ...]:
        return () if self.grant is None else tuple(self.grant.page_ids)

    def start(self, now: float) -> None:
        """It is scheduled; the first time counts."""
        if self.first_scheduled_time is None:
            self.first_scheduled_time = now
            self.queued_seconds = max(0.0, now - self.arrival_time)

    def preempt(self) -> None:
        """Back to the queue with the tokens known; they are computed again. The grant has been given back."""
        self.grant = None
        self.status = RequestStatus.QUEUED
        self.num_computed_tokens = 0
        self.bypassed_seconds = 0.0
        self.num_preemptions += 1
        if self.prompt_logprobs is not None:
            self.prompt_logprobs.clear()

    def append(self, token_id: int) -> None:
        if self.num_tokens == len(self._tokens):
            grown = np.empty(self.num_tokens + max(64, self.num_tokens // 4), dtype=np.int32)
            grown[: self.num_tokens] = self._tokens
            self._tokens = grown
        self._tokens[self.num_tokens] = token_id
        self.num_tokens += 1


def _check(message: AddRequest, vocab_size: int) -> None:
    """Ids index the runner's tensors: one that is out of range would touch other requests (reliability 0.2)."""
    sampling = message.sampling
    if not message.request_id:
        raise InvalidRequestError("the request has no id")
    if len(message.prompt_token_ids) % 4 or not message.prompt_token_ids:
        raise InvalidRequestError("the prompt must hold at least one token, four bytes each")
    prompt = unpack_ids(message.prompt_token_ids)
    if int(prompt.min()) < 0 or int(prompt.max()) >= vocab_size:
        raise InvalidRequestError(f"prompt token ids must be in 0..{vocab_size - 1}")
    if any(not 0 <= i < vocab_size for i in (*sampling.stop_token_ids, *sampling.logit_bias)):
        raise InvalidRequestError(f"stop and bias token ids must be in 0..{vocab_size - 1}")
    ids = [i for word in sampling.bad_words for i in word]
    if sampling.forced_token is not None:
        ids += (sampling.forced_token.token_id, *sampling.forced_token.unless)
    if any(not 0 <= i < vocab_size for i in ids):
        raise InvalidRequestError(f"bad word and forced token ids must be in 0..{vocab_size - 1}")
    if not all(sampling.bad_words):
        raise InvalidRequestError("a bad word must hold at least one token")
    if sampling.allowed_token_ids is not None:
        if len(sampling.allowed_token_ids) % 4 or not sampling.allowed_token_ids:
            raise InvalidRequestError("allowed token ids must be at least one, four bytes each")
        allowed = unpack_ids(sampling.allowed_token_ids)
        if int(allowed.min()) < 0 or int(allowed.max()) >= vocab_size:
            raise InvalidRequestError(f"allowed token ids must be in 0..{vocab_size - 1}")
    if any(n is not None and n < 0 for n in (sampling.logprobs, sampling.prompt_logprobs)):
        raise InvalidRequestError("numbers of log probabilities must be at least 0")
    if sampling.max_tokens < 1 or sampling.min_tokens < 0:
        raise InvalidRequestError("max_tokens must be at least 1 and min_tokens at least 0")
    if len(message.snapshot_positions) % 4:
        raise InvalidRequestError("snapshot positions must be four bytes each")
    positions = unpack_ids(message.snapshot_positions)
    inside = positions.size == 0 or (int(positions[0]) > 0 and int(positions[-1]) <= prompt.size)
    if not inside or (np.diff(positions) <= 0).any():
        raise InvalidRequestError("snapshot positions must ascend and lie within the prompt")
