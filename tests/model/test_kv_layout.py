"""Sizes against the published arithmetic (bytes per token of history, per row, per 1M-token request)."""

import pytest

from model.kv_layout import KVLayout, index_row_bytes, row_bytes
from model.presets import preset


def layout(name: str, index_format: str = "fp8", row_format: str = "fp8") -> KVLayout:
    return KVLayout(config=preset(name), row_format=row_format, index_format=index_format)  # type: ignore[arg-type]


def test_rows() -> None:
    assert row_bytes("fp8", 512, 64) == 584
    assert row_bytes("bfloat16", 512, 64) == 1024
    assert index_row_bytes("fp8", 128) == 132
    assert index_row_bytes("fp4", 128) == 68


@pytest.mark.parametrize(
    ("name", "rows", "index", "bytes_per_token"),
    [
        ("flash", "fp8", "fp4", 3514.25),
        ("flash", "fp8", "fp8", 3850.25),
        ("flash", "bfloat16", "bfloat16", 6880),
        ("pro", "fp8", "fp4", 5031.4375),
        ("pro", "fp8", "fp8", 5511.4375),
        ("pro", "bfloat16", "bfloat16", 9848),
    ],
)
def test_history_bytes_per_token(name: str, rows: str, index: str, bytes_per_token: float) -> None:
    assert layout(name, index, rows).bytes_per_page / 256 == bytes_per_token


@pytest.mark.parametrize(("name", "gib"), [("flash", 3.76), ("pro", 5.38)])
def test_a_million_tokens(name: str, gib: float) -> None:
    assert layout(name).bytes_for(1 << 20) / 2**30 == pytest.approx(gib, abs=0.005)


@pytest.mark.parametrize(("name", "most"), [("flash", 11e6), ("pro", 15e6)])
def test_slot_stays_within_the_budget(name: str, most: float) -> None:
    assert layout(name).bytes_per_slot <= most


def test_slot_counts_every_piece() -> None:
    nano = layout("nano", "float32", "float32")
    window = 6 * 128 * 128 * 4
    csa = 2 * 2 * 3 * 4 * (128 + 64)
    hca = 2 * 3 * 4 * 128
    assert nano.bytes_per_slot == window + csa + hca


def test_pages_round_up() -> None:
    nano = layout("nano")
    assert [nano.pages_for(n) for n in (0, 1, 255, 256, 257)] == [0, 1, 1, 1, 2]


@pytest.mark.parametrize(("name", "mib"), [("flash", 3.6), ("pro", 5.1)])
def test_snapshot_stays_within_the_budget(name: str, mib: float) -> None:
    """FP8 rows; room for drafts is part of a slot, not of a snapshot."""
    assert layout(name).bytes_per_snapshot / 2**20 <= mib
    with_drafts = KVLayout(config=preset(name), row_format="fp8", index_format="fp8", draft_rows=16)
    assert with_drafts.bytes_per_snapshot == layout(name).bytes_per_snapshot < with_drafts.bytes_per_slot


def test_snapshot_counts_every_piece() -> None:
    nano = layout("nano", "float32", "float32")
    window = 6 * 127 * 128 * 4
    csa = 2 * 2 * 3 * 4 * (128 + 64)
    hca = 2 * 3 * 4 * 128
    assert nano.bytes_per_snapshot == window + csa + hca
