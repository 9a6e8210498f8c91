"""Pairs of completions as batches, and what a reference model says of them. pair_files.py reads the pairs.

Batches of P pairs, axis 1 being the chosen and the rejected completion:

    inputs, targets  [P, 2, L] int32
    weights          [P, 2, L] float32, 1 where the target belongs to the completion
    positions        [P, 2, L] int32, -1 where there is padding, on the right
    reference        [P, 2] float32, log-probabilities of the completions under the reference, in nats, once it is known
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from foundry_jax.data.batches import ALL_ROWS, PADDING, SHARES, Batch, Part, TrainBatches

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """N pairs as 2 N sequences of at most context_length + 1 tokens, end to end: chosen, rejected, chosen, ...

    They are rows as TrainBatches reads them.
    """

    tokens: np.ndarray  # int32, of all sequences
    starts: np.ndarray  # [2 N + 1] int64, where each begins and the last ends
    prompt_lengths: np.ndarray  # [2 N] int64, 1 or more
    context_length: int
    reference: np.ndarray | None = None  # [N, 2] float32, once it is known

    num_phases = 1

    @classmethod
    def of(cls, sequences: Sequence[np.ndarray], prompt_lengths: Sequence[int], context_length: int) -> "Pairs":
        """Returns the pairs of some sequences: chosen, rejected, chosen, ..."""
        starts = np.concatenate([[0], np.cumsum([len(sequence) for sequence in sequences], dtype=np.int64)])
        tokens = np.concatenate([np.zeros(0, np.int32), *sequences]).astype(np.int32)
        return cls(tokens, starts, np.array(prompt_lengths, np.int64), context_length)

    def __len__(self) -> int:
        return len(self.prompt_lengths) // 2

    @property
    def rows_per_epoch(self) -> int:
        return len(self)

    def read(self, row_P: np.ndarray, phase_P: np.ndarray) -> Batch:
        """Returns pairs with their reference, if it is known; they have no phase."""
        batch = self.batch(row_P)
        return batch if self.reference is None else batch | {"reference": self.reference[row_P]}

    @functools.cached_property
    def hash(self) -> str:
        """The sha256 of all that is trained on."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.starts, self.prompt_lengths):
            digest.update(array.tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def completion_lengths(self) -> np.ndarray:
        """How many tokens each completion has, its end included, [N, 2]."""
        return (np.diff(self.starts) - self.prompt_lengths).reshape(-1, 2)

    def is_completion(self, indices: np.ndarray) -> np.ndarray:
        """Returns which targets of some pairs belong to a completion, [pairs, 2, L] bool."""
        targets = np.arange(self.context_length)
        first = self.prompt_lengths.reshape(-1, 2)[indices, :, None] - 1
        return (targets >= first) & (targets < first + self.completion_lengths[indices, :, None])

    def batch(self, indices: np.ndarray) -> Batch:
        """Returns the batch of some pairs."""
        shape = (2 * len(indices), self.context_length)
        batch = {"inputs": np.zeros(shape, np.int32), "targets": np.zeros(shape, np.int32)}
        batch["weights"] = self.is_completion(indices).astype(np.float32).reshape(shape)
        batch["positions"] = np.full(shape, PADDING, np.int32)
        for row, sequence in enumerate(np.stack([2 * indices, 2 * indices + 1], axis=1).ravel()):
            tokens = self.tokens[self.starts[sequence] : self.starts[sequence + 1]]
            length = len(tokens) - 1
            batch["inputs"][row, :length] = tokens[:-1]
            batch["targets"][row, :length] = tokens[1:]
            batch["positions"][row, :length] = np.arange(length)
        return {name: x.reshape(-1, 2, self.context_length) for name, x in batch.items()}

    def in_order(self, size: int, rows: slice = ALL_ROWS) -> Iterator[Batch]:
        """Yields this process's rows of all pairs, `size` at a time; what does not fill the last batch is repeated."""
        for first in range(0, len(self), size):
            yield self.batch(np.arange(first, first + size)[rows] % len(self))


@dataclasses.dataclass(frozen=True, eq=False)
class Preferences:
    """Pairs to train on, those of each file with its share of every batch; and pairs that are held out."""

    train: tuple[Pairs, ...]
    weights: tuple[float, ...]
    held_out: Pairs

    def batches(self, batch_size: int, seed: int, rows: slice = ALL_ROWS) -> TrainBatches:
        """Returns the batches of those to train on; batch_size is global, `rows` are this process's."""
        total = sum(self.weights)
        shares = [max(round(weight / total * SHARES), 1) for weight in self.weights]
        parts = [Part(pairs, share, None) for pairs, share in zip(self.train, shares, strict=True)]
        return TrainBatches(tuple(parts), batch_size, seed, rows)


def with_reference(batches: TrainBatches, reference: np.ndarray) -> TrainBatches:
    """Returns batches of pairs that have a reference: [N, 2], of the pairs of all parts, one after the other."""
    ends = np.cumsum([len(part.source) for part in batches.parts])
    pieces = zip(batches.parts, np.split(reference, ends[:-1]), strict=True)
    parts = [replace(part, source=replace(part.source, reference=piece)) for part, piece in pieces]
    return replace(batches, parts=tuple(parts))


class Reference(NamedTuple):
    """Log-probabilities under the model that training starts from, in nats, float32."""

    train: np.ndarray  # [N, 2], of the completions that are trained on
    held_out: np.ndarray  # [tokens], of each token of those that are not


def write_reference(path: Path, key: str, reference: Reference) -> None:
    """Keeps a reference under a key: readers and crashes see the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, key=key, **reference._asdict())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk: it can be computed again
        with contextlib.suppress(OSError):
            temporary.unlink()
        log.warning("Cannot keep %s: %s.", path, error.strerror)


def read_reference(path: Path, key: str) -> Reference | None:
    """Returns what was kept under a key; None if there is nothing, or it is damaged: the format has checksums."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) == key:
                return Reference(*(file[name] for name in Reference._fields))
            log.warning("%s is of other pairs or another model; computing it again.", path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged (%s); computing it again.", path, error)
    return None
