"""Reports of hand-made runs with known answers, and the data of their pictures."""

import json
import sys
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.messages import EngineStats
from engine.simulation.clock import RequestRecord, Run, StepLog
from engine.simulation.hardware import Machine, StepWork, gpu, simulated_config
from engine.simulation.plot import PlotError, curves, write_png
from engine.simulation.report import Goals, quantiles, served_well, summarize, table
from engine.simulation.workload import SimRequest, Text, Trace, seed_of
from model.presets import preset

FLASH = preset("flash")
MACHINE = Machine(FLASH, simulated_config(FLASH, kv_bytes=80 << 30).layout(FLASH), gpu("h200"))


def record(name: str, kind: str, arrival: float, times: list[float], **fields: Any) -> RequestRecord:
    prompt = fields.pop("prompt", Text([seed_of(name)], [1000]))
    sent = SimRequest(request_id=name, prompt=prompt, answer=Text([1], [5]), kind=kind)
    fields.setdefault("ending", "length")
    return RequestRecord(request=sent, arrival=arrival, token_times=array("d", times), **fields)


def run_of(*records: RequestRecord) -> Run:
    steps = StepLog()
    for i in range(10):
        work = StepWork(decode_contexts=[5] * i, chunks=[(0, 100)] if i % 2 else [])
        stats = EngineStats(num_running=i, num_waiting=10 - i, num_free_pages=100 * i)
        steps.add(float(i), 0.5, work, stats, 1e-4 * (i + 1))
    return Run(
        trace=Trace(name="hand made", requests=tuple(r.request for r in records)),
        records={r.request.request_id: r for r in records},
        steps=steps,
        end=10.0,
        wall_seconds=0.1,
        bytes_in=3_000_000_000,
        bytes_out=1,
        num_preemptions=4,
    )


SHARED = Text([seed_of("system"), seed_of("x")], [900, 100])
RUN = run_of(
    record("a", "chat", 0.0, [0.5, 0.6, 0.7]),
    record("b", "chat", 1.0, [3.0, 3.05, 3.1]),
    record("c", "chat", 2.0, [2.2, 2.9, 3.6]),
    record("d", "chat", 3.0, [], ending="abort"),
    record("e", "chat", 4.0, [], ending="error", error="too_large"),
    record("f", "long", 0.0, [20.0], prompt=SHARED, num_cached_tokens=0),
    record("g", "long", 1.0, [1.1], prompt=Text([seed_of("system")], [950]), num_cached_tokens=768),
)


def test_goodput_is_counted_as_defined() -> None:
    report = summarize(RUN, MACHINE, policy="p")
    chat, long = report.classes
    # a is well, b late, c choppy, d left, e failed.
    assert (chat.kind, chat.num_requests, chat.num_answered, chat.num_cancelled, chat.num_failed) == (
        "chat",
        5,
        3,
        1,
        1,
    )
    assert chat.goodput == 1 / 4 and long.goodput == 1 / 2 and report.total.goodput == 2 / 6
    assert summarize(RUN, MACHINE, policy="p", goals=Goals(ttft_seconds=2.5)).classes[0].goodput == 2 / 4
    assert summarize(RUN, MACHINE, policy="p", goals=Goals(itl_seconds=0.8)).classes[0].goodput == 2 / 4
    assert long.ttft_over_10s == 0.5 and long.ttft.most == 20.0
    assert chat.ttft.p50 == 0.5 and chat.itl.most == pytest.approx(0.7)


def test_own_work_relaxes_the_first_token() -> None:
    late = record("a", "k", 0.0, [4.0])
    assert not served_well(late, 0.9, Goals())
    assert served_well(late, 1.0, Goals())
    assert not served_well(record("a", "k", 0.0, [0.1], ending="unfinished"), 9.0, Goals())


def test_hits_stand_beside_their_bound() -> None:
    long = summarize(RUN, MACHINE, policy="p").classes[1]
    assert long.hit_rate == 768 / 1950 and long.hit_bound == 900 / 1950


def test_requests_that_were_never_sent_do_not_count() -> None:
    run = run_of(record("a", "k", 0.0, [0.5]))
    run.records["a"].arrival = None
    total = summarize(run, MACHINE, policy="p").total
    assert total.num_requests == 0 and total.goodput == 1.0 and total.ttft.most == 0.0


def test_reports_are_json_and_text() -> None:
    report = summarize(RUN, MACHINE, policy="fcfs")
    told = json.loads(json.dumps(report.to_dict()))
    assert told["bytes_in"] == 3_000_000_000 and told["num_preemptions"] == 4 and told["busy"] == 0.5
    assert told["num_decode_rows"] == 45 and told["num_prefill_rows"] == 500
    assert told["classes"][0]["ttft"]["p50"] == 0.5 and told["goals"]["ttft_work"] == 3.0
    lines = table([report, report]).splitlines()
    assert lines[0].split()[:3] == ["policy", "class", "requests"] and len({len(line) for line in lines[:8]}) == 1
    assert [line.split()[1] for line in lines[2:8]] == ["chat", "long", "all"] * 2
    assert "4 preemptions, 3.0 GB in" in lines[-1]


def test_quantiles_of_nothing_and_of_something() -> None:
    assert quantiles(()).most == 0.0
    found = quantiles(np.arange(101.0))
    assert (found.p50, found.p95, found.p99, found.most) == (50.0, 95.0, 99.0, 100.0)


def test_curves_are_distributions_and_columns() -> None:
    panels = curves(RUN)
    x, y = panels["ttft"]["chat"]
    assert x.tolist() == pytest.approx([0.2, 0.5, 2.0]) and y.tolist() == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert len(panels["itl"]["chat"][0]) == 6 and len(panels["itl"]["long"][0]) == 0
    assert panels["queue"]["free pages"][1].tolist() == [100.0 * i for i in range(10)]
    many = run_of(*(record(f"r{i}", "k", 0.0, [float(i), i + 1.0]) for i in range(5000)))
    x, y = curves(many)["ttft"]["k"]
    assert len(x) <= 2000 and x[0] == 0.0 and x[-1] == 4999.0 and y[-1] == 1.0


def test_a_missing_matplotlib_is_said_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotError, match=r"pip install 'fathom\[plot\]'"):
        write_png(tmp_path / "x.png", {"p": RUN})
    with pytest.raises(ValueError, match="no run"):
        write_png(tmp_path / "x.png", {})


def test_the_picture_is_asked_for_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for matplotlib notes what is drawn, so that the calls are run where it is not installed."""
    drawn: list[tuple[str, int]] = []
    saved: list[Path] = []

    class Axis:
        def plot(self, x: np.ndarray, y: np.ndarray, label: str) -> None:
            drawn.append((label, len(x)))

        def __getattr__(self, name: str) -> Any:
            return lambda *args: None

    figure = SimpleNamespace(tight_layout=lambda: None, savefig=lambda path, **_: saved.append(path))
    pyplot = SimpleNamespace(
        subplots=lambda rows, columns, **_: (figure, [[Axis() for _ in range(columns)] for _ in range(rows)]),
        close=lambda _: None,
    )
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(use=lambda _: None))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    write_png(tmp_path / "x.png", {"one": RUN, "two": RUN})
    assert saved == [tmp_path / "x.png"] and len(drawn) == 2 * (2 + 2 + 3)
    assert drawn[0] == ("chat", 3)
