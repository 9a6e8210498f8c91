"""Filters that look at a text's surface: how long it is, what characters it is made of, how many links it has."""

import dataclasses
import functools
import math
import re
import unicodedata

import numpy as np

from foundry_jax.data.filters.base import TextFilter

LETTERS, DIGITS, SYMBOLS, CONTROL, UNCOUNTED = range(5)
KINDS = {"L": LETTERS, "M": LETTERS, "N": DIGITS, "P": SYMBOLS, "S": SYMBOLS, "Z": UNCOUNTED, "C": CONTROL}
REPLACEMENT = "\ufffd"  # what broken bytes were turned into
URL = re.compile(r"https?://|\bwww\.", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Length(TextFilter):
    """Texts of at least `min` and at most `max` characters; max=0: however long."""

    name = "length"
    min: int = 200
    max: int = 0

    def __post_init__(self):
        self._require_range(min=(0, math.inf), max=(0, math.inf))
        self._require(not self.max or self.min <= self.max, f"keeps nothing, min={self.min} is more than max.")

    def why(self, text: str) -> str | None:
        if len(text) < self.min:
            return f"{len(text):,} characters, fewer than min={self.min}"
        if self.max and len(text) > self.max:
            return f"{len(text):,} characters, more than max={self.max}"
        return None


@dataclasses.dataclass(frozen=True)
class Characters(TextFilter):
    """Texts made of letters at least, and of digits, symbols and control characters at most, to these shares.

    Shares are of all characters but white space. Marks that combine with letters count as letters; punctuation counts
    as symbols; what no text holds counts as control: unassigned code points, private ones, U+FFFD.
    """

    name = "characters"
    letters: float = 0.5
    digits: float = 0.3
    symbols: float = 0.4
    control: float = 0.01

    def __post_init__(self):
        self._require_range(letters=(0, 1), digits=(0, 1), symbols=(0, 1), control=(0, 1))

    def why(self, text: str) -> str | None:
        counts = np.bincount(_kinds()[np.frombuffer(text.encode("utf-32-le"), np.uint32)], minlength=UNCOUNTED)
        shares = counts[:UNCOUNTED] / max(counts[:UNCOUNTED].sum(), 1)
        if shares[LETTERS] < self.letters:
            return f"{shares[LETTERS]:.3f} of it letters, less than letters={self.letters:g}"
        for kind, name in ((DIGITS, "digits"), (SYMBOLS, "symbols"), (CONTROL, "control")):
            if shares[kind] > getattr(self, name):
                return f"{shares[kind]:.3f} of it {name}, more than {name}={getattr(self, name):g}"
        return None


@dataclasses.dataclass(frozen=True)
class Urls(TextFilter):
    """Texts with at most `max` URLs for each 1000 characters."""

    name = "urls"
    max: float = 2.0

    def __post_init__(self):
        self._require_range(max=(0, 1000))

    def why(self, text: str) -> str | None:
        density = 1000 * sum(1 for _ in URL.finditer(text)) / max(len(text), 1)
        return f"{density:.1f} URLs for 1000 characters, more than max={self.max:g}" if density > self.max else None


@functools.cache
def _kinds() -> np.ndarray:
    """Returns the kind of every code point, uint8 [0x110000]."""
    return np.fromiter(map(_kind, map(chr, range(0x110000))), np.uint8, 0x110000)


def _kind(character: str) -> int:
    # Format characters join emoji, order directions and open files: part of ordinary text.
    if character.isspace() or unicodedata.category(character) == "Cf":
        return UNCOUNTED
    return CONTROL if character == REPLACEMENT else KINDS[unicodedata.category(character)[0]]
