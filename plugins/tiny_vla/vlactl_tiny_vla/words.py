"""Instructions as word ids, without a vocabulary: every word has several places in one table.

Two words share one place now and then but practically never all of them, and their sum tells them
apart (hash embeddings, Svenstrup et al. 2017, arXiv:1709.03933).
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from vlactl.api import noise
from vlactl.errors import ConfigError

NUM_BUCKETS = 1024
NUM_HASHES = 2
MAX_WORDS = 32
PADDING = -1


@cache
def encode(instruction: str) -> np.ndarray:
    """int64 [MAX_WORDS, NUM_HASHES], not writable; -1 behind the last word.

    Raises:
        ConfigError: there are more words than that.
    """
    words = re.findall(r"\w+", instruction.lower())
    if len(words) > MAX_WORDS:
        raise ConfigError(
            f'"{instruction}" has {len(words)} words, tiny-vla reads at most {MAX_WORDS}',
            hint="shorten the instruction, or choose another model",
        )
    ids = np.full((MAX_WORDS, NUM_HASHES), PADDING, np.int64)
    for row, word in zip(ids, words, strict=False):
        keys = (noise.make_key("word", word, number) for number in range(NUM_HASHES))
        row[:] = [key % NUM_BUCKETS for key in keys]
    ids.flags.writeable = False
    return ids
