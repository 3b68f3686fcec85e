"""One-line breaks of engine and device, for each trap of kv-and-scheduling 6 that this design can fall into.

Traps without a break of their own, because there is nothing to break yet or by construction:

    T5   there are no drafts: an accumulator takes committed tokens only. Its other half, a state that is kept although
         its step failed, is here
    T6   there are no drafts: an entry is seen once its step is committed. Publishing more than was computed is here
    T7   there is no draft layer
    T11  pages and slots hold one type each; what was never written is NOTHING here, and reading it is an error
"""

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from symbolic.device import SymbolicDevice
from symbolic.tags import NOTHING
from symbolic.traffic import Kind

from engine.kv.hashing import PageHasher
from engine.kv.hibernation import Hibernations
from engine.kv.idle_pages import IdlePages
from engine.kv.manager import KVManager
from engine.kv.prefix_index import PrefixIndex
from engine.kv.prefix_node import Node
from engine.kv.snapshot_store import Snapshot
from engine.plan import StepPlan
from engine.preemption import Preemption
from engine.prefix_waits import PrefixWaits
from engine.request import Request
from engine.scheduler import Scheduler
from engine.step_builder import StepBuilder
from model.config import ModelConfig
from model.kv_layout import LayerReplay, replay_layers


@dataclass(frozen=True, slots=True)
class Mutant:
    """`old` becomes `new` in the source of one method or property."""

    trap: str
    what: str
    owner: type
    name: str
    old: str
    new: str
    kind: Kind = "plain"
    """Traffic that shows it soon."""

    @contextmanager
    def active(self) -> Iterator[None]:
        original = inspect.getattr_static(self.owner, self.name)
        function = original.fget if isinstance(original, property) else original
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(self.old) == 1, f"{self.owner.__name__}.{self.name} has changed: find the line again"
        scope: dict[str, Any] = {}
        exec(compile(source.replace(self.old, self.new), f"<{self.what}>", "exec"), function.__globals__, scope)
        setattr(self.owner, self.name, scope[self.name])
        try:
            yield
        finally:
            setattr(self.owner, self.name, original)


