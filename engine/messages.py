"""Everything that crosses between the API process and the engine process, as msgspec structures.

Token ids travel as raw little-endian int32 bytes: a million ids must never become a Python list on the wire.
"""

from typing import Literal

import msgspec
import numpy as np

FinishReason = Literal["stop", "length", "abort", "error"]
PROTOCOL_VERSION = 1


def pack_ids(token_ids: "np.ndarray | list[int]") -> bytes:
    """Token ids as int32 little-endian bytes."""
    return np.asarray(token_ids, dtype="<i4").tobytes()


def unpack_ids(raw: bytes) -> np.ndarray:
    """The int32 array packed by `pack_ids` (read-only view)."""
    return np.frombuffer(raw, dtype="<i4")


class ForcedToken(msgspec.Struct, frozen=True, kw_only=True):
    """A token that must come next once `after` tokens were generated, unless it or one of `unless` is among them.

    The bound on an answer's reasoning: the token that ends reasoning, after so many tokens.
    """

    token_id: int
    after: int
    unless: tuple[int, ...] = ()


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one request picks tokens. Ranges are checked once, in the server's validator."""

    temperature: float = 1.0
    """0 is greedy; ties go to the lower token id."""
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    """None: the engine draws one when the request arrives."""
    max_tokens: int = 16
    min_tokens: int = 0
    """EOS and stop ids cannot be sampled before this many tokens."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none. n: the sampled token's log probability and those of the n likeliest tokens."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt but the first. All of the prompt is computed then, cached or not."""
    allowed_token_ids: bytes | None = None
    """None: all. Packed ids, at least one: no other token can be sampled, EOS included."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of ids that the output never contains: a token that would complete one cannot be sampled."""
    forced_token: ForcedToken | None = None
    """Stronger than everything above."""


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer may be. Checked by the server: it compiles within the engine's limits and can be satisfied."""

    text: str
    """In the grammar library's own form; empty: any text, without tokens of the added vocabulary."""
    after: int | None = None
    """The token behind which the text begins; before it any ordinary token may stand, and the answer cannot end.
    None: it begins with the first token."""
    markers: tuple[int, ...] = ()
    """Tokens of the added vocabulary that the text may use, whatever it says. The end of sequence is always one."""


class AddRequest(msgspec.Struct, frozen=True, kw_only=True, tag="add"):
    request_id: str
    """Made by the server: a client's own id never keys engine state."""
    prompt_token_ids: bytes
    sampling: SamplingParams
    priority: int = 0
    """Lower runs first."""
    deadline: float | None = None
    """Monotonic seconds after which a request that is still queued is refused."""
    cache_salt: str = ""
    arrival_time: float = 0.0
    """Monotonic seconds."""
    trace_id: str | None = None
    tenant: str = ""
    """Whose share of the machine this is: the server's name of the API key, never the key."""
    grammar: Grammar | None = None
    snapshot_positions: bytes = b""
    """Positions (packed, ascending, within the prompt) at which a chunk must end so that a snapshot can be taken."""


class AbortRequest(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    request_id: str


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag="ping"):
    nonce: int


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag="shutdown"):
    """Finish nothing more; leave now."""


ToEngine = AddRequest | AbortRequest | Ping | Shutdown


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """First frame of an engine: what it serves and its own limits, which the server's validator uses."""

    protocol_version: int
    model_dir: str
    vocab_size: int
    """Width of the logits: every token id of a request is less than this."""
    max_model_len: int
    eos_token_id: int
    page_tokens: int
    num_pages: int
    num_slots: int
    kv_bytes_per_page: int
    dtype: str
    kv_cache_dtype: str
    numerics: str
    pid: int
    enable_prefix_cache: bool = False
    is_preview: bool = False
    """Weights of the preview, as far as the configuration shows: their prompts state efforts in other words."""
    load_seconds: float = 0.0


class LogprobRow(msgspec.Struct, frozen=True, array_like=True):
    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


