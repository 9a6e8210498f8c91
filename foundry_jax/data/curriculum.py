"""CURRICULA: easy rows first, and more and more of them until all are used.

At a step the pool is the easiest P of the N rows of an epoch. The rows come in the order that they have without a
curriculum, except that one outside the pool is replaced by one of the pool. So a step has as many tokens as without,
and once the pool is everything, the very same ones.

    data.curriculum                                                 difficulty of a document
    length(pacing='linear', start=0.2, steps=0.5)                   its number of tokens
    compression(pacing='root', start=0.2, steps=0.5)                bytes after zlib / bytes of its text
    perplexity(model='smollm2-135m', pacing='step', ...)            nats per byte under that model

start: the share of the rows in the pool at step 0. steps: the share of the run's steps after which all are in it.
"""

import abc
import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

from foundry_jax.data.pack import Rows, documents_of, num_windows, plan
from foundry_jax.data.tools import Tools
from foundry_jax.registry import lookup
from foundry_jax.schema import require, require_range, variant

SETTING = "data.curriculum"

Measure = Callable[[Sequence[str], Sequence[int]], list[float]]  # texts, their numbers of tokens -> difficulties

# The share of the rows in the pool, from the share `done` of the pacing that is over and the share at its start.
PACINGS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda done, start: start + (1 - start) * done,
    # Platanios et al. 2019, https://arxiv.org/abs/1903.09848, equation 7: the more rows, the slower come new ones.
    "root": lambda done, start: math.sqrt(done * (1 - start**2) + start**2),
    "step": lambda done, start: start,
}


@dataclasses.dataclass(frozen=True)
class Difficulty(abc.ABC):
    """What makes a document hard, and how fast the pool grows."""

    pacing: str = "linear"
    start: float = 0.2
    steps: float = 0.5
    reads_text: ClassVar[bool] = True

    def __post_init__(self):
        lookup(PACINGS, self.pacing, f"{SETTING}: pacing")
        require_range(self, f"{SETTING}: ", start=(0, 1), steps=(0, 1))

    @abc.abstractmethod
    def fingerprint(self, tools: Tools) -> str:
        """Returns text that is another if difficulties are; pacing does not change them."""

    @abc.abstractmethod
    def measure(self, tools: Tools) -> Measure:
        """Returns what measures some documents, one difficulty each, more being harder."""

    def share(self, step: int, num_steps: int) -> float:
        """Returns the share of the rows in the pool at a step of the run, more than 0 and at most 1."""
        end = self.steps * num_steps
        return 1.0 if step >= end else PACINGS[self.pacing](step / end, self.start)


class Length(Difficulty):
    """Long documents are hard."""

    reads_text: ClassVar[bool] = False

    def fingerprint(self, tools: Tools) -> str:
        return "length"

    def measure(self, tools: Tools) -> Measure:
        return lambda texts, num_tokens: [float(number) for number in num_tokens]


class Compression(Difficulty):
    """Documents that zlib cannot make short are hard."""

    def fingerprint(self, tools: Tools) -> str:
        return f"compression by zlib {zlib.ZLIB_RUNTIME_VERSION}"

    def measure(self, tools: Tools) -> Measure:
        return lambda texts, num_tokens: [compression_ratio(text) for text in texts]


@dataclasses.dataclass(frozen=True)
class Perplexity(Difficulty):
    """Documents that a reference model predicts badly are hard."""

    model: str = "smollm2-135m"

    def fingerprint(self, tools: Tools) -> str:
        return f"perplexity under {tools.scorer(self.model).fingerprint}"

    def measure(self, tools: Tools) -> Measure:
        scorer = tools.scorer(self.model)
        return lambda texts, num_tokens: scorer(texts)


CURRICULA: dict[str, type[Difficulty] | None] = {
    "none": None,
    "length": Length,
    "compression": Compression,
    "perplexity": Perplexity,
}


def parse(text: str) -> Difficulty | None:
    """Returns what data.curriculum says; None for "none".

    Raises:
        UserError: an unknown curriculum or pacing, or a number out of range.
    """
    return variant(text, CURRICULA, SETTING)


def compression_ratio(text: str) -> float:
    """Returns the size of a text after zlib as a share of its size in UTF-8; 0 for an empty one.

    Without zlib's header and checksum, which would make short texts hard.
    """
    data = text.encode()
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return len(packer.compress(data) + packer.flush()) / len(data) if data else 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Curriculum:
    """The rows of an epoch by difficulty, and how many of them are in the pool.

    row_of_rank: [N] int64, the rows from easy to hard. rank_of_row: [N] int64, its inverse.
    """

    row_of_rank: np.ndarray
    rank_of_row: np.ndarray
    kind: Difficulty
    num_steps: int  # of the run

    def __len__(self) -> int:
        return len(self.row_of_rank)

    def pool_size(self, step: int) -> int:
        """Returns how many of the easiest rows are in the pool at a step."""
        size = self.kind.share(step, self.num_steps) * len(self)
        return max(math.ceil(size - 1e-9), 1)  # 0.1 * 30 is a little more than 3

    def rows_at(self, step: int, row_B: np.ndarray) -> np.ndarray:
        """Returns the rows to read at a step instead of these: each of the pool is equally likely."""
        total, pool = len(self), self.pool_size(step)
        rank_B = self.rank_of_row[row_B]
        substitute_B = (rank_B - pool) * pool // max(total - pool, 1)
        return self.row_of_rank[np.where(rank_B < pool, rank_B, substitute_B)]


def curriculum(
    kind: Difficulty,
    num_steps: int,
    difficulty: np.ndarray,
    starts: np.ndarray,
    packed: Rows | None,
    context_length: int,
) -> Curriculum:
    """Returns the order of the rows of a stream: packed ones, or None: its windows.

    Args:
        num_steps: those of the run.
        difficulty: [number of documents], of each document of the stream.
        starts: those of the Stream.

    Raises:
        UserError: a document has no difficulty that is a number.
    """
    difficulty = np.asarray(difficulty, np.float64)
    assert difficulty.shape == (len(starts) - 1,), (difficulty.shape, len(starts))
    bad = np.flatnonzero(~np.isfinite(difficulty))
    require(
        not bad.size,
        f"{SETTING}: the difficulty of training document {bad[0] + 1 if bad.size else 0} is not a finite number.",
    )
    row_of_rank = np.argsort(row_difficulty(difficulty, starts, packed, context_length), kind="stable")
    rank_of_row = np.empty_like(row_of_rank)
    rank_of_row[row_of_rank] = np.arange(len(row_of_rank))
    return Curriculum(row_of_rank, rank_of_row, kind, num_steps)


def row_difficulty(difficulty: np.ndarray, starts: np.ndarray, packed: Rows | None, context_length: int) -> np.ndarray:
    """Returns the mean difficulty of each row's tokens, [N] float64: those of a token are its document's.

    The windows of a stream are taken where an epoch without a shift has them.
    """
    rows = plan(starts, "split", context_length) if packed is None else packed
    size_P = rows.pieces[:, 1]
    total_P = difficulty[documents_of(rows, starts)] * size_P
    mean_N = np.add.reduceat(total_P, rows.offsets[:-1]) / np.add.reduceat(size_P, rows.offsets[:-1])
    return mean_N if packed is not None else mean_N[: num_windows(int(starts[-1]), context_length)]