ENGINE = (
    Mutant("T2", "slot not restored", KVManager, "_bring", "if plan.snapshot is not None:", "if False:"),
    Mutant(
        "T2",
        "slot restored from another snapshot",
        KVManager,
        "_bring",
        "plan.snapshot.place,",
        "(plan.snapshot.place + 1) % self.snapshots.num_places,",
    ),
    Mutant(
        "T5",
        "slot of a failed request kept",
        KVManager,
        "settle",
        "grant.request_id in failed",
        "False",
        kind="faulty",
    ),
    Mutant(
        "T6",
        "page published before it is full",
        Scheduler,
        "_commit_rows",
        "request.token_ids, end,",
        "request.token_ids, min(end + 128, request.num_tokens),",
    ),
    Mutant(
        "T8",
        "failed rows published",
        Scheduler,
        "_commit_rows",
        " and request_id not in failed:",
        ":",
        kind="faulty",
    ),
    Mutant("T8", "copies of a lost step believed", Scheduler, "update", "if result.lost:", "if False:", kind="faulty"),
    Mutant("T8", "snapshots of a lost step believed", KVManager, "settle", "lost is not None or", "", kind="faulty"),
    Mutant(
        "T9",
        "snapshot taken one token early",
        KVManager,
        "order_snapshot",
        "SlotSnapshot(grant.slot, position,",
        "SlotSnapshot(grant.slot, position - 1,",
    ),
    Mutant(
        "T9",
        "resumed one token early",
        StepBuilder,
        "_start",
        "num_computed_tokens=resume_at",
        "num_computed_tokens=max(0, resume_at - 1)",
    ),
    Mutant(
        "T9", "snapshot outlives its rows", KVManager, "release", "elif token_ids is not None:", "elif False:", "storm"
    ),
    Mutant(
        "T10",
        "slot free before its last snapshot",
        KVManager,
        "release",
        "if snapshot is None:",
        "self.slots.free(grant.slot, grant.request_id)\n    if False:",
    ),
    Mutant(
        "T10",
        "snapshot of the next plan believed",
        KVManager,
        "settle",
        "self._in_flight, []",
        "self._in_flight + self._ordered, []\n    self._ordered = []",
        kind="storm",
    ),
    Mutant("T10", "runner not told", Scheduler, "_finish", "self._forget.append(request.request_id)", "pass"),
    Mutant(
        "T10",
        "runner not told of a preemption",
        Scheduler,
        "_set_aside",
        "self._forget.append(request.request_id)",
        "pass",
        kind="crowded",
    ),
    Mutant("T12", "copied page not held", KVManager, "_take", "self.index.hold(plan.source)", "pass", kind="full"),
    Mutant(
        "T12",
        "host page free before its load",
        PrefixIndex,
        "load",
        "self._unsealed_host_pages.append(node.host_page)",
        "self.host.free([node.host_page])",
    ),
    Mutant(
        "T12", "snapshot believed before it is written", Snapshot, "__init__", "self.ready = False", "self.ready = True"
    ),
    Mutant(
        "T13",
        "last page shared, not copied",
        KVManager,
        "_bring",
        "grant.page_ids.append(target)",
        "grant.page_ids.append(target if plan.source.page_id is None else plan.source.page_id)",
    ),
    Mutant(
        "T14",
        "pages to load not counted",
        KVManager,
        "_take",
        "self.layout.pages_for(num_tokens) - plan.num_on_device",
        "self.layout.pages_for(num_tokens) - len(plan.nodes)",
    ),
    Mutant(
        "T14",
        "shared pages counted as evictable",
        KVManager,
        "_take",
        "self.index.num_evictable_beside(shared)",
        "self.index.num_evictable",
    ),
    Mutant(
        "T14",
        "no smaller way in",
        KVManager,
        "admit",
        "for match in self._smaller(keys, token_ids) if plan.resume_at else [_NOTHING]:",
        "for match in ():",
        kind="full",
    ),
    Mutant("T17", "middle page evicted", Node, "may_leave_device", "and not self.num_device_children", ""),
    Mutant("T18", "salt not in the key", PageHasher, "root", 'cache_salt.encode("utf-8", "surrogatepass")', 'b""'),
    Mutant("T19", "key without the pages before", PageHasher, "chain", "state.update(key)", "pass"),
    Mutant(
        "I2", "table leaves its pages referenced", KVManager, "release", "self.index.release(grant.tip, now)", "pass"
    ),
    Mutant(
        "I13",
        "hibernated pages not pinned",
        Hibernations,
        "begin",
        "self._index.pin(hibernation.tip)",
        "pass",
        kind="asleep",
    ),
    Mutant("I13", "pins stay", Hibernations, "end", "self._index.unpin(hibernation.tip)", "pass", kind="asleep"),
    Mutant(
        "I13",
        "nobody is given up for one who waits",
        KVManager,
        "admit",
        "self.hibernations.give_up(spare=request_id)",
        "False",
        kind="asleep",
    ),
    Mutant(
        "T14",
        "host memory counted twice",
        IdlePages,
        "num_evictable",
        "self.free + min(self.pinned, num_host_free + self.droppable)",
        "self.free + self.pinned",
        kind="asleep",
    ),
    Mutant(
        "I14",
        "who needs most is spared",
        Preemption,
        "_as_victim",
        "request is needy or ",
        "",
        kind="asleep",
    ),
    Mutant("I14", "a dead leader is waited for", PrefixWaits, "left", "self._let_go(request)", "pass", kind="asleep"),
    Mutant(
        "I14",
        "what has been published is waited for",
        PrefixWaits,
        "reached",
        "awaited <= position",
        "awaited < position",
        kind="full",
    ),
    Mutant(
        "I19",
        "answer forgotten at a preemption",
        Request,
        "preempt",
        "self.grant = None",
        "self.grant, self.num_tokens = None, self.num_prompt_tokens",
        kind="crowded",
    ),
    Mutant(
        "I21",
        "more said to be cached than was skipped",
        StepBuilder,
        "_resume",
        "request.num_cached_tokens = resume_at",
        "request.num_cached_tokens = resume_at + 1",
    ),
)

