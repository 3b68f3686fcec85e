"""Pictures of simulations: latency distributions by class and the queue over time. Needs matplotlib (extra `plot`)."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.simulation.clock import Run

_MOST_POINTS = 2000


class PlotError(RuntimeError):
    """The picture cannot be drawn here; says what is missing."""


def curves(run: Run) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The data of a picture, panel by panel: name to (x, y), at most 2,000 points each.

    ttft, itl    class to (seconds ascending, share of the class at or below)
    queue        running, waiting, free pages to (virtual seconds, number)
    """
    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {"ttft": {}, "itl": {}, "queue": {}}
    by_kind: dict[str, list[tuple[float, np.ndarray]]] = {}
    for record in run.records.values():
        if record.ttft is not None:
            by_kind.setdefault(record.request.kind, []).append((record.ttft, record.itls))
    for kind, values in by_kind.items():
        panels["ttft"][kind] = _distribution(np.array([ttft for ttft, _ in values]))
        panels["itl"][kind] = _distribution(np.concatenate([itls for _, itls in values]))
    steps = run.steps
    times = np.asarray(steps.start)
    picked = _thinned(len(times))
    for name, column in (
        ("running", steps.num_running),
        ("waiting", steps.num_waiting),
        ("free pages", steps.num_free_pages),
    ):
        panels["queue"][name] = (times[picked], np.asarray(column, dtype=np.float64)[picked])
    return panels


def write_png(path: Path, runs: Mapping[str, Run]) -> None:
    """Draw a row of panels for each named run.

    Raises:
        PlotError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    if not runs:
        raise ValueError("there is no run to draw")
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        pyplot: Any = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise PlotError("a picture needs matplotlib: pip install 'fathom[plot]'") from error
    figure, rows = pyplot.subplots(len(runs), 3, figsize=(15, 4 * len(runs)), squeeze=False)
    for axes, (name, run) in zip(rows, runs.items(), strict=True):
        panels = curves(run)
        for axis, panel, label in zip(axes, ("ttft", "itl", "queue"), ("TTFT (s)", "ITL (s)", "time (s)"), strict=True):
            for series, (x, y) in panels[panel].items():
                axis.plot(x, y, label=series)
            axis.set_xlabel(label)
            axis.set_title(f"{name}: {panel}")
            if panels[panel]:
                axis.legend()
            axis.set_xscale("linear" if panel == "queue" else "log")
            axis.set_yscale("symlog" if panel == "queue" else "linear")
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=110)
    pyplot.close(figure)


def _distribution(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending values and the share of all values up to each, thinned."""
    picked = _thinned(len(values))
    return np.sort(values)[picked], (picked + 1) / max(1, len(values))


def _thinned(count: int) -> np.ndarray:
    """int64: at most `_MOST_POINTS` of the indices 0 .. count - 1, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, _MOST_POINTS)).astype(np.int64))
