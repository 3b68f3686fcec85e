"""Sizes against the published arithmetic (bytes per token of history, per row, per 1M-token request)."""

import pytest

from model.kv_layout import KVLayout, index_row_bytes, row_bytes
from model.presets import preset

DRAFTS = 7
GIB = 1 << 30


def layout(name: str, index_format: str = "fp8", row_format: str = "fp8", drafts: int = 0) -> KVLayout:
    return KVLayout(
        config=preset(name),
        row_format=row_format,  # type: ignore[arg-type]
        index_format=index_format,  # type: ignore[arg-type]
        draft_rows=drafts,
    )


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


@pytest.mark.parametrize(("name", "bytes_per_token"), [("flash", 3850), ("pro", 5511)])
def test_history_takes_what_its_rows_take(name: str, bytes_per_token: int) -> None:
    """At most 2 % more, for all requests of which the last page is not most: from 16K tokens on."""
    for num_tokens in (16_384, 16_385, 20_001, 1 << 17, 999_999, 1 << 20):
        assert layout(name).bytes_for(num_tokens) <= 1.02 * bytes_per_token * num_tokens


@pytest.mark.parametrize(("name", "most"), [("flash", 11e6), ("pro", 15e6)])
def test_slot_stays_within_the_budget(name: str, most: float) -> None:
    with_drafts = layout(name, drafts=DRAFTS)
    assert layout(name).bytes_per_slot < with_drafts.bytes_per_slot <= most
    assert with_drafts.window_ring == 128 + DRAFTS


@pytest.mark.parametrize(("name", "least"), [("flash", 20), ("pro", 13)])
def test_requests_of_a_million_tokens_in_80_gib(name: str, least: int) -> None:
    """1,048,576 tokens each, the answer among them, with 32 slots; the workspace is outside."""
    kv = layout(name, drafts=DRAFTS)
    pages = (80 * GIB - 32 * kv.bytes_per_slot) // kv.bytes_per_page
    assert pages // kv.pages_for(1 << 20) >= least


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_what_a_million_tokens_take_beside_their_history(name: str) -> None:
    """At most 100 MB: a slot, the rest of the last page, tokens and table on both sides, and the keys of the pages."""
    kv, num_tokens = layout(name, drafts=DRAFTS), (1 << 20) - 255
    rest = kv.bytes_for(num_tokens) - num_tokens * kv.bytes_per_page // 256
    token_ids, tables, keys = 2 * 4 * num_tokens, 2 * 8 * kv.pages_for(num_tokens), 100 * kv.pages_for(num_tokens)
    assert kv.bytes_per_slot + rest + token_ids + tables + keys <= 100e6


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
    with_drafts = layout(name, drafts=DRAFTS)
    assert with_drafts.bytes_per_snapshot == layout(name).bytes_per_snapshot < with_drafts.bytes_per_slot


def test_snapshot_counts_every_piece() -> None:
    nano = layout("nano", "float32", "float32")
    window = 6 * 127 * 128 * 4
    csa = 2 * 2 * 3 * 4 * (128 + 64)
    hca = 2 * 3 * 4 * 128
    assert nano.bytes_per_snapshot == window + csa + hca
