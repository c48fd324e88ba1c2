"""Random numbers keyed by meaning.

A key names what the numbers are for (run seed, step, task, trial, group, member, chunk), never
where or when they are drawn, so results do not depend on placement, batch composition or timing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def make_key(*parts: int | str) -> int:
    """A 63-bit key that depends on every part and on their order."""
    text = "/".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*parts: int | str) -> np.random.Generator:
    """A numpy generator for a key."""
    return np.random.Generator(np.random.Philox(key=make_key(*parts)))


def uniform(keys: Sequence[int], num: int) -> np.ndarray:
    """Uniform numbers in [0, 1): float64 [len(keys), num], row i from key i alone."""
    rows = np.empty((len(keys), num))
    for row, key in zip(rows, keys, strict=True):
        np.random.Generator(np.random.Philox(key=key)).random(out=row)
    return rows
