"""A server whose pages run short while it answers: requests are hibernated in the middle of their answers.

A request starts when there are pages for its prompt and for what a quantile of the answers so far took. Here the
quantile is low, the answers before were of one token, and the next ones are long: GROUP requests find pages for their
prompts, outgrow them together, and take turns.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from embedded.evaluation.client import Client, at_once
from model.config import load_config
from model.kv_layout import PAGE_TOKENS, IndexFormat, KVLayout, RowFormat

GROUP = 5
"""Requests that compete: half of the questions on one text."""
LONG_TOKENS = 400
"""Of each of their answers: one page more, and for most of them two."""
_SPARE_PAGES = 2
_SHORT_ANSWERS = 60
"""Enough that the quantile stays low until 200 long answers have come."""
_SHORT_PROMPT_TOKENS = 8
_HOST_BYTES = 256 << 20


@dataclass(slots=True)
class Counts:
    """Of the long answers; filled in at the end."""

    hibernations: int = 0
    wakes: int = 0


def small_cache_flags(model_dir: Path, row_format: str, prompts: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Flags of a server with pages for the prompts of each group, and hardly more.

    `row_format` is that of the server to compare with, as its /metrics name it.
    """
    index_format = "fp8" if row_format == "fp8" else row_format
    layout = KVLayout(
        config=load_config(model_dir),
        row_format=cast(RowFormat, row_format),
        index_format=cast(IndexFormat, index_format),
    )
    num_pages = max(_pages_of(group) for group in groups(prompts)) + _SPARE_PAGES
    kv_bytes = GROUP * layout.bytes_per_slot + num_pages * layout.bytes_per_page
    return (
        *("--kv-cache-bytes", str(kv_bytes), "--max-num-seqs", str(GROUP)),
        *("--host-cache-bytes", str(_HOST_BYTES), "--output-quantile", "0.05"),
    )


def groups(prompts: Sequence[Sequence[int]]) -> list[Sequence[Sequence[int]]]:
    """The prompts that are sent at once."""
    return [prompts[first : first + GROUP] for first in range(0, len(prompts), GROUP)]


@contextlib.contextmanager
def pressed(client: Client) -> Iterator[Counts]:
    """Make the server expect short answers; count what happens to those that are asked for inside the block."""
    prompt = client.prompt_ids({"messages": [{"role": "user", "content": "Hi"}]})[:_SHORT_PROMPT_TOKENS]
    at_once(lambda n: client.complete(prompt, 1), range(_SHORT_ANSWERS), GROUP)
    counts = Counts()
    hibernations, wakes = _read(client)
    yield counts
    now_hibernations, now_wakes = _read(client)
    counts.hibernations, counts.wakes = now_hibernations - hibernations, now_wakes - wakes


def _read(client: Client) -> tuple[int, int]:
    return int(client.metric("fathom_hibernations_total")), int(client.metric("fathom_wakes_total"))


def _pages_of(prompts: Sequence[Sequence[int]]) -> int:
    """Pages that hold these prompts at once: full ones that begin alike are shared, the last of each is its own."""
    full = {hash(tuple(prompt[:end])) for prompt in prompts for end in range(PAGE_TOKENS, len(prompt) + 1, PAGE_TOKENS)}
    return len(full) + len(prompts)
