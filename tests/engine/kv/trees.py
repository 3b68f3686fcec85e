"""Small prefix indexes with pages of four tokens."""

from collections.abc import Sequence

import numpy as np

from engine.kv.hashing import PageHasher, PageKeys
from engine.kv.prefix_index import PrefixIndex
from engine.kv.prefix_node import Node

P = 4
HALF_LIFE = 30.0
HASHER = PageHasher(bytes(32), "test", P)

Prefix = tuple[str, tuple[int, ...]]
"""Salt and tokens: names a page (by the prefix that it ends) or a position."""


def seconds_saved(start: int, end: int) -> float:
    return (end - start) * (1.0 + end / 10)


def index(num_host_pages: int = 8, **more: int) -> PrefixIndex:
    return PrefixIndex(
        page_tokens=P,
        page_bytes=100,
        num_host_pages=num_host_pages,
        seconds_saved=seconds_saved,
        half_life_seconds=HALF_LIFE,
        **more,
    )


def ids(tokens: Sequence[int]) -> np.ndarray:
    return np.asarray(tokens, dtype=np.int32)


def keys_of(tokens: Sequence[int], salt: str = "") -> PageKeys:
    return PageKeys(HASHER, salt, ids(tokens))


def name_of(prefix: Prefix) -> bytes:
    """Key of a node or position."""
    salt, tokens = prefix
    keys, rest = keys_of(tokens, salt), tokens[len(tokens) // P * P :]
    return (keys.keys[-1] if keys.keys else keys.root) + ids(rest).tobytes()


def publish_all(
    tree: PrefixIndex,
    tokens: list[int],
    first_page: int,
    *,
    now: float = 0.0,
    salt: str = "",
    positions: frozenset[int] | set[int] = frozenset(),
) -> Node:
    """Publish every page of `tokens` as the pages first_page, first_page + 1, ...; returns the acquired tip.

    `positions` of the last, incomplete page can be resumed at.
    """
    keys = keys_of(tokens, salt)
    tip = tree.root(keys.root)
    tree.acquire(tip)
    for i in range(len(keys.keys)):
        tip = tree.publish(tip, keys, first_page + i, now).node
    rest = tokens[len(keys.keys) * P :]
    if rest:
        tails = [ids(rest[: p - len(tokens) + len(rest)]).tobytes() for p in positions]
        tip = tree.publish_partial(tip, ids(rest).tobytes(), first_page + len(keys.keys), now, tails).node
    return tip
