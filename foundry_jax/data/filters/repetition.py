"""The filter of texts that say the same again and again."""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from foundry_jax.data.filters.base import TextFilter
from foundry_jax.data.filters.words import VERSION, hashed, runs
from foundry_jax.data.tools import Tools

TOP = {2: 0.20, 3: 0.18, 4: 0.16}
REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
PARAGRAPHS = re.compile(r"\n\s*\n")


@dataclasses.dataclass(frozen=True)
class Repetition(TextFilter):
    """Texts that repeat themselves no more than the rules of Gopher allow (Rae et al. 2021, 2112.11446, table A1).

    The table sets limits, which are made for prose, on shares of a text. A repeat is what stood in the text before.

    lines, paragraphs: of these that are repeats.
    line_characters, paragraph_characters: of the characters that stand in such.
    ngrams: a factor on the table's limits TOP, on the characters in the most frequent run of n words, and REPEATED,
        on those in any repeated run of n words; 0: neither is looked at. Characters are those of words.
    """

    name = "repetition"
    lines: float = 0.3
    paragraphs: float = 0.3
    line_characters: float = 0.2
    paragraph_characters: float = 0.2
    ngrams: float = 1.0

    def __post_init__(self):
        shares = ("lines", "paragraphs", "line_characters", "paragraph_characters")
        self._require_range(**dict.fromkeys(shares, (0, 1)), ngrams=(0, math.inf))

    def why(self, text: str) -> str | None:
        return self._of_parts(text) or self._of_ngrams(text.split())

    def fingerprint(self, tools: Tools) -> list:
        return [str(self), VERSION]

    def _of_parts(self, text: str) -> str | None:
        of_lines = repeated([line.strip() for line in text.split("\n")])
        of_paragraphs = repeated([part.strip() for part in PARAGRAPHS.split(text)])
        for name, share in (
            ("lines", of_lines[0]),
            ("paragraphs", of_paragraphs[0]),
            ("line_characters", of_lines[1]),
            ("paragraph_characters", of_paragraphs[1]),
        ):
            if share > getattr(self, name):
                what = name.replace("_characters", "s' characters")
                return f"{share:.2f} of its {what} are repeats, more than {name}={getattr(self, name):g}"
        return None

    def _of_ngrams(self, words: Sequence[str]) -> str | None:
        if not words or not self.ngrams:
            return None
        hashes, sizes = hashed([words])[0], np.array([len(word) for word in words])
        for n, limit in TOP.items():
            share = top_share(hashes, sizes, n)
            if share > limit * self.ngrams:
                return f"{share:.2f} of it is one run of {n} words, more than {limit * self.ngrams:g}"
        for n, limit in REPEATED.items():
            share = repeated_share(hashes, sizes, n)
            if share > limit * self.ngrams:
                return f"{share:.2f} of it are repeated runs of {n} words, more than {limit * self.ngrams:g}"
            if share <= min(REPEATED.values()) * self.ngrams:
                break  # what lies in a repeated run lies in shorter ones as well: no share below is larger
        return None


def repeated(parts: Sequence[str]) -> tuple[float, float]:
    """Returns which share of the parts are repeats, and which share of their characters; empty parts do not count."""
    parts = [part for part in parts if part]
    unique = dict.fromkeys(parts)
    characters, kept = (sum(map(len, some)) for some in (parts, unique))
    return (len(parts) - len(unique)) / max(len(parts), 1), (characters - kept) / max(characters, 1)


def top_share(hashes: np.ndarray, sizes: np.ndarray, n: int) -> float:
    """Returns the share of all characters in the most frequent run of n words, the longest of them; 0: none twice."""
    _, first, counts = np.unique(runs(hashes, n), return_index=True, return_counts=True)
    if not len(counts) or counts.max() == 1:
        return 0.0
    frequent = first[counts == counts.max()]
    ends = np.concatenate([[0], np.cumsum(sizes)])
    return float(min(counts.max() * (ends[frequent + n] - ends[frequent]).max() / ends[-1], 1))


def repeated_share(hashes: np.ndarray, sizes: np.ndarray, n: int) -> float:
    """Returns the share of all characters in words that belong to a run of n which stood in the text before."""
    ngrams = runs(hashes, n)
    again = np.ones(len(ngrams), bool)
    again[np.unique(ngrams, return_index=True)[1]] = False
    starts = np.flatnonzero(again)
    inside = np.zeros(len(hashes) + 1, np.int64)  # +1 where a run begins, -1 behind its end
    np.add.at(inside, starts, 1)
    np.add.at(inside, starts + n, -1)
    return float(sizes[np.cumsum(inside)[:-1] > 0].sum() / sizes.sum())
