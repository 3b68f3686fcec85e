"""Page keys against a restatement of their definition, and what must change them."""

import time
from hashlib import blake2b

import numpy as np
import pytest

from engine.kv.hashing import KEY_BYTES, PageHasher, PageKeys

SECRET = bytes(range(32))


def hasher(secret: bytes = SECRET, epoch: str = "weights-1/fp8", page_tokens: int = 256) -> PageHasher:
    return PageHasher(secret, epoch, page_tokens)


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 129280, count, dtype=np.int32)


def test_keys_are_the_chained_hash_of_the_definition() -> None:
    ids, epoch = tokens(3 * 256 + 5), b"weights-1/fp8"
    root_input = len(epoch).to_bytes(8, "little") + epoch + "tenant \N{SNOWMAN}".encode()
    key = blake2b(root_input, digest_size=KEY_BYTES, key=SECRET, person=b"root").digest()
    made = PageKeys(hasher(), "tenant \N{SNOWMAN}", ids)
    assert made.root == key
    expected = []
    for page in range(3):
        page_bytes = b"".join(int(i).to_bytes(4, "little") for i in ids[page * 256 : page * 256 + 256])
        key = blake2b(key + page_bytes, digest_size=KEY_BYTES, key=SECRET, person=b"page").digest()
        expected.append(key)
    assert made.keys == expected


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1024])
def test_only_full_pages_have_keys(count: int) -> None:
    made = PageKeys(hasher(), "", tokens(count))
    assert len(made.keys) == count // 256
    assert (made.unsalted is None) == (count < 256)


def test_one_changed_token_changes_its_page_and_all_after_it() -> None:
    ids = tokens(5 * 256)
    changed = ids.copy()
    changed[2 * 256 + 255] += 1
    before, after = PageKeys(hasher(), "", ids).keys, PageKeys(hasher(), "", changed).keys
    assert before[:2] == after[:2]
    assert not set(before[2:]) & set(after)


def test_equal_pages_at_different_places_have_different_keys() -> None:
    keys = PageKeys(hasher(), "", np.tile(tokens(256), 4)).keys
    assert len(set(keys)) == 4


def test_salt_epoch_and_secret_are_in_every_key() -> None:
    ids = tokens(512)
    variants = [
        PageKeys(hasher(), "", ids),
        PageKeys(hasher(), "a", ids),
        PageKeys(hasher(epoch="weights-1/fp4"), "", ids),
        PageKeys(hasher(secret=bytes(32)), "", ids),
        # The border between epoch and salt is part of the root.
        PageKeys(hasher(epoch="weights-1/fp8a"), "", ids),
    ]
    names = [name for keys in variants for name in (keys.root, *keys.keys)]
    assert len(set(names)) == len(names)


def test_the_unsalted_name_is_shared_between_salts_and_is_no_key() -> None:
    ids = tokens(512)
    a, b = PageKeys(hasher(), "a", ids), PageKeys(hasher(), "b", ids)
    assert a.unsalted == b.unsalted
    assert a.unsalted not in (*a.keys, *PageKeys(hasher(), "", ids).keys)
    assert PageKeys(hasher(), "a", tokens(512, seed=1)).unsalted != a.unsalted


@pytest.mark.parametrize("salt", ["\ud800", "\x00", "x" * 10_000])
def test_any_string_is_a_salt(salt: str) -> None:
    assert len(PageKeys(hasher(), salt, tokens(256)).keys[0]) == KEY_BYTES


def test_growing_gives_the_same_keys_as_all_at_once() -> None:
    ids, rng = tokens(40 * 16 + 3), np.random.default_rng(5)
    small = hasher(page_tokens=16)
    growing, length = PageKeys(small, "s", ids[:0]), 0
    while length < len(ids):
        length = min(len(ids), length + int(rng.integers(0, 40)))
        growing.extend(ids[:length])
        assert growing.keys == PageKeys(small, "s", ids[:length]).keys
    assert growing.unsalted == PageKeys(small, "s", ids).unsalted


def test_keys_do_not_depend_on_the_array_type_or_its_memory_layout() -> None:
    ids = tokens(512)
    strided = np.repeat(ids, 2)[::2]
    read_only = np.frombuffer(ids.astype("<i4").tobytes(), dtype="<i4")
    expected = PageKeys(hasher(), "", ids).keys
    assert PageKeys(hasher(), "", strided).keys == expected
    assert PageKeys(hasher(), "", read_only).keys == expected
    assert PageKeys(hasher(), "", ids.astype(np.int64)).keys == expected


def test_a_million_tokens_take_at_most_50_ms() -> None:
    ids, maker, best = tokens(1_000_000), hasher(), float("inf")
    for _ in range(5):
        start = time.thread_time()
        made = PageKeys(maker, "salt", ids)
        best = min(best, time.thread_time() - start)
    assert len(made.keys) == 3906
    assert best <= 0.050, f"{best * 1e3:.1f} ms"
