"""Where a request begins: the cheapest way into its prompt, in predicted seconds.

A position can be resumed at when the rows of all tokens before it are in pages and the slot of the position can be had:

    snapshot    the position has one                     pages and snapshot are loaded, nothing is computed
    replay      the end of a full page                   the last L x (W - 1) tokens are run again over cached rows
    zero        always                                   everything is computed

At least the last token is always computed, because a token is sampled from its row.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from engine.kv.misses import Match
from engine.kv.prefix_node import Node
from engine.kv.snapshot_store import Snapshot, SnapshotStore

MissReason = Literal["cold", "evicted", "salt", "diverged", "no_snapshot", "in_flight", "prompt_logprobs"]
"""That of `Match.end`; "no_snapshot": more is cached than it is worth coming back to; "in_flight": another request was
computing the same, and waiting for it was not sooner; "prompt_logprobs": every row of the prompt was asked for."""


class ResumeCosts(Protocol):
    """Predicted seconds; all of them at least zero, and `prefill_seconds` does not grow with `start`."""

    def prefill_seconds(self, start: int, end: int) -> float:
        """Computing the tokens start .. end - 1 with all before them cached."""

    def replay_seconds(self, position: int) -> float:
        """Rebuilding the slot of a position from pages."""

    def load_seconds(self, num_bytes: int) -> float:
        """Copying from host memory to the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePlan:
    """How to begin. Valid until the index or the store changes."""

    resume_at: int
    """Tokens that are not computed again; less than the number of tokens."""
    nodes: list[Node]
    """Full pages that the table shares, from its first page on."""
    num_on_device: int
    """How many of `nodes`, from the first, are on the device; the others are loaded."""
    source: Node | None
    """Page whose beginning the request needs in a page of its own, because it will write behind it."""
    snapshot: Snapshot | None
    replay: bool
    """Whether the slot is rebuilt by replay. Without it and without a snapshot the request begins at zero."""
    est_seconds: float
    """Until the last known token is computed."""
    miss: MissReason | None
    """Why more was not found; None when all that could be expected was. "salt" is not for clients."""
    junction: int | None
    """Page end, not before `resume_at`, behind which this prompt leaves a cached one, or seems to: less than a page has
    no name to be compared. A snapshot there would serve the next such prompt."""

    @property
    def num_loads(self) -> int:
        """Pages copied from host memory."""
        from_host = self.source is not None and self.source.page_id is None
        return len(self.nodes) - self.num_on_device + from_host


def plan_resume(
    match: Match,
    num_tokens: int,
    snapshots: SnapshotStore,
    costs: ResumeCosts,
    *,
    page_tokens: int,
    bytes_per_page: int,
) -> ResumePlan:
    """The plan with the fewest predicted seconds; among equals the one that skips the most tokens."""
    best, best_seconds = _ZERO, costs.prefill_seconds(0, num_tokens)
    for candidate in _candidates(match, num_tokens, snapshots, page_tokens):
        seconds = costs.prefill_seconds(candidate.position, num_tokens)
        if seconds > best_seconds:
            break  # Candidates come deepest first: none of the others computes less.
        num_loads = max(0, candidate.position // page_tokens - match.num_on_device)
        if candidate.source is not None and candidate.source.page_id is None:
            num_loads += 1
        num_bytes = num_loads * bytes_per_page
        if candidate.snapshot is None:
            seconds += costs.replay_seconds(candidate.position)
        else:
            num_bytes += snapshots.bytes_per_snapshot
        if num_bytes:
            seconds += costs.load_seconds(num_bytes)
        if seconds < best_seconds or (seconds == best_seconds and candidate.position > best.position):
            best, best_seconds = candidate, seconds
    num_nodes = best.position // page_tokens
    return ResumePlan(
        resume_at=best.position,
        nodes=match.nodes[:num_nodes],
        num_on_device=min(num_nodes, match.num_on_device),
        source=best.source,
        snapshot=best.snapshot,
        replay=best.position > 0 and best.snapshot is None,
        est_seconds=best_seconds,
        miss=_miss(match, num_tokens, best.position, page_tokens),
        junction=_junction(match, snapshots, page_tokens),
    )


class _Candidate(NamedTuple):
    position: int
    snapshot: Snapshot | None
    source: Node | None


_ZERO = _Candidate(0, None, None)


def _candidates(match: Match, num_tokens: int, snapshots: SnapshotStore, page_tokens: int) -> list[_Candidate]:
    """All ways to begin behind zero, the deepest first and at one position the snapshot first."""
    found = []
    for mark in match.marks:
        snapshot = snapshots.find(mark.key) if mark.position < num_tokens else None
        if snapshot is not None:
            found.append(_Candidate(mark.position, snapshot, mark.holder))
    depth = min(len(match.nodes), (num_tokens - 1) // page_tokens)
    for node in match.nodes[:depth]:
        snapshot = snapshots.find(node.key)
        if snapshot is not None:
            found.append(_Candidate(node.depth * page_tokens, snapshot, None))
    # A page end further up is worth a replay only where it saves loads: at the last page on the device.
    replays = {depth, min(depth, match.num_on_device)} - {0}
    found += [_Candidate(d * page_tokens, None, None) for d in replays]
    found.sort(key=lambda c: (c.position, c.snapshot is not None), reverse=True)
    return found


def _miss(match: Match, num_tokens: int, resume_at: int, page_tokens: int) -> MissReason | None:
    covered = len(match.nodes) * page_tokens
    if match.marks:
        covered = max(covered, match.marks[-1].position)
    unused = min(covered, num_tokens - 1) - resume_at
    if unused >= page_tokens or (unused > 0 and not resume_at):
        return "no_snapshot"
    return match.end or (None if covered else "cold")


def _junction(match: Match, snapshots: SnapshotStore, page_tokens: int) -> int | None:
    if not match.nodes or not match.nodes[-1].num_children or snapshots.get(match.nodes[-1].key) is not None:
        return None
    depth = len(match.nodes) * page_tokens
    return None if match.marks and match.marks[-1].position > depth else depth
