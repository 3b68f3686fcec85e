"""Who holds which pages and which slot, what is cached, and how a request comes back to it. No torch, no policy.

    num_pages = own pages of grants + pages of the prefix index + free
    available = free + evictable - promised to admitted requests and not yet taken

A promise is a number; ids are taken as the request grows, from the free pages and then from the cache. An admitted
request can therefore always reach the length that it was admitted for. Beyond it a request grows while pages are
available.

    probe, admit, extend, order_snapshot      while a step is planned; the copies they need gather in a `Moves`
    seal                                      the plan is complete: its moves
    settle, commit, release                   when the step's result is there; only here anything is published (T8)

A request that leaves keeps its slot until the step that writes its last snapshot has run. What a hibernated one comes
back to is pinned (`hibernation`); pins are given up only where nobody could go on otherwise.
"""

import numpy as np

from engine.kv.grant import Grant, Moves, Shortage
from engine.kv.hashing import PageKeys
from engine.kv.hibernation import Hibernation, Hibernations
from engine.kv.misses import Match
from engine.kv.page_pool import PagePool
from engine.kv.prefix_index import PrefixIndex
from engine.kv.resume import ResumeCosts, ResumePlan, plan_resume
from engine.kv.slot_pool import SlotPool
from engine.kv.snapshot_store import Snapshot, SnapshotKind, SnapshotStore
from engine.plan import PageCopy, PageLoad, PageSpill, Replay, SlotRestore, SlotSnapshot
from model.kv_layout import KVLayout

_NOTHING = Match([], 0, [], None)


