"""Long prompts through HTTP, as `tests/bench` measures them: a million tokens, sessions in turns, chats beside one.

The short version runs with the others and holds what does not depend on the clock. The long ones hold the limits.
"""

import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench.bench_beside import measure
from tests.bench.bench_million import SPARE_TOKENS, measure_million, measure_two_sessions
from tests.bench.long_server import go_first, long_model, prefill_flops

HOURS = 3600
GIB = 1 << 30


@pytest.fixture
def first() -> Iterator[None]:
    """Before other work on these cores, where that is allowed."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    go_first()
    yield
    os.setpriority(os.PRIO_PROCESS, 0, before)


def check_turns(turns: list[dict[str, Any]]) -> None:
    later = [turn for turn in turns if turn["turn"]]
    assert later
    for turn in later:
        assert turn["cached_tokens"] == turn["could_be_cached"], turn
        assert turn["miss_reason"] is None, turn


def test_flops_by_hand() -> None:
    """Two tokens in one place or another differ by what they see."""
    model = long_model()
    near, far = prefill_flops(model, 999, 1000), prefill_flops(model, 99_999, 100_000)
    index = 2 * 2 * 4 * 64 * (99_000 / 4)
    entries = 2 * 4 * 8 * 128 * (99_000 / 128)
    assert far - near == pytest.approx(index + entries)
    assert prefill_flops(model, 0, 1000) + prefill_flops(model, 1000, 5000) == pytest.approx(
        prefill_flops(model, 0, 5000)
    )


def test_sessions_return_to_where_they_were(tmp_path: Path) -> None:
    """With device pages for one of two sessions the other one waits in host memory, to its last token."""
    result = measure_two_sessions(tmp_path, 2000, 2000 + SPARE_TOKENS)
    check_turns(result["turns"])
    one_session = 2000 // 256 * result["page_bytes"]
    assert result["moved_bytes"] > 2 * one_session, "no session ever went to host memory and back"


@pytest.mark.long
@pytest.mark.usefixtures("first")
@pytest.mark.timeout(8 * HOURS)
def test_a_million_tokens(tmp_path: Path) -> None:
    result = measure_million(tmp_path)
    assert result["prompt_tokens"] == 1_000_000
    assert result["most_resident_bytes"]["all processes"] < 6 * GIB
    second = result["second_turn"]
    assert second["cached_tokens"] == second["could_be_cached"]
    assert second["share_of_first_ttft"] < 0.01
    # By CPU time: the cores are shared, and whoever shares them comes and goes within the hour.
    pace = [block["gflop_per_cpu_second"] for block in result["pace"]]
    assert len(pace) == 10
    assert min(pace) > 0.7 * pace[0], f"throughput falls faster than the work for a token grows: {pace}"


@pytest.mark.long
@pytest.mark.usefixtures("first")
@pytest.mark.timeout(8 * HOURS)
@pytest.mark.parametrize("sessions_on_device", [2, 1])
def test_two_sessions_of_300k(tmp_path: Path, sessions_on_device: int) -> None:
    result = measure_two_sessions(tmp_path, 300_000, sessions_on_device * (300_000 + SPARE_TOKENS))
    check_turns(result["turns"])


@pytest.mark.long
@pytest.mark.usefixtures("first")
@pytest.mark.timeout(8 * HOURS)
def test_chats_beside_a_long_prompt(tmp_path: Path) -> None:
    runs = [measure(tmp_path, 300_000, run=run)["figures"] for run in range(3)]
    for name in runs[0]:
        assert statistics.median(run[name] for run in runs) <= 1.0, (name, runs)
