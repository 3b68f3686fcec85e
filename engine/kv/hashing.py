"""Names of cached prefixes: one keyed hash for each full page of tokens, chained so that a name covers all before it.

    root   = H(secret; model epoch, cache salt)
    key_i  = H(secret; key_{i-1}, tokens of page i)          key_{-1} = root

H is BLAKE2b with 16 bytes. The secret is drawn once for each process, so that nobody outside can build two prompts with
one name, and everything that changes a page's rows is in the root (kv-and-scheduling T18).
"""

from hashlib import blake2b

import numpy as np

KEY_BYTES = 16


class PageHasher:
    """Makes the keys of one engine.

    `model_epoch` names all that the rows depend on beside tokens: weights, numerics, storage formats.
    """

    def __init__(self, secret: bytes, model_epoch: str, page_tokens: int) -> None:
        assert 16 <= len(secret) <= 64, "BLAKE2b takes keys of at most 64 bytes, and a short one can be guessed"
        self.page_tokens = page_tokens
        epoch = model_epoch.encode()
        self._root = blake2b(
            len(epoch).to_bytes(8, "little") + epoch, digest_size=KEY_BYTES, key=secret, person=b"root"
        )
        self._page = blake2b(digest_size=KEY_BYTES, key=secret, person=b"page")

    def root(self, cache_salt: str) -> bytes:
        """Key of the empty prefix; any string is a salt, lone surrogates included."""
        state = self._root.copy()
        state.update(cache_salt.encode("utf-8", "surrogatepass"))
        return state.digest()

    def chain(self, key: bytes, token_ids: np.ndarray) -> list[bytes]:
        """Keys of the full pages in `token_ids`, which follow the prefix named `key`."""
        raw = memoryview(token_ids.astype("<i4", copy=False).tobytes())
        page_bytes = 4 * self.page_tokens
        keys = []
        for start in range(0, len(raw) - page_bytes + 1, page_bytes):
            state = self._page.copy()
            state.update(key)
            state.update(raw[start : start + page_bytes])
            key = state.digest()
            keys.append(key)
        return keys


class PageKeys:
    """Keys of one request's pages; made when the request is decoded and lengthened as pages fill."""

    __slots__ = ("_hasher", "keys", "root", "unsalted")

    def __init__(self, hasher: PageHasher, cache_salt: str, token_ids: np.ndarray) -> None:
        self._hasher = hasher
        self.root = hasher.root(cache_salt)
        self.keys: list[bytes] = []
        """Key i names the tokens 0 .. (i + 1) * page_tokens - 1."""
        self.unsalted: bytes | None = None
        """Name of the first page without a salt; it only explains misses and never finds a page."""
        self.extend(token_ids)

    def extend(self, token_ids: np.ndarray) -> None:
        """Add the keys of pages that have become full; `token_ids` are all known tokens, int32 [num_tokens]."""
        page_tokens = self._hasher.page_tokens
        done = len(self.keys) * page_tokens
        if len(token_ids) - done < page_tokens:
            return
        if not done:
            self.unsalted = self._hasher.chain(b"", token_ids[:page_tokens])[0]
        self.keys += self._hasher.chain(self.keys[-1] if done else self.root, token_ids[done:])
