"""The baselines behave as the engines they stand for, and their books are right under random traffic."""

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import ResolvedConfig
from engine.simulation.baselines import BASELINES, BaselineScheduler, PageCache, page_keys
from engine.simulation.clock import Run, simulate
from engine.simulation.generators import agent_sessions, cancel_storm, chat_and_long, fan_out
from engine.simulation.hardware import Machine, gpu, simulated_config
from engine.simulation.report import summarize
from engine.simulation.workload import SimRequest, Text, Trace, seed_of
from model.presets import preset

FLASH = preset("flash")


def config_of(**changes: Any) -> ResolvedConfig:
    return replace(simulated_config(FLASH, kv_bytes=80 << 30, max_num_seqs=64), **changes)


def run_baseline(policy: Any, trace: Trace, *, checked: bool = False, **changes: Any) -> tuple[Run, BaselineScheduler]:
    config = config_of(**changes)
    scheduler = BaselineScheduler(config, policy)
    machine = Machine(FLASH, config.layout(FLASH), gpu("h200"))
    return simulate(trace, scheduler, machine, check=scheduler.check if checked else None), scheduler


def request(name: str, prompt: int, answer: int, arrival: float = 0.0) -> SimRequest:
    return SimRequest(
        request_id=name,
        prompt=Text([seed_of(name)], [prompt]),
        answer=Text([seed_of(name, "answer")], [answer]),
        kind="test",
        arrival=arrival,
    )


CONVOY = Trace(
    name="convoy",
    requests=(request("before", 1000, 3000), request("long", 400_000, 10, 1.0), request("short", 1000, 10, 2.0)),
)


def test_fcfs_mixes_but_the_long_prompt_takes_the_budget() -> None:
    run, _ = run_baseline("fcfs", CONVOY)
    records = run.records
    # The short one starts when the long prompt leaves rows over; whoever decodes goes on, at the pace of full steps.
    assert records["short"].token_times[0] >= records["long"].token_times[0]
    assert records["before"].itls.max() < 1.0
    assert max(run.steps.num_prefill_rows) + 1 <= 8192
    mixed = [d > 0 and p > 0 for d, p in zip(run.steps.num_decode_rows, run.steps.num_prefill_rows, strict=True)]
    assert sum(mixed) >= 40


def test_prefill_first_stops_those_that_decode() -> None:
    run, _ = run_baseline("prefill-first", CONVOY)
    records = run.records
    assert records["before"].itls.max() == pytest.approx(records["long"].ttft, rel=0.2)
    mixed = [d > 0 and p > 0 for d, p in zip(run.steps.num_decode_rows, run.steps.num_prefill_rows, strict=True)]
    assert not any(mixed)


@pytest.mark.parametrize("policy", BASELINES)
def test_shared_prefixes_are_hits_for_the_baselines_too(policy: Any) -> None:
    run, _ = run_baseline(policy, agent_sessions(seconds=60, turns=5), checked=True)
    total = summarize(run, Machine(FLASH, config_of().layout(FLASH), gpu("h200")), policy=policy).total
    assert total.num_answered == total.num_requests == len(run.records)
    # Whole pages only, and a turn's last page is not full.
    assert total.hit_bound - 0.02 < total.hit_rate <= total.hit_bound
    run, _ = run_baseline(policy, fan_out(num_requests=80))
    later = [r.num_cached_tokens for r in run.records.values()][40:]
    assert min(later) == 30_000 // 256 * 256


@pytest.mark.parametrize("policy", BASELINES)
@pytest.mark.parametrize("seed", range(2))
def test_cancel_storms_and_shortage_leave_nothing_behind(policy: Any, seed: int) -> None:
    trace = cancel_storm(num_requests=120, prompt_tokens=12_000, answer=800, rate=20.0, seed=seed)
    run, scheduler = run_baseline(policy, trace, checked=True, num_pages=400, max_num_seqs=24, max_model_len=90_000)
    assert run.num_preemptions > 0, "pages were never short"
    assert {r.ending for r in run.records.values()} <= {"abort", "length", "error"}
    assert scheduler.pages.num_available == 400 and not scheduler.pages.num_private
    for record in run.records.values():
        if record.ending == "length":
            assert len(record.token_times) == record.request.answer.num_tokens


@pytest.mark.parametrize("policy", BASELINES)
def test_what_can_never_fit_is_refused(policy: Any) -> None:
    run, _ = run_baseline(
        policy, Trace(name="big", requests=(request("a", 9000, 5), request("b", 100, 5))), num_pages=20
    )
    assert run.records["a"].error == "too_large" and run.records["b"].ending == "length"


def test_the_convoy_of_the_fact_sheet() -> None:
    """Kv-and-scheduling 7.3, one round of it: whoever comes while the long prompt runs waits for it."""
    trace = chat_and_long(seconds=300.0, seed=1)
    for policy in BASELINES:
        run, _ = run_baseline(policy, trace)
        report = summarize(run, Machine(FLASH, config_of().layout(FLASH), gpu("h200")), policy=policy)
        chat = next(c for c in report.classes if c.kind == "chat")
        assert chat.ttft.p99 > 60.0 and report.total.goodput < 0.5
        assert chat.itl.most > (100.0 if policy == "prefill-first" else 0.3)


class _NaivePages:
    """What `PageCache` does, with lists of owners."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.private = 0
        self.owners: OrderedDict[int, int] = OrderedDict()

    def available(self) -> int:
        return self.num_pages - self.private - sum(1 for n in self.owners.values() if n)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_page_cache_books(data: st.DataObject) -> None:
    """Random requests over a few texts: what is available is what nobody holds, and held pages are never evicted."""
    cache, naive = PageCache(12), _NaivePages(12)
    held: list[tuple[list[int], int]] = []
    for _ in range(data.draw(st.integers(1, 30))):
        if held and data.draw(st.booleans()):
            keys, private = held.pop(data.draw(st.integers(0, len(held) - 1)))
            cache.release(keys, private)
            naive.private -= private
            for key in keys:
                naive.owners[key] -= 1
        else:
            chain = [100 * data.draw(st.integers(0, 3)) + i for i in range(data.draw(st.integers(1, 6)))]
            matched = cache.match(chain)
            cache.hold(chain[:matched])
            for key in chain[:matched]:
                naive.owners[key] += 1
            missing = len(chain) - matched
            assert cache.take(missing) == (missing <= naive.available())
            if missing > naive.available():
                cache.release(chain[:matched], 0)
                for key in chain[:matched]:
                    naive.owners[key] -= 1
                continue
            naive.private += missing
            published = data.draw(st.integers(matched, len(chain)))
            for key in chain[matched:published]:
                cache.publish(key)
                naive.private -= 1
                naive.owners[key] = naive.owners.get(key, 0) + 1
            held.append((chain[:published], len(chain) - published))
        assert cache.num_available == naive.available()
        cache.check([keys for keys, _ in held], naive.private)
        for keys, _ in held:
            assert cache.match(keys) == len(keys), "a held page was evicted"


def test_keys_are_chained() -> None:
    tokens = np.arange(1000, dtype=np.int32)
    keys = page_keys(tokens, [])
    assert len(keys) == 3 and page_keys(tokens, keys[:1]) == keys
    changed = tokens.copy()
    changed[0] = 7
    assert not set(page_keys(changed, [])) & set(keys)
    changed = tokens.copy()
    changed[300] = 7
    assert page_keys(changed, [])[0] == keys[0] and not set(page_keys(changed, [])[1:]) & set(keys)
