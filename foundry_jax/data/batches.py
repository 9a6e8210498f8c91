"""Batches: {"inputs": [B, L] int32, "targets": [B, L] int32, "weights": [B, L] float32, 1 where a target counts}.

Packed batches (pack.py) also have

    positions   [B, L] int32, where a token stands in its piece of a document; -1: padding
    segments    [B, L] int32, which piece of its row a token belongs to: 1, 2, ...; 0: padding

A training batch is a pure function of the seed and the global step, so a run resumes at any step, on any number of
processes, with the batches it would have seen.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from foundry_jax.data.curriculum import Curriculum
from foundry_jax.data.pack import Rows, num_windows
from foundry_jax.data.stream import Stream
from foundry_jax.schema import require

Batch = dict[str, np.ndarray]

ALL_ROWS = slice(None)
PADDING = -1  # position of a token that is none; the model's mask.EMPTY
SHUFFLE_ROUNDS = 8  # after 4, neighbours stay correlated: z = 105 on the differences of neighbours, 0.8 after 8
SHARES = 2**20  # a weight is so many of these, whole ones: integers stay exact however far a run goes


class Portion(NamedTuple):
    """What is to be trained on from one stream.

    weight: of the rows of all portions, this one's share is its weight / the sum of the weights.
    packed: rows of documents that do not see each other; None: windows of the endless text.
    curriculum: which rows are used when; None: all, always.
    """

    stream: Stream
    weight: float = 1.0
    packed: Rows | None = None
    curriculum: Curriculum | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Rows of an endless text: windows of L + 1 tokens that start every L tokens, so each token is predicted once."""

    stream: Stream
    context_length: int

    @property
    def rows_per_epoch(self) -> int:
        return num_windows(len(self.stream.tokens), self.context_length)

    @property
    def rows_in_all(self) -> int:
        """The windows that predict every token but the first, the last of them perhaps in part."""
        return -(-(len(self.stream.tokens) - 1) // self.context_length)

    @property
    def num_phases(self) -> int:
        """The number of tokens the first window may start at: context_length or more, so that none stays unseen."""
        return len(self.stream.tokens) - self.rows_per_epoch * self.context_length

    def read(self, row_B: np.ndarray, phase_B: np.ndarray) -> Batch:
        """Returns windows, of which the first starts at its phase; what lies after the stream is padding."""
        at_BL = (phase_B + row_B * self.context_length)[:, None] + np.arange(self.context_length + 1)
        real_BL = at_BL[:, 1:] < len(self.stream.tokens)
        at_BL = np.minimum(at_BL, len(self.stream.tokens) - 1)
        tokens_BL = self.stream.tokens[at_BL].astype(np.int32)
        return {
            "inputs": np.where(real_BL, tokens_BL[:, :-1], 0),
            "targets": np.where(real_BL, tokens_BL[:, 1:], 0),
            "weights": _weights(self.stream, at_BL[:, 1:]) * real_BL,
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Rows of pieces of documents that do not see each other; rows after the last are all padding."""

    stream: Stream
    rows: Rows
    context_length: int

    num_phases = 1

    @property
    def rows_per_epoch(self) -> int:
        return len(self.rows)

    @property
    def rows_in_all(self) -> int:
        return len(self.rows)

    def read(self, row_B: np.ndarray, phase_B: np.ndarray) -> Batch:
        """Returns rows; they have no phase."""
        first_B, last_B = (self.rows.offsets[np.minimum(row_B + i, len(self.rows))] for i in (0, 1))
        number_P = _count_up(last_B - first_B)
        start_P, size_P = self.rows.pieces[np.repeat(first_B, last_B - first_B) + number_P].T
        row_T = np.repeat(np.repeat(np.arange(len(row_B)), last_B - first_B), size_P)
        position_T = _count_up(size_P)
        at_T = np.repeat(start_P, size_P) + position_T
        place = row_T, _count_up(np.bincount(row_T, minlength=len(row_B)))

        def laid_out(x_T: np.ndarray, padding: int, dtype: type) -> np.ndarray:
            x_BL = np.full((len(row_B), self.context_length), padding, dtype)
            x_BL[place] = x_T
            return x_BL

        return {
            "inputs": laid_out(self.stream.tokens[at_T], 0, np.int32),
            "targets": laid_out(self.stream.tokens[at_T + 1], 0, np.int32),
            "weights": laid_out(_weights(self.stream, at_T + 1), 0, np.float32),
            "positions": laid_out(position_T, PADDING, np.int32),
            "segments": laid_out(np.repeat(number_P + 1, size_P), 0, np.int32),
        }


def _weights(stream: Stream, at: np.ndarray) -> np.ndarray:
    """Returns 1 for each token that counts as a target, else 0, in float32."""
    return np.ones(at.shape, np.float32) if stream.trained is None else stream.trained[at].astype(np.float32)


def _count_up(sizes: np.ndarray) -> np.ndarray:
    """Returns 0, 1, ..., sizes[0] - 1, 0, 1, ..., sizes[1] - 1, ..."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A portion made ready: its rows, and how many of all shares it has."""

    source: Windows | Packed
    share: int
    curriculum: Curriculum | None


@dataclasses.dataclass(frozen=True, eq=False)
class TrainBatches:
    """Every batch of an endless run.

    An epoch of a part is a seeded permutation of its rows; where the first window of a text starts is drawn for each
    epoch, so epochs cut the text differently. A batch may end one epoch and begin the next.
    """

    parts: tuple[Part, ...]
    batch_size: int
    seed: int
    rows: slice  # of the global batch, those of this process

    def batch(self, step: int) -> Batch:
        """Returns this process's rows of the global batch of a step."""
        part_B, index_B = (x[self.rows] for x in self._slots(step))
        found = [self._rows_of(part, index_B[part_B == part], step) for part in range(len(self.parts))]
        back_B = np.argsort(np.argsort(part_B, kind="stable"))
        return {name: np.concatenate([batch[name] for batch in found])[back_B] for name in found[0]}

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

    def _slots(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns of each row of a step its part, and its number among all rows of that part, [batch_size] each.

        The rows of a mixture are shuffled: parts that take turns would fill micro-batches with one part each.
        """
        assert step >= 0, step
        slot_B = np.arange(self.batch_size)
        if len(self.parts) > 1:
            keys, _ = epoch_order(self.seed, step, len(self.parts))  # of a part that there is not
            slot_B = shuffled(slot_B, self.batch_size, keys)
        return mixed(step * self.batch_size + slot_B, [part.share for part in self.parts])

    def _rows_of(self, number: int, index_B: np.ndarray, step: int) -> Batch:
        """Returns rows of a part by their numbers in all its epochs."""
        part = self.parts[number]
        epoch_B, index_B = np.divmod(index_B, part.source.rows_per_epoch)
        row_B, phase_B = np.empty_like(index_B), np.empty_like(index_B)
        for epoch in np.unique(epoch_B):
            now = epoch_B == epoch
            keys, drawn = epoch_order(self.seed, int(epoch), number)
            row_B[now] = shuffled(index_B[now], part.source.rows_per_epoch, keys)
            phase_B[now] = drawn % part.source.num_phases
        if part.curriculum is not None:
            row_B = part.curriculum.rows_at(step, row_B)
        return part.source.read(row_B, phase_B)


def mixed(slots: np.ndarray, shares: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns of each row of a mixture its part, and how many rows before it are of that part.

    Of the first n rows, a part of share p has n * p / sum(shares), to within one for each part before it. Each part in
    turn takes its rows from what the parts before it left, where the rounded number of those that remain stays the
    same. As Grain's MapDataset.mix, an index at a time.
    """
    part, index = np.full(slots.shape, -1), np.zeros_like(slots)
    here, after, left = slots, slots + 1, sum(shares)
    for number, share in enumerate(shares):
        others, others_after = here * (left - share) // left, after * (left - share) // left
        mine = (part < 0) & (others == others_after)
        part[mine], index[mine] = number, (here - others)[mine]
        here, after, left = others, others_after, left - share
    return part, index


@dataclasses.dataclass(frozen=True, eq=False)
class ValidationBatches:
    """Every row of a stream in order, in batches of one shape; what does not fill the last is padding of weight 0.

    Can be iterated again and again.
    """

    source: Windows | Packed
    batch_size: int
    rows: slice  # of each global batch, those of this process

    @property
    def is_packed(self) -> bool:
        """Whether the batches have positions and segments."""
        return isinstance(self.source, Packed)

    def __len__(self) -> int:
        return -(-self.source.rows_in_all // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        """Returns batch 0 <= index < len(self)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        row_B = np.arange(index * self.batch_size, (index + 1) * self.batch_size)[self.rows]
        return self.source.read(row_B, np.zeros_like(row_B))

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))


def train_batches(
    portions: Sequence[Portion], *, batch_size: int, context_length: int, seed: int, rows: slice = ALL_ROWS
) -> TrainBatches:
    """Returns the training batches; batch_size is global, rows are this process's.

    Raises:
        UserError: a portion has not one window of context_length + 1 tokens, or no token to learn from.
    """
    assert portions and len({portion.packed is None for portion in portions}) == 1, "all are packed, or none"
    assert all(portion.weight > 0 and math.isfinite(portion.weight) for portion in portions), portions
    for number, portion in enumerate(portions, start=1):
        where = f" in source {number} of {len(portions)}" if len(portions) > 1 else ""
        _require_rows(portion, context_length, where)
    total = sum(portion.weight for portion in portions)
    return TrainBatches(tuple(_part(portion, total, context_length) for portion in portions), batch_size, seed, rows)


def _require_rows(portion: Portion, context_length: int, where: str) -> None:
    num_tokens, trained = len(portion.stream.tokens), portion.stream.trained
    require(
        portion.packed is not None or num_tokens > context_length,
        f"model.context_length={context_length} needs {context_length + 1} training tokens, but there are only "
        f"{num_tokens}{where}; try model.context_length={max(num_tokens - 1, 1)} or more text.",
    )
    require(
        (trained is None or trained[1:].any()) if portion.packed is None else len(portion.packed) > 0,
        f"There is no token to learn from{where}: data.format trains on none of its {num_tokens}; try other data.",
    )


def _part(portion: Portion, total: float, context_length: int) -> Part:
    source = _source(portion.stream, portion.packed, context_length)
    curriculum = portion.curriculum
    assert curriculum is None or len(curriculum) == source.rows_per_epoch, "a curriculum of other rows"
    return Part(source, max(round(portion.weight / total * SHARES), 1), curriculum)


def _source(stream: Stream, packed: Rows | None, context_length: int) -> Windows | Packed:
    return Windows(stream, context_length) if packed is None else Packed(stream, packed, context_length)


def validation_batches(
    stream: Stream, packed: Rows | None = None, *, batch_size: int, context_length: int, rows: slice = ALL_ROWS
) -> ValidationBatches:
    """Returns the batches that predict every target of a stream that counts, once.

    Args:
        packed: rows of documents that do not see each other; None: windows of the text, from its beginning.

    Raises:
        UserError: there is no token to predict.
    """
    num_tokens = len(stream.tokens)
    require(num_tokens >= 2, f"The validation stream has {num_tokens} tokens but needs 2 or more; try more text.")
    require(
        stream.trained is None or stream.trained[1:].any(),
        f"None of the {num_tokens} tokens of the validation stream counts: data.format trains on none of them; try "
        "other data.",
    )
    return ValidationBatches(_source(stream, packed, context_length), batch_size, rows)


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


@functools.lru_cache(maxsize=64)
def epoch_order(seed: int, epoch: int, part: int = 0) -> tuple[np.ndarray, int]:
    """Returns an epoch's shuffle keys, [SHUFFLE_ROUNDS] uint64, and the random number that gives its phase.

    Hashed together: with seed + epoch, as in Grain, run 0's second epoch would be run 1's first. Trailing zeros do not
    count: part 0 of a mixture has the order that it would have alone.
    """
    *keys, phase = np.random.SeedSequence((seed, epoch, part)).generate_state(SHUFFLE_ROUNDS + 1, np.uint64)
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
