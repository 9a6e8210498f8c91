"""Batches: {"inputs": [B, L] int32, "targets": [B, L] int32, "weights": [B, L] float32, 1 where a target counts}.

A training batch is a pure function of the seed and the global step, so a run resumes at any step, on any number of
processes, with the batches it would have seen.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import numpy as np

from foundry_jax.errors import UserError

Batch = dict[str, np.ndarray]

ALL_ROWS = slice(None)
SHUFFLE_ROUNDS = 8  # after 4, neighbours stay correlated: z = 105 on the differences of neighbours, 0.8 after 8


@dataclasses.dataclass(frozen=True, eq=False)
class TrainBatches:
    """Every batch of an endless run over some tokens.

    An epoch is a seeded permutation of the windows of L + 1 tokens that start every L tokens; the last token of one
    is the first of the next, so each token is predicted once. Where the first window starts is drawn for each epoch,
    so epochs cut the text differently. A batch may end one epoch and begin the next.
    """

    tokens: np.ndarray
    batch_size: int
    context_length: int
    seed: int
    rows: slice  # of the global batch, those of this process

    @property
    def windows_per_epoch(self) -> int:
        """The windows of an epoch, one or two fewer than fit, so that there is a choice where the first one starts."""
        return max(1, len(self.tokens) // self.context_length - 1)

    @property
    def num_phases(self) -> int:
        """The number of tokens the first window may start at: context_length or more, so that none stays unseen."""
        return len(self.tokens) - self.windows_per_epoch * self.context_length

    def batch(self, step: int) -> Batch:
        """Returns this process's rows of the global batch of a step."""
        starts_B = self._starts(step)
        windows_BL = self.tokens[starts_B[:, None] + np.arange(self.context_length + 1)]
        return {
            "inputs": windows_BL[:, :-1].astype(np.int32),
            "targets": windows_BL[:, 1:].astype(np.int32),
            "weights": np.ones((len(starts_B), self.context_length), np.float32),
        }

    def iterate(
        self, start: int, stop: int, offset: Callable[[int], int] = lambda step: 0
    ) -> Iterator[tuple[int, Batch]]:
        """Yields (step, batch) for start <= step < stop, prepared by a thread while the device works.

        Step s gets batch s + offset(s): after a roll-back, a larger offset skips the batches that did the harm.
        """
        import grain  # takes 1.8 s: it imports jax and orbax, which preparing data and --help do without

        steps = grain.MapDataset.source(_Steps(self, stop, offset))[start:stop]
        # Grain's default, 16 threads and 500 elements, is slower than none for a source as cheap as this one.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        yield from zip(range(start, stop), steps.to_iter_dataset(options), strict=True)

    def _starts(self, step: int) -> np.ndarray:
        """Returns where in the tokens each row of a step begins: [rows] int64."""
        assert step >= 0, step
        first = step * self.batch_size
        index_B = np.arange(first, first + self.batch_size)[self.rows]
        epoch_B, index_B = np.divmod(index_B, self.windows_per_epoch)
        starts_B = np.empty_like(index_B)
        for epoch in np.unique(epoch_B):
            now = epoch_B == epoch
            keys, phase = epoch_order(self.seed, int(epoch))
            windows = shuffled(index_B[now], self.windows_per_epoch, keys)
            starts_B[now] = phase % self.num_phases + windows * self.context_length
        return starts_B


