"""Filters of copies: the first of several stays."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
import rensa

from foundry_jax.data.document import Document
from foundry_jax.data.filters.base import Filter, Judge
from foundry_jax.data.filters.words import VERSION, hashed, runs
from foundry_jax.data.tools import Tools

SEED = 0  # of the sketches
FOUND = 0.95  # of the pairs exactly as alike as the threshold share a band; of those more alike, more
UNSEEN = -1
RECENT = 1 << 17  # keys in a dict, at about 120 bytes each


@dataclasses.dataclass(frozen=True)
class Exact(Filter):
    """Texts that no earlier document has, to the character."""

    name = "exact"

    def judge(self, tools: Tools) -> Judge:
        seen = FirstSeen()

        def why(text: str) -> str | None:
            # Among a million documents two unequal ones share 8 bytes of sha256 with a probability of 3e-8.
            key = np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.uint64)
            if seen.find(key)[0] != UNSEEN:
                return "the same text as an earlier document"
            seen.add(key, 0)
            return None

        return lambda documents: [why(document.text) for document in documents]


@dataclasses.dataclass(frozen=True)
class Near(Filter):
    """Texts that are less than `threshold` like every earlier one that was kept.

    Likeness is the Jaccard similarity of the sets of `shingle` words (or characters) in a row, without regard to case
    and white space, as MinHash estimates it from num_perm numbers. 5 % of words replaced leave about 0.82 of pairs of
    words alike, 0.75 of triples. Compared are texts that have one of their bands of numbers in common.
    """

    name = "near"
    threshold: float = 0.75
    shingle: int = 2
    unit: str = "words"
    num_perm: int = 128

    def __post_init__(self):
        self._require_range(threshold=(0.2, 1), shingle=(1, 100), num_perm=(16, 1024))
        self._require(self.unit in ("words", "characters"), "unit must be 'words' or 'characters'.")

    def judge(self, tools: Tools) -> Judge:
        return _Likeness(self)

    def fingerprint(self, tools: Tools) -> list:
        return [str(self), VERSION]

    def sketches(self, texts: Sequence[str]) -> np.ndarray:
        """Returns uint16 [texts, num_perm]; the share of equal numbers of two texts estimates how alike they are.

        rensa's numbers have 32 bits; in half of them unequal ones agree once in 65,536 times.
        """
        texts = [text.lower().split() for text in texts]
        units = hashed(texts) if self.unit == "words" else [_code_points(" ".join(words)) for words in texts]
        shingles = [runs(unit, min(self.shingle, len(unit))) for unit in units]
        ends = np.cumsum([0, *map(len, shingles)]).astype(np.uint64)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            np.concatenate(shingles), ends, self.num_perm, SEED
        )
        return np.array(matrix.to_rows(), np.uint32).astype(np.uint16)

    def rows_per_band(self) -> int:
        """Returns the most numbers a band can have while pairs at the threshold are still found."""
        choices = range(1, self.num_perm + 1)
        return max(r for r in choices if 1 - (1 - self.threshold**r) ** (self.num_perm // r) >= FOUND)


class _Likeness:
    """The judge of Near: sketches and ids of the documents kept so far, and in which of them each band was first."""

    def __init__(self, near: Near):
        self._near = near
        self._first = FirstSeen()
        self._ids: list[str] = []
        self._sketches: list[bytes] = []  # an array each would take twice the memory
        rows = near.rows_per_band()
        self._weights = np.random.default_rng(SEED).integers(2**64, size=(near.num_perm // rows, rows), dtype=np.uint64)

    def __call__(self, documents: Sequence[Document]) -> list[str | None]:
        sketches = self._near.sketches([document.text for document in documents])
        B, (bands, rows) = len(documents), self._weights.shape
        # Weights of its own for each band, so that equal numbers in another band are another key.
        keys = (sketches[:, : bands * rows].reshape(B, bands, rows) * self._weights).sum(-1, dtype=np.uint64)
        return [self._why(*one) for one in zip(documents, sketches, keys, strict=True)]

    def _why(self, document: Document, sketch: np.ndarray, keys: np.ndarray) -> str | None:
        if not document.text.strip():
            return None  # no words, no likeness
        found = self._first.find(keys)
        alike = {number: self._alike(sketch, number) for number in np.unique(found[found != UNSEEN]).tolist()}
        best = max(alike, key=alike.get, default=UNSEEN)
        if best != UNSEEN and alike[best] >= self._near.threshold:
            return f"{alike[best]:.2f} like {self._ids[best]!r}"
        self._first.add(keys[found == UNSEEN], len(self._ids))
        self._ids.append(document.id)
        self._sketches.append(sketch.tobytes())
        return None

    def _alike(self, sketch: np.ndarray, number: int) -> float:
        return float(np.mean(np.frombuffer(self._sketches[number], np.uint16) == sketch))


class FirstSeen:
    """The number that each 64-bit key was first given, in 12 bytes: sorted arrays, and a dict of recent ones."""

    def __init__(self):
        self._keys = np.array([2**64 - 1], np.uint64)  # with a last key, searchsorted never points behind the end
        self._numbers = np.array([UNSEEN], np.int32)
        self._recent: dict[int, int] = {}

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns the number of each key, int32; UNSEEN if it has none."""
        recent = np.array([self._recent.get(key, UNSEEN) for key in keys.tolist()], np.int32)
        at = np.searchsorted(self._keys, keys)
        return np.where(self._keys[at] == keys, np.maximum(self._numbers[at], recent), recent)

    def add(self, keys: np.ndarray, number: int) -> None:
        """Gives a number to keys that have none."""
        self._recent.update(dict.fromkeys(keys.tolist(), number))
        if len(self._recent) > RECENT:
            self._merge()

    def _merge(self) -> None:
        keys = np.fromiter(self._recent.keys(), np.uint64, len(self._recent))
        numbers = np.fromiter(self._recent.values(), np.int32, len(self._recent))
        order = np.argsort(keys)
        at = np.searchsorted(self._keys, keys[order])
        self._keys = np.insert(self._keys, at, keys[order])
        self._numbers = np.insert(self._numbers, at, numbers[order])
        self._recent.clear()


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64)
