"""Philox4x32-10, a counter-based generator (Salmon et al., SC 2011), for many keys at once.

A draw is a function of (seed, position) and of nothing else: no state to keep, to save or to share between requests.
"""

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)
_ROUNDS = 10


def philox4x32(counter_4N: np.ndarray, key_2N: np.ndarray) -> np.ndarray:
    """The generator's block function: uint64 [4, N] and [2, N] holding 32-bit words -> uint64 [4, N], the same."""
    c0, c1, c2, c3 = counter_4N
    k0, k1 = key_2N
    for _ in range(_ROUNDS):
        a, b = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (b >> _WORD) ^ c1 ^ k0, b & _LOW, (a >> _WORD) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3])


def uniform(seeds_N: np.ndarray, positions_N: np.ndarray) -> np.ndarray:
    """One float64 in [0, 1) with 53 random bits for each (seed, position); seeds uint64 [N], positions >= 0 [N]."""
    positions = positions_N.astype(np.uint64)
    zeros = np.zeros_like(positions)
    counter = np.stack([positions & _LOW, positions >> _WORD, zeros, zeros])
    words = philox4x32(counter, np.stack([seeds_N & _LOW, seeds_N >> _WORD]))
    numbers: np.ndarray = ((words[0] >> np.uint64(5)) * np.float64(1 << 26) + (words[1] >> np.uint64(6))) * 2.0**-53
    return numbers
