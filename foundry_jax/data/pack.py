"""PACKINGS: how documents are laid into rows of L tokens in which they do not see each other.

A piece of n inputs at s has the inputs tokens[s : s + n] of a stream and the targets tokens[s + 1 : s + n + 1]: the
separator of the next document is the end of this one. The pieces of a stream share no target and leave out none but
its first token. A document longer than a row is cut into pieces of L, so nothing is lost.

    data.packing            rows
    stream                  windows of the endless text; documents see those before them (no plan: see batches.py)
    split                   the same windows, but what is left of a document in one sees nothing else
    pad                     one piece each, and padding
    first_fit(bins=32)      each piece in the first of 32 open rows that has room
    best_fit(bins=32)       each piece in the fullest of 32 open rows that has room
"""

import abc
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from foundry_jax.schema import require_range, variant

SETTING = "data.packing"


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """What each row of a packed stream holds.

    pieces: [P, 2] int64, (start in the stream, number of inputs), row by row.
    offsets: [R + 1] int64: row r holds pieces[offsets[r] : offsets[r + 1]], at least one.
    """

    pieces: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def save(self, folder: Path) -> None:
        """Writes pieces.npy and offsets.npy."""
        np.save(folder / "pieces.npy", self.pieces, allow_pickle=False)
        np.save(folder / "offsets.npy", self.offsets, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> "Rows":
        """Returns what was saved in a folder, memory-mapped."""
        pieces, offsets = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("pieces", "offsets")
        )
        return cls(pieces, offsets)


@dataclasses.dataclass(frozen=True)
class Packing(abc.ABC):
    """A way to cut documents into pieces and to lay these into rows."""

    def cut(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Returns the pieces of a stream, in its order: [P, 2] int64. starts are those of a Stream."""
        ends = np.minimum(starts[1:], starts[-1] - 1)  # the last token of the stream has no next one
        sizes = np.maximum(ends - starts[:-1], 0)
        counts = -(-sizes // length)
        document_P = np.repeat(np.arange(len(sizes)), counts)
        number_P = np.arange(len(document_P)) - np.repeat(np.cumsum(counts) - counts, counts)
        size_P = np.minimum(sizes[document_P] - number_P * length, length)
        return np.stack([starts[document_P] + number_P * length, size_P], axis=1)

    @abc.abstractmethod
    def place(self, pieces: np.ndarray, length: int) -> np.ndarray:
        """Returns the row of each piece, [P] int64."""


class Split(Packing):
    """The windows that start every L tokens."""

    def cut(self, starts: np.ndarray, length: int) -> np.ndarray:
        end = max(int(starts[-1]) - 1, 0)
        borders = np.union1d(starts[starts < end], np.arange(0, end, length))
        return np.stack([borders, np.diff(borders, append=end)], axis=1)

    def place(self, pieces: np.ndarray, length: int) -> np.ndarray:
        return pieces[:, 0] // length


class Pad(Packing):
    """A row for each piece."""

    def place(self, pieces: np.ndarray, length: int) -> np.ndarray:
        return np.arange(len(pieces))


@dataclasses.dataclass(frozen=True)
class FirstFit(Packing):
    """The first of some open rows that has room; if none has, all are closed and as many opened.

    The rows of Grain's FirstFitPackIterDataset, which takes 50 us a piece, because it copies what it packs, and imports
    JAX; this takes 4 us (2 CPU cores, busy, 2026-11).
    """

    bins: int = 32

    def __post_init__(self):
        require_range(self, f"{SETTING}: ", bins=(1, 4096))

    def place(self, pieces: np.ndarray, length: int) -> np.ndarray:
        row_P = np.empty(len(pieces), np.int64)
        first_row, room = 0, np.full(self.bins, length)
        for piece, size in enumerate(pieces[:, 1].tolist()):
            chosen = self.choose(room, size)
            if room[chosen] < size:
                first_row += self.bins
                room[:] = length
                chosen = 0
            room[chosen] -= size
            row_P[piece] = first_row + chosen
        return row_P

    @staticmethod
    def choose(room: np.ndarray, size: int) -> int:
        """Returns an open row with room for that many tokens; any row if none has."""
        return (room >= size).argmax()


class BestFit(FirstFit):
    """The fullest of some open rows that has room, the first of several."""

    @staticmethod
    def choose(room: np.ndarray, size: int) -> int:
        return np.where(room >= size, room, np.iinfo(room.dtype).max).argmin()


PACKINGS: dict[str, type[Packing] | None] = {
    "stream": None,
    "split": Split,
    "pad": Pad,
    "first_fit": FirstFit,
    "best_fit": BestFit,
}


def parse(text: str) -> Packing | None:
    """Returns what data.packing says; None for "stream".

    Raises:
        UserError: an unknown packing, or numbers that it cannot have.
    """
    return variant(text, PACKINGS, SETTING)


def plan(starts: np.ndarray, packing: str, context_length: int, trained: np.ndarray | None = None) -> Rows | None:
    """Returns the rows of a stream, the same in every process; None if it is not packed ("stream").

    Args:
        starts, trained: those of a Stream. Pieces without a target that counts are left out: nothing would be learned
            from them, and no other piece sees them.
        packing: data.packing, as parse takes it.
    """
    kind = parse(packing)
    if kind is None:
        return None
    pieces = kind.cut(np.asarray(starts, np.int64), context_length)
    if trained is not None and len(pieces):
        pieces = pieces[np.maximum.reduceat(trained[1:], pieces[:, 0]) > 0]
    _, row_P = np.unique(kind.place(pieces, context_length), return_inverse=True)  # rows left out leave no gap
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_P))])
    return Rows(pieces[np.argsort(row_P, kind="stable")], offsets.astype(np.int64))


def num_windows(num_tokens: int, context_length: int) -> int:
    """Returns the windows of an epoch of an endless text: a choice is left of where the first one starts."""
    return max(1, num_tokens // context_length - 1)


def figures(rows: Rows, starts: np.ndarray, context_length: int) -> dict[str, Any]:
    """Returns what a packing came to, for the log and for people.

    efficiency: the share of all places in the rows that hold a token. split_documents: those that are not whole in one
    piece.
    """
    starts = np.asarray(starts, np.int64)
    begins, sizes = rows.pieces[:, 0], rows.pieces[:, 1]
    document_P = documents_of(rows, starts)
    whole_P = (begins == starts[document_P]) & (begins + sizes == np.minimum(starts[1:], starts[-1] - 1)[document_P])
    return {
        "rows": len(rows),
        "pieces": len(begins),
        "documents": len(np.unique(document_P)),
        "split_documents": len(np.unique(document_P[~whole_P])),
        "efficiency": float(sizes.sum() / max(len(rows) * context_length, 1)),
    }


def documents_of(rows: Rows, starts: np.ndarray) -> np.ndarray:
    """Returns the number of the document that each piece belongs to, [P] int64."""
    return np.searchsorted(starts, rows.pieces[:, 0], side="right") - 1
