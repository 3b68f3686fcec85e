"""What a simulation says: latencies for each class, goodput under goals, hits against their bound, bytes moved.

goodput    share of the answered or refused requests (not those that the client cancelled) with
           TTFT <= ttft_seconds + ttft_work * own work  and  the 95th percentile of its own ITLs <= itl_seconds
own work   seconds that the request would take alone on the machine with an infinite cache: its uncached prompt
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engine.simulation.clock import RequestRecord, Run
from engine.simulation.hardware import Machine
from engine.simulation.workload import reusable_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Goals:
    """When a request was served well."""

    ttft_seconds: float = 1.0
    ttft_work: float = 3.0
    itl_seconds: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """Of a set of durations in seconds; all 0 when it is empty."""

    p50: float
    p95: float
    p99: float
    most: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassReport:
    """The requests of one class, or all of them."""

    kind: str
    num_requests: int
    """That were sent."""
    num_answered: int
    num_cancelled: int
    num_failed: int
    """Refused, failed, or not answered when the simulation ended."""
    ttft: Quantiles
    ttft_over_10s: float
    """Share of the first tokens that took more than ten seconds."""
    itl: Quantiles
    goodput: float
    hit_rate: float
    hit_bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run. `to_dict` is JSON; all of it but `wall_seconds` and `planner` repeats exactly."""

    policy: str
    trace: str
    seconds: float
    busy: float
    """Share of the time in which a step ran."""
    num_steps: int
    num_prefill_rows: int
    num_decode_rows: int
    num_preemptions: int
    bytes_in: int
    bytes_out: int
    goals: Goals
    total: ClassReport
    classes: tuple[ClassReport, ...]
    wall_seconds: float
    planner: Quantiles
    """Real seconds of planning and committing a step."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarize(run: Run, machine: Machine, *, policy: str, goals: Goals | None = None) -> Report:
    """Reduce a run to its report."""
    goals = goals or Goals()
    reusable = reusable_tokens(run.trace)
    kinds: dict[str, list[RequestRecord]] = {}
    for record in run.records.values():
        kinds.setdefault(record.request.kind, []).append(record)

    def of(kind: str, records: Iterable[RequestRecord]) -> ClassReport:
        return _class_report(kind, [r for r in records if r.arrival is not None], machine, goals, reusable)

    steps = run.steps
    return Report(
        policy=policy,
        trace=run.trace.name,
        seconds=run.end,
        busy=float(np.sum(steps.seconds)) / run.end if run.end else 0.0,
        num_steps=len(steps.seconds),
        num_prefill_rows=int(np.sum(steps.num_prefill_rows)),
        num_decode_rows=int(np.sum(steps.num_decode_rows)),
        num_preemptions=run.num_preemptions,
        bytes_in=run.bytes_in,
        bytes_out=run.bytes_out,
        goals=goals,
        total=of("all", run.records.values()),
        classes=tuple(of(kind, records) for kind, records in kinds.items()),
        wall_seconds=run.wall_seconds,
        planner=quantiles(steps.planner_seconds),
    )


def quantiles(seconds: "Sequence[float] | np.ndarray") -> Quantiles:
    values = np.asarray(seconds, dtype=np.float64)
    if not len(values):
        return Quantiles(p50=0.0, p95=0.0, p99=0.0, most=0.0)
    p50, p95, p99 = np.percentile(values, (50, 95, 99))
    return Quantiles(p50=float(p50), p95=float(p95), p99=float(p99), most=float(values.max()))


def served_well(record: RequestRecord, own_seconds: float, goals: Goals) -> bool:
    """Whether one request met the goals; `own_seconds` is its own work."""
    ttft = record.ttft
    if record.ending not in ("stop", "length") or ttft is None:
        return False
    itls = record.itls
    steady = not len(itls) or float(np.percentile(itls, 95)) <= goals.itl_seconds
    return steady and ttft <= goals.ttft_seconds + goals.ttft_work * own_seconds


def _class_report(
    kind: str, records: list[RequestRecord], machine: Machine, goals: Goals, reusable: Mapping[str, int]
) -> ClassReport:
    answered = [r for r in records if r.ending in ("stop", "length")]
    judged = [r for r in records if r.ending != "abort"]
    ttfts = np.array([r.ttft for r in records if r.ttft is not None], dtype=np.float64)
    itls = [r.itls for r in records if len(r.token_times) > 1]
    well = 0
    for record in judged:
        request = record.request
        own = machine.prefill_seconds(reusable[request.request_id], request.prompt.num_tokens)
        well += served_well(record, own, goals)
    num_prompt_tokens = max(1, sum(r.request.prompt.num_tokens for r in records))
    return ClassReport(
        kind=kind,
        num_requests=len(records),
        num_answered=len(answered),
        num_cancelled=len(records) - len(judged),
        num_failed=len(judged) - len(answered),
        ttft=quantiles(ttfts),
        ttft_over_10s=float((ttfts > 10.0).mean()) if len(ttfts) else 0.0,
        itl=quantiles(np.concatenate(itls) if itls else ()),
        goodput=well / len(judged) if judged else 1.0,
        hit_rate=sum(r.num_cached_tokens for r in records) / num_prompt_tokens,
        hit_bound=sum(reusable[r.request.request_id] for r in records) / num_prompt_tokens,
    )


_COLUMNS = (
    "policy", "class", "requests", "failed", "TTFT p50", "p95", "p99", ">10 s",
    "ITL p50", "p95", "p99", "max", "goodput", "hits", "bound",
)  # fmt: skip


def table(reports: Sequence[Report]) -> str:
    """The reports as text, a line for each policy and class; times in seconds."""
    lines: list[tuple[str, ...]] = [_COLUMNS]
    for report in reports:
        classes = (*report.classes, report.total) if len(report.classes) > 1 else (report.total,)
        lines += [(report.policy, *_cells(c)) for c in classes]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    rows = ["  ".join(_cell(line, widths, i) for i in range(len(_COLUMNS))) for line in lines]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:], "", *(_footnote(report) for report in reports)])


def _cells(report: ClassReport) -> tuple[str, ...]:
    ttft, itl = report.ttft, report.itl
    return (
        report.kind,
        str(report.num_requests),
        str(report.num_failed),
        *(_seconds(s) for s in (ttft.p50, ttft.p95, ttft.p99)),
        _share(report.ttft_over_10s),
        *(_seconds(s) for s in (itl.p50, itl.p95, itl.p99, itl.most)),
        *(_share(s) for s in (report.goodput, report.hit_rate, report.hit_bound)),
    )


def _cell(line: tuple[str, ...], widths: list[int], i: int) -> str:
    return line[i].ljust(widths[i]) if i < 2 else line[i].rjust(widths[i])


def _footnote(report: Report) -> str:
    return (
        f"{report.policy}: {report.seconds:.0f} s simulated in {report.wall_seconds:.1f} s, {report.num_steps} steps, "
        f"busy {_share(report.busy)}, {report.num_prefill_rows} prompt rows, {report.num_preemptions} preemptions, "
        f"{report.bytes_in / 1e9:.1f} GB in, {report.bytes_out / 1e9:.1f} GB out, "
        f"planner p50 {report.planner.p50 * 1e6:.0f} us, p99 {report.planner.p99 * 1e6:.0f} us a step"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds < 10.0 else f"{seconds:.1f}"


def _share(share: float) -> str:
    return f"{100.0 * share:.1f} %"
