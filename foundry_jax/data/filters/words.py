"""Words as 64-bit hashes, and runs of them: what duplicates, repetition and contamination are counted on."""

from collections.abc import Sequence

import numpy as np
import rensa

# Part of what a fingerprint holds: rensa hashes words the same on every machine, but not in every version.
VERSION = rensa.RMinHash.ALGORITHM_VERSION
ODD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio


def hashed(lists: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """Returns the hashes of each list of words, uint64 [number of words]."""
    return [np.array(hashes, np.uint64) for hashes in rensa.RMinHash.hash_token_sets(lists)]


def runs(hashes: np.ndarray, n: int) -> np.ndarray:
    """Returns the hash of every n neighbours, uint64 [max(number - n + 1, 0)]; equal for equal neighbours."""
    number = max(len(hashes) - n + 1, 0)
    run = np.zeros(number, np.uint64)
    for offset in range(n):
        run = _mixed(run * ODD + hashes[offset : offset + number])
    return run


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """Returns hashes of which every bit depends on the high ones too; multiplying alone only carries upwards."""
    return hashes ^ (hashes >> np.uint64(29))