CLOCKWORK = (
    Mutant(
        "T20",
        "order of a set",
        Scheduler,
        "_due",
        "in self._running.values()",
        "in set(self._running.values())",
    ),
    Mutant(
        "T20",
        "a clock of its own",
        Scheduler,
        "_refuse_late",
        "self._admission.waiting.expired(now)",
        "self._admission.waiting.expired(now + __import__('time').perf_counter_ns() % 1000)",
    ),
)
"""Breaks that only a second run of the same log shows."""


class NoAccumulators(SymbolicDevice):
    """T1: a restored slot has its window and nothing else."""

    def _restore(self, slot: int, snapshot: int, position: int) -> None:
        super()._restore(slot, snapshot, position)
        self._slots[slot, self._ring :] = NOTHING


class NoOverlap(SymbolicDevice):
    """T1: the overlap of the last CSA group is not part of the snapshot."""

    def _restore(self, slot: int, snapshot: int, position: int) -> None:
        super()._restore(slot, snapshot, position)
        self._slots[slot, [self._ring, self._ring + 2]] = NOTHING


class StaleRing(SymbolicDevice):
    """T2: a restore leaves the window of the request before."""

    def _restore(self, slot: int, snapshot: int, position: int) -> None:
        window = self._slots[slot, : self._ring].copy()
        super()._restore(slot, snapshot, position)
        self._slots[slot, : self._ring] = window


class NarrowReplay(SymbolicDevice):
    """T3: the lowest layer begins one row late."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, replay=narrow_replay)


class WindowReplay(SymbolicDevice):
    """T3: every layer runs the last window, as if its rows did not depend on rows before them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, replay=window_replay)


class SmallRing(SymbolicDevice):
    """T4: the ring lacks two rows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ring -= 2
        self._places = np.arange(len(self._places)) % self._ring
        self._slots = self._slots[:, 2:].copy()


class SpillsLast(SymbolicDevice):
    """T12: pages are spilled when something else has been loaded into them."""

    def _move(self, plan: StepPlan) -> None:
        super()._move(plan)
        for page, host_page in plan.page_spills:
            self._spill(page, host_page)


class NoIndexKeys(SymbolicDevice):
    """T12: a load brings the entries and not the index keys."""

    def _load(self, host_page: int, page: int) -> None:
        super()._load(host_page, page)
        self._page_rows[page, 64:128] = NOTHING


class NoCopies(SymbolicDevice):
    """T13: a shared last page is not copied."""

    def _copy(self, source: int, target: int) -> None:
        self._page_filled[target] = True


DEVICE: tuple[Callable[..., SymbolicDevice], ...] = (
    NoAccumulators,
    NoOverlap,
    StaleRing,
    NarrowReplay,
    WindowReplay,
    SmallRing,
    SpillsLast,
    NoIndexKeys,
    NoCopies,
)


def narrow_replay(model: ModelConfig, position: int) -> tuple[LayerReplay, ...]:
    """One row fewer where the triangle is widest; the same where it begins with the first token."""
    first, *others = replay_layers(model, position)
    if first.start:
        first = LayerReplay(start=first.start + 1, fold=first.fold, output=first.output)
    return (first, *others)


def window_replay(model: ModelConfig, position: int) -> tuple[LayerReplay, ...]:
    start = max(0, position - (model.sliding_window - 1))
    return tuple(
        LayerReplay(start=min(start, layer.fold), fold=layer.fold, output=min(start, layer.fold))
        for layer in replay_layers(model, position)
    )