class KVManager:
    """Pages, slots, cached prefixes and snapshots of one engine."""

    def __init__(
        self,
        layout: KVLayout,
        num_pages: int,
        num_slots: int,
        *,
        costs: ResumeCosts,
        num_host_pages: int = 0,
        num_snapshots: int = 0,
    ) -> None:
        self.layout = layout
        self.pages = PagePool(num_pages)
        self.slots = SlotPool(num_slots)
        self.index = PrefixIndex(
            page_tokens=layout.page_tokens,
            page_bytes=layout.bytes_per_page,
            num_host_pages=num_host_pages,
            seconds_saved=costs.prefill_seconds,
        )
        self.snapshots = SnapshotStore(num_places=num_snapshots, bytes_per_snapshot=layout.bytes_per_snapshot)
        self.hibernations = Hibernations(self.index, self.snapshots)
        self._costs = costs
        self._grants: dict[str, Grant] = {}
        self._num_promised = 0
        self._moves = Moves()
        self._ordered: list[tuple[Snapshot, Grant | None, int | None]] = []
        """Snapshots of the plan in the making: of a live grant, or with the slot that is kept for it."""
        self._in_flight: list[tuple[Snapshot, Grant | None, int | None]] = []
        """Those of the sealed plan: what is released while it runs orders for the next one."""
        self._departing: dict[int, str] = {}
        """Slots that are kept for a last snapshot, and who had them."""

    @property
    def num_available_pages(self) -> int:
        """Pages that are neither held nor promised; cached ones that can be given up are among them."""
        return self.pages.num_free + self.index.num_evictable - self._num_promised

    @property
    def num_free_slots(self) -> int:
        return self.slots.num_free

    @property
    def num_departing(self) -> int:
        """Slots that are kept for a last snapshot."""
        return len(self._departing)

    def probe(self, keys: PageKeys | None, token_ids: np.ndarray) -> ResumePlan:
        """The cheapest way into a request's tokens; valid until the books change."""
        return self._plan(_NOTHING if keys is None else self.index.match(keys, token_ids), len(token_ids))

    def admit(
        self,
        request_id: str,
        num_tokens: int,
        plan: ResumePlan | None = None,
        keys: PageKeys | None = None,
        token_ids: np.ndarray | None = None,
        now: float = 0.0,
    ) -> tuple[Grant, int] | Shortage:
        """Give a slot and promise pages for `num_tokens` tokens, or say what is missing.

        Returns the grant and the position at which the request goes on. That is the plan's; where nobody else runs and
        memory is too small for the copies that it needs, a smaller one. Where nobody runs a request that fits memory is
        always admitted: then, at last, other requests' hibernation is given up for it.
        """
        assert request_id not in self._grants, f"{request_id} is admitted twice"
        plan = plan or self._plan(_NOTHING, num_tokens)
        if self.slots.num_free:
            shortage = self._take(request_id, num_tokens, plan, keys, now)
            if isinstance(shortage, Grant):
                return shortage, plan.resume_at
            if self._grants or self._departing or keys is None:
                return shortage
            while self.hibernations.give_up(spare=request_id):
                grant = self._take(request_id, num_tokens, plan, keys, now)
                if isinstance(grant, Grant):
                    return grant, plan.resume_at
            self.hibernations.num_given_up += self.hibernations.end(request_id)
            for match in self._smaller(keys, token_ids) if plan.resume_at else [_NOTHING]:
                plan = self._plan(match, num_tokens if token_ids is None else len(token_ids))
                grant = self._take(request_id, num_tokens, plan, keys, now)
                if isinstance(grant, Grant):
                    return grant, plan.resume_at
            return shortage
        return self._shortage(self.layout.pages_for(num_tokens))

    def unpin_until(self, num_pages: int) -> None:
        """Give up hibernations, those that matter least first, until that many pages are available or pins keep none
        from it. The last resort: what is dropped then is computed again.
        """
        while self.num_available_pages < num_pages and self.index.num_stuck and self.hibernations.give_up():
            pass

    def extend(self, grant: Grant, num_tokens: int) -> tuple[int, ...] | Shortage:
        """Grow a table until it covers `num_tokens` tokens; returns the pages that were appended.

        Within the reservation there is never a shortage; beyond it the reservation grows while pages are available.
        """
        missing = self.layout.pages_for(num_tokens) - len(grant.page_ids)
        if missing <= 0:
            return ()
        beyond = len(grant.page_ids) + missing - grant.num_reserved_pages
        if beyond > 0:
            if beyond > self.num_available_pages:
                return self._shortage(beyond)
            grant.num_reserved_pages += beyond
            self._num_promised += beyond
        page_ids = self._allocate(missing)
        grant.page_ids.extend(page_ids)
        grant.own_pages.update(page_ids)
        self._num_promised -= missing
        return page_ids

    def order_snapshot(
        self, grant: Grant, token_ids: np.ndarray, position: int, kind: SnapshotKind, now: float
    ) -> None:
        """Let the step being planned, which brings the slot to `position`, keep it there. Where there is
        no place for it, or there is one already, nothing happens.
        """
        snapshot = self._order(grant, token_ids, position, kind, now)
        if snapshot is not None:
            self._moves.slot_snapshots.append(SlotSnapshot(grant.slot, position, snapshot.place))
            self._ordered.append((snapshot, grant, None))

    def seal(self) -> Moves:
        """The plan is complete."""
        self.index.seal()
        moves, self._moves = self._moves, Moves()
        self._in_flight, self._ordered = self._ordered, []
        return moves

    def settle(self, failed: set[str], lost: Moves | None) -> None:
        """The step has run; what it wrote for `failed` requests is not to be trusted, and nothing when it was `lost`.

        Before `commit`: the page that a snapshot stands in is published with it.
        """
        ordered, self._in_flight = self._in_flight, []
        for snapshot, grant, slot in ordered:
            gone = grant is not None and self._grants.get(grant.request_id) is not grant
            if lost is not None or gone or (grant is not None and grant.request_id in failed):
                self.hibernations.lose_snapshot(snapshot)
                self.snapshots.cancel(snapshot)
            else:
                self.snapshots.commit(snapshot)
                if grant is not None:
                    grant.marks.add(snapshot.position)
            if slot is not None:
                self.slots.free(slot, self._departing.pop(slot))

    def forget_lost(self, lost: Moves) -> None:
        """Pages that a lost step was to move hold nothing. After the step's requests have been released."""
        host = {spill.host_page for spill in lost.page_spills}
        device = {load.page for load in lost.page_loads}
        self.hibernations.lose_pages(host, device)
        dropped = self.index.discard(host, device)
        self.pages.free(dropped.page_ids)
        self.snapshots.discard(dropped.lost)

    def commit(self, grant: Grant, token_ids: np.ndarray, num_computed: int, now: float) -> None:
        """Publish the pages that a step has filled."""
        keys, page_tokens = grant.keys, self.layout.page_tokens
        if keys is None or grant.tip is None or num_computed // page_tokens <= grant.tip.depth:
            return
        keys.extend(token_ids)
        while grant.tip.depth < num_computed // page_tokens:
            start = grant.tip.depth * page_tokens
            tails = self._tails(grant, token_ids, start, start + page_tokens)
            page_id = grant.page_ids[grant.tip.depth]
            published = self.index.publish(grant.tip, keys, page_id, now, tails)
            if published.adopted:
                grant.own_pages.remove(page_id)
            self.pages.free(published.freed)
            grant.tip = published.node

    def release(
        self,
        grant: Grant,
        token_ids: np.ndarray | None = None,
        num_computed: int = 0,
        now: float = 0.0,
        *,
        keep: SnapshotKind | None = None,
        priority: int = 0,
    ) -> None:
        """Take everything back. Only after the last step that may touch it has run.

        With `keep` the request's last page is cached and its slot, which stands at `num_computed`, is snapshotted by
        the next plan; until that has run the slot is not free. "hibernate" pins both, until the request is admitted
        again or `forget` is called; those of the lowest `priority` are given up first.
        """
        assert self._grants.pop(grant.request_id, None) is grant, f"{grant.request_id} is released twice"
        self._num_promised -= grant.num_reserved_pages - len(grant.page_ids)
        snapshot: Snapshot | None = None
        if grant.tip is not None:
            if keep is not None and num_computed and token_ids is not None:
                self.commit(grant, token_ids, num_computed, now)
                snapshot = self._order(grant, token_ids, num_computed, keep, now)
                if snapshot is not None:
                    grant.marks.add(num_computed)
                self._publish_rest(grant, token_ids, num_computed, now)
                if keep == "hibernate":
                    self._hibernate(grant, token_ids, num_computed, priority)
            elif token_ids is not None:
                self.snapshots.discard(self._unseen(grant, token_ids))
            self.index.release(grant.tip, now)
        self.pages.free(sorted(grant.own_pages))
        if snapshot is None:
            self.slots.free(grant.slot, grant.request_id)
        else:
            self._moves.slot_snapshots.append(SlotSnapshot(grant.slot, num_computed, snapshot.place))
            self._ordered.append((snapshot, None, grant.slot))
            self._departing[grant.slot] = grant.request_id

    def forget(self, request_id: str) -> None:
        """A request that waits is gone; nothing is kept for it any more."""
        self.hibernations.end(request_id)

    def check(self) -> None:
        """Recompute the books from the grants; AssertionError names the first lie."""
        own = [page_id for grant in self._grants.values() for page_id in grant.own_pages]
        assert len(set(own)) == len(own), "a page has two owners"
        cached = self.index.device_pages()
        assert not cached & set(own), "a page is owned and cached"
        self.pages.check(cached | set(own))
        self.slots.check({**{g.slot: g.request_id for g in self._grants.values()}, **self._departing})
        for grant in self._grants.values():
            assert len(set(grant.page_ids)) == len(grant.page_ids), "a page is in a table twice"
            assert grant.own_pages <= set(grant.page_ids), "a page is owned and in no table"
            for i, page_id in enumerate(grant.page_ids):
                assert page_id in grant.own_pages or page_id in cached, "a table has a page that is nobody's"
                published = grant.tip is not None and i < grant.tip.depth
                assert published or page_id in grant.own_pages, "a page that is written has readers"
        tips = [g.tip for g in self._grants.values() if g.tip is not None]
        self.index.check(tips, [h.tip for h in self.hibernations])
        self.snapshots.check()
        self.hibernations.check()
        promised = sum(g.num_reserved_pages - len(g.page_ids) for g in self._grants.values())
        assert promised == self._num_promised, f"{self._num_promised} pages promised, the grants say {promised}"
        assert self.num_available_pages >= 0, "more pages are promised than there are"

    def _plan(self, match: Match, num_tokens: int) -> ResumePlan:
        return plan_resume(
            match,
            num_tokens,
            self.snapshots,
            self._costs,
            page_tokens=self.layout.page_tokens,
            bytes_per_page=self.layout.bytes_per_page,
        )

    def _smaller(self, keys: PageKeys, token_ids: np.ndarray | None) -> list[Match]:
        """What is found without pages to copy or to load, and nothing."""
        if token_ids is None:
            return [_NOTHING]
        match = self.index.match(keys, token_ids)
        return [Match(match.nodes[: match.num_on_device], match.num_on_device, [], match.end), _NOTHING]

    def _take(
        self, request_id: str, num_tokens: int, plan: ResumePlan, keys: PageKeys | None, now: float
    ) -> Grant | Shortage:
        """Carry out a resume plan if pages allow it."""
        wanted = self.layout.pages_for(num_tokens) - plan.num_on_device
        shared = plan.nodes if plan.source is None else [*plan.nodes, plan.source]
        evictable = self.index.num_evictable_beside(shared)
        if wanted > self.pages.num_free + evictable - self._num_promised:
            return self._shortage(wanted)
        grant = Grant(
            request_id=request_id,
            slot=self.slots.allocate(request_id),
            num_reserved_pages=self.layout.pages_for(num_tokens),
            num_admitted_pages=self.layout.pages_for(num_tokens),
            keys=keys,
        )
        if keys is not None:
            grant.tip = plan.nodes[-1] if plan.nodes else self.index.root(keys.root)
            self.index.acquire(grant.tip)
            if plan.source is not None:
                self.index.hold(plan.source)
            assert wanted <= self.num_available_pages, "taking shared pages has cost more than they are"
            self.hibernations.end(request_id)
        self._grants[request_id] = grant
        self._num_promised += wanted
        self._bring(grant, plan, now)
        return grant

    def _bring(self, grant: Grant, plan: ResumePlan, now: float) -> None:
        """Put what a plan resumes from into the table and the slot."""
        num_loads = len(plan.nodes) - plan.num_on_device
        if num_loads:
            assert grant.tip is not None
            copies = self.index.load(grant.tip, self._allocate(num_loads))
            self._moves.page_loads += [PageLoad(*copy) for copy in copies]
        for node in plan.nodes:
            assert node.page_id is not None
            grant.page_ids.append(node.page_id)
        self._num_promised -= num_loads
        if plan.source is not None:
            (target,) = self._allocate(1)
            self._num_promised -= 1
            grant.page_ids.append(target)
            grant.own_pages.add(target)
            if plan.source.page_id is not None:
                self._moves.page_copies.append(PageCopy(source=plan.source.page_id, target=target))
            else:
                assert plan.source.host_page is not None
                self._moves.page_loads.append(PageLoad(plan.source.host_page, target))
        if plan.resume_at:
            grant.marks.add(plan.resume_at)
        if plan.snapshot is not None:
            self.snapshots.use(plan.snapshot, now)
            self._moves.slot_restores.append(SlotRestore(grant.slot, plan.snapshot.place, plan.resume_at))
        elif plan.replay:
            self._moves.replays.append(Replay(grant.request_id, grant.slot, plan.resume_at))

    def _allocate(self, count: int) -> tuple[int, ...]:
        """Pages that are known to be available, from the cache where none is free."""
        missing = count - self.pages.num_free
        if missing > 0:
            evicted = self.index.evict(missing)
            self.pages.free(evicted.page_ids)
            self.snapshots.discard(evicted.lost)
            self._moves.page_spills += [PageSpill(*spill) for spill in evicted.spills]
        return self.pages.allocate(count)

    def _hibernate(self, grant: Grant, token_ids: np.ndarray, position: int, priority: int) -> None:
        """Pin what a leaving request has in the cache, which its table still holds."""
        assert grant.keys is not None and grant.tip is not None
        self.hibernations.begin(
            Hibernation(
                request_id=grant.request_id,
                tip=grant.tip,
                snapshot=self.snapshots.get(self._key(grant.keys, token_ids, position)),
                position=position,
                priority=priority,
            )
        )

    def _order(
        self, grant: Grant, token_ids: np.ndarray, position: int, kind: SnapshotKind, now: float
    ) -> Snapshot | None:
        if grant.keys is None or not self.snapshots.num_places:
            return None
        key = self._key(grant.keys, token_ids, position)
        if self.snapshots.get(key) is not None:
            return None
        start = position // self.layout.page_tokens * self.layout.page_tokens
        again = self._costs.replay_seconds(start) + self._costs.prefill_seconds(start, position)
        saved = min(self._costs.prefill_seconds(0, position), again)
        return self.snapshots.order(key, position, kind, seconds_saved=saved, now=now)

    def _key(self, keys: PageKeys, token_ids: np.ndarray, position: int) -> bytes:
        """Name of a position; see `Mark.key`."""
        depth = position // self.layout.page_tokens
        if len(keys.keys) < depth:
            keys.extend(token_ids)
        start = depth * self.layout.page_tokens
        return (keys.keys[depth - 1] if depth else keys.root) + token_ids[start:position].tobytes()

    def _tails(self, grant: Grant, token_ids: np.ndarray, start: int, end: int) -> list[bytes]:
        """Marks inside a page, as its first tokens."""
        return [token_ids[start:mark].tobytes() for mark in sorted(grant.marks) if start < mark < end]

    def _unseen(self, grant: Grant, token_ids: np.ndarray) -> list[bytes]:
        """Names of the positions whose rows go with the grant: no page of the index has them."""
        names = []
        for mark in grant.marks:
            assert grant.keys is not None
            start = mark // self.layout.page_tokens * self.layout.page_tokens
            name, tail = self._key(grant.keys, token_ids, mark), token_ids[start:mark].tobytes()
            if not self.index.has(name[: len(name) - len(tail)], tail):
                names.append(name)
        return names

    def _publish_rest(self, grant: Grant, token_ids: np.ndarray, num_computed: int, now: float) -> None:
        """The last page of a request that leaves, if it is not full."""
        assert grant.tip is not None
        start = grant.tip.depth * self.layout.page_tokens
        if num_computed == start:
            return
        page_id = grant.page_ids[grant.tip.depth]
        tails = self._tails(grant, token_ids, start, num_computed)
        rest = token_ids[start:num_computed].tobytes()
        published = self.index.publish_partial(grant.tip, rest, page_id, now, tails)
        if published.adopted:
            grant.own_pages.remove(page_id)
        self.pages.free(published.freed)
        grant.tip = published.node

    def _shortage(self, wanted: int) -> Shortage:
        return Shortage(
            pages_wanted=wanted, pages_available=self.num_available_pages, slots_available=self.slots.num_free
        )