class PromptLogprobColumns(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities of the prompt's tokens 1 .. N, each given all before it; little-endian bytes."""

    num_top: int
    logprobs: bytes
    """float32 [N]."""
    ranks: bytes
    """int32 [N]; 1: no token was likelier."""
    top_ids: bytes
    """int32 [N, num_top]: the likeliest tokens, best first."""
    top_logprobs: bytes
    """float32 [N, num_top]."""


class RequestError(msgspec.Struct, frozen=True, array_like=True):
    """Why a request ended with finish "error"; the message is one sentence that a client may read."""

    code: Literal["deadline_exceeded", "too_large", "no_token_left", "internal"]
    """no_token_left: what the request excludes leaves no token to choose."""
    message: str


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges and running totals, sent with every output frame and at least once a second when idle."""

    step_id: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_free_pages: int = 0
    """Neither held nor promised to a running request."""
    num_free_slots: int = 0
    prompt_tokens: int = 0
    """Totals since start; the server turns differences into counters."""
    generation_tokens: int = 0
    num_preemptions: int = 0
    step_seconds: float = 0.0
    """Of the last step."""
    step_tokens: int = 0
    """Of the last step."""
    num_running_long: int = 0
    """Of `num_running`; the others are interactive."""
    num_waiting_long: int = 0
    num_waiting_tokens: int = 0
    """Known tokens of the waiting requests."""
    backlog_seconds: float = 0.0
    """Prompt work that is queued or begun, in seconds as predicted when it was queued."""
    drain_seconds: float = 0.0
    """How long the backlog takes at the pace measured lately: what to tell a client that comes too early."""
    predicted_step_seconds: float = 0.0
    """Of the last step."""
    num_mispredicted_steps: int = 0
    """Steps that took more than 15 % more or less than predicted; total since start."""
    num_bypasses: int = 0
    """Times a request started past another one that did not fit; total since start."""
    num_recomputed_tokens: int = 0
    """Rows computed again after a preemption; total since start."""
    num_cached_pages: int = 0
    """Pages on the device that the prefix cache has, those that requests share included."""
    num_host_pages_used: int = 0
    num_snapshots_used: int = 0
    num_parked: int = 0
    """Waiting requests that let another one compute what they share with it."""
    num_prefix_waits: int = 0
    """Times a request began to wait so; total since start."""
    num_hibernations: int = 0
    """Requests that went back to the queue with their pages kept for them; total since start."""
    num_wakes: int = 0
    """Requests that came back and were not computed from the start; total since start."""
    num_hibernated: int = 0
    """Waiting requests whose pages are kept."""
    num_recompute_preemptions: int = 0
    """Preempted requests of which nothing was kept, or not until they came back: what is dropped of their pages is
    computed again. Total since start."""
    moved_bytes: int = 0
    """Copied between device and host; total since start."""
    hit_tokens: int = 0
    """Prompt tokens of started requests that were cached, and"""
    queried_tokens: int = 0
    """all of them; totals since start."""
    num_grammars: int = 0
    """Requests that follow one, those that wait for it to be compiled included."""
    grammar_bytes: int = 0
    """Compiled grammars and the places of requests in them; an estimate."""
    miss_counts: dict[str, int] = {}
    """Started requests by why no more was cached ("none": all that could be expected was); totals since start."""


class StepOutputs(msgspec.Struct, frozen=True, kw_only=True, tag="outputs"):
    """One step's news in columns: row i belongs to request_ids[i] and owns token_ids[cu_tokens[i]:cu_tokens[i + 1]]."""

    request_ids: tuple[str, ...]
    cu_tokens: tuple[int, ...]
    token_ids: bytes
    finish: tuple[FinishReason | None, ...]
    stop_ids: tuple[int | None, ...]
    """The stop token that ended the request, if one did (EOS included)."""
    cached_tokens: tuple[int, ...]
    logprobs: tuple[tuple[LogprobRow, ...] | None, ...]
    errors: tuple[RequestError | None, ...]
    """Set with finish "error"."""
    queued_seconds: tuple[float, ...]
    """Arrival to first scheduled step; 0 until then."""
    stats: EngineStats
    miss_reasons: tuple[str | None, ...] = ()
    """Why no more of the prompt was cached; None when all that could be expected was, or nothing has started."""
    prompt_logprobs: dict[str, PromptLogprobColumns] = {}
    """By request id, beside the first token of those that asked."""


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag="heartbeat"):
    """Sent by the step loop itself, so that it stops when the loop does."""

    stats: EngineStats
    nonce: int | None = None
    """Echo of a Ping."""


class EngineDead(msgspec.Struct, frozen=True, kw_only=True, tag="dead"):
    """Last frame of an engine that cannot go on (or could not start)."""

    reason: str


FromEngine = EngineInfo | StepOutputs | Heartbeat | EngineDead

_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
_encoder = msgspec.msgpack.Encoder()


def encode(message: ToEngine | FromEngine) -> bytes:
    """One frame."""
    return _encoder.encode(message)


def decode_to_engine(frame: bytes) -> ToEngine:
    """Raises msgspec.ValidationError or msgspec.DecodeError on a malformed frame."""
    return _to_engine.decode(frame)


def decode_from_engine(frame: bytes) -> FromEngine:
    """Raises msgspec.ValidationError or msgspec.DecodeError on a malformed frame."""
    return _from_engine.decode(frame)