@dataclasses.dataclass(frozen=True, eq=False)
class ValidationBatches:
    """The whole validation stream in order, in batches of one shape: every token but the first is predicted once.

    What does not fill the last batch is padding of weight 0. Can be iterated again and again.
    """

    tokens: np.ndarray
    batch_size: int
    context_length: int
    rows: slice

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // (self.batch_size * self.context_length))

    def __getitem__(self, index: int) -> Batch:
        """Returns batch 0 <= index < len(self)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        windows = range(index * self.batch_size, (index + 1) * self.batch_size)[self.rows]
        shape = (len(windows), self.context_length)
        batch = {"inputs": np.zeros(shape, np.int32), "targets": np.zeros(shape, np.int32)}
        batch["weights"] = np.zeros(shape, np.float32)
        for row, window in enumerate(windows):
            start = window * self.context_length
            window_L = self.tokens[start : start + self.context_length + 1]
            length = max(len(window_L) - 1, 0)
            batch["inputs"][row, :length] = window_L[:length]
            batch["targets"][row, :length] = window_L[1:]
            batch["weights"][row, :length] = 1
        return batch

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))


def train_batches(
    tokens: np.ndarray, *, batch_size: int, context_length: int, seed: int, rows: slice = ALL_ROWS
) -> TrainBatches:
    """Returns the training batches of some tokens, [number of tokens]; batch_size is global, rows this process's.

    Raises:
        UserError: there is not one window of context_length + 1 tokens.
    """
    if len(tokens) <= context_length:
        raise UserError(
            f"model.context_length={context_length} needs {context_length + 1} training tokens, but there are only "
            f"{len(tokens)}; try model.context_length={max(len(tokens) - 1, 1)} or more text."
        )
    return TrainBatches(np.asarray(tokens), batch_size, context_length, seed, rows)


def validation_batches(
    tokens: np.ndarray, *, batch_size: int, context_length: int, rows: slice = ALL_ROWS
) -> ValidationBatches:
    """Returns the batches that predict the whole validation stream, [number of tokens], once.

    Raises:
        UserError: there is no token to predict.
    """
    if len(tokens) < 2:
        raise UserError(f"The validation stream has {len(tokens)} tokens but needs 2 or more; try more text.")
    return ValidationBatches(np.asarray(tokens), batch_size, context_length, rows)


def shuffled(indices: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Returns where the permutation of range(size) that the keys choose takes some indices, without listing it.

    A Feistel network on pairs of digits, Black and Rogaway 2002, https://doi.org/10.1007/3-540-45760-7_9: the index
    is left * width + right, and what comes out at size or above goes around again.
    Grain's index_shuffle does the same over at least 2**16 values: 0.95 ms an index for 100 windows, 9 us for a
    million, where this takes 0.2 ms for a batch of 32 (2026-11). A change here changes the data order of every run.
    """
    height = np.uint64(math.isqrt(size - 1) + 1)
    width = np.uint64(-(-size // int(height)))
    result = indices.astype(np.uint64)
    outside = np.ones(len(result), bool)
    while outside.any():
        left, right = np.divmod(result[outside], width)
        for left_key, right_key in keys.reshape(-1, 2):
            left = (left + _mix(right ^ left_key) % height) % height
            right = (right + _mix(left ^ right_key) % width) % width
        result[outside] = left * width + right
        outside = result >= size
    return result.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Returns uint64 whose every bit depends on every bit of x.

    The finalizer of SplitMix64, Steele et al. 2014, https://doi.org/10.1145/2660193.2660195.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.lru_cache(maxsize=16)
def epoch_order(seed: int, epoch: int) -> tuple[np.ndarray, int]:
    """Returns an epoch's shuffle keys, [SHUFFLE_ROUNDS] uint64, and the random number that gives its phase.

    Hashed together: with seed + epoch, as in Grain, run 0's second epoch would be run 1's first.
    """
    *keys, phase = np.random.SeedSequence((seed, epoch)).generate_state(SHUFFLE_ROUNDS + 1, np.uint64)
    return np.array(keys), int(phase)


@dataclasses.dataclass(frozen=True, eq=False)
class _Steps:
    """The first `stop` steps as a Grain source: element i is the whole batch of step i."""

    batches: TrainBatches
    stop: int
    offset: Callable[[int], int]

    def __len__(self) -> int:
        return self.stop

    def __getitem__(self, step: int) -> Batch:
        return self.batches.batch(step + self.offset(step))
