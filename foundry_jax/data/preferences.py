"""Preference pairs: two completions of one prompt, of which the first was preferred.

A JSONL file, one pair a line:

    {"prompt": "Human: How are you?\n\nAssistant:", "chosen": " Fine, thanks.", "rejected": " Go away."}

A sequence is the prompt's tokens, then the completion's, then the tokenizer's separator if it has one: it is predicted
too, so that an end is learned. Batches of P pairs, axis 1 being the chosen and the rejected completion:

    inputs, targets  [P, 2, L] int32
    weights          [P, 2, L] float32, 1 where the target belongs to the completion
    positions        [P, 2, L] int32, -1 where there is padding, on the right
    reference        [P, 2] float32, log-probabilities of the completions under the reference, in nats, once it is known
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from foundry_jax.data.batches import ALL_ROWS, Batch, TrainBatches, epoch_order, shuffled
from foundry_jax.data.tokenize import Tokenizer
from foundry_jax.errors import UserError
from foundry_jax.schema import require

log = logging.getLogger(__name__)

FIELDS = ("prompt", "chosen", "rejected")
PADDING = -1  # position of a token that is none; the model's mask.EMPTY


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """N pairs as 2 N sequences of at most context_length + 1 tokens, end to end: chosen, rejected, chosen, ..."""

    tokens: np.ndarray  # int32, of all sequences
    starts: np.ndarray  # [2 N + 1] int64, where each begins and the last ends
    prompt_lengths: np.ndarray  # [2 N] int64, 1 or more
    context_length: int

    def __len__(self) -> int:
        return len(self.prompt_lengths) // 2

    @functools.cached_property
    def hash(self) -> str:
        """The sha256 of all that is trained on."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.starts, self.prompt_lengths):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def batch(self, indices: np.ndarray) -> Batch:
        """Returns the batch of some pairs."""
        shape = (2 * len(indices), self.context_length)
        batch = {"inputs": np.zeros(shape, np.int32), "targets": np.zeros(shape, np.int32)}
        batch["weights"] = np.zeros(shape, np.float32)
        batch["positions"] = np.full(shape, PADDING, np.int32)
        for row, sequence in enumerate(np.stack([2 * indices, 2 * indices + 1], axis=1).ravel()):
            tokens = self.tokens[self.starts[sequence] : self.starts[sequence + 1]]
            length = len(tokens) - 1
            batch["inputs"][row, :length] = tokens[:-1]
            batch["targets"][row, :length] = tokens[1:]
            batch["weights"][row, self.prompt_lengths[sequence] - 1 : length] = 1
            batch["positions"][row, :length] = np.arange(length)
        return {name: x.reshape(-1, 2, self.context_length) for name, x in batch.items()}

    def in_order(self, size: int, rows: slice = ALL_ROWS) -> Iterator[Batch]:
        """Yields this process's rows of all pairs, `size` at a time; what does not fill the last batch is repeated."""
        for first in range(0, len(self), size):
            yield self.batch(np.arange(first, first + size)[rows] % len(self))


@dataclasses.dataclass(frozen=True, eq=False)
class PreferenceBatches:
    """Every batch of an endless run over the pairs: an epoch is a seeded permutation of all of them."""

    pairs: Pairs
    batch_size: int
    seed: int
    rows: slice  # of the global batch, those of this process
    reference: np.ndarray | None = None  # [N, 2] float32

    def batch(self, step: int) -> Batch:
        """Returns this process's rows of the global batch of a step."""
        first = step * self.batch_size
        epoch_P, index_P = np.divmod(np.arange(first, first + self.batch_size)[self.rows], len(self.pairs))
        for epoch in np.unique(epoch_P):
            keys, _ = epoch_order(self.seed, int(epoch))
            now = epoch_P == epoch
            index_P[now] = shuffled(index_P[now], len(self.pairs), keys)
        batch = self.pairs.batch(index_P)
        return batch if self.reference is None else batch | {"reference": self.reference[index_P]}

    iterate = TrainBatches.iterate  # it asks for batch(step) only


def read_pairs(path: str | os.PathLike, tokenizer: Tokenizer | None, context_length: int) -> Pairs:
    """Returns the pairs of a JSONL file as tokens.

    The prompt is tokenized by itself, so that both completions follow the same tokens. Where a pair is too long, the
    prompt of both loses its beginning; a completion loses its end only if it is too long for the context by itself.

    Raises:
        UserError: no such file, no pair in it, a line that is none, or no tokenizer that can encode it.
    """
    require(
        tokenizer is not None, "data.preferences needs a tokenizer, but data.source has none; set data.tokenizer_path."
    )
    texts = _read_texts(path)
    try:
        prompts, *completions = (tokenizer.encode_batch(column) for column in zip(*texts, strict=True))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    end = [] if tokenizer.separator_id is None else [tokenizer.separator_id]
    sequences, prompt_lengths, cut_prompts, cut_completions = [], [], 0, 0
    for row, (prompt, *pair) in enumerate(zip(prompts, *completions, strict=True)):
        prompt = prompt if len(prompt) else end
        require(len(prompt) > 0, f"Pair {row + 1} of {path} has no prompt, and the tokenizer no separator to stand in.")
        whole = [np.append(completion, end) for completion in pair]
        pair = [completion[:context_length] for completion in whole]
        room = context_length + 1 - max(map(len, pair))
        sequences += [np.append(prompt[-room:], completion).astype(np.int32) for completion in pair]
        prompt_lengths += 2 * [min(len(prompt), room)]
        cut_prompts += len(prompt) > room
        cut_completions += sum(len(completion) > context_length for completion in whole)
    _report(path, len(texts), context_length, cut_prompts, cut_completions)
    starts = np.concatenate([[0], np.cumsum([len(sequence) for sequence in sequences])])
    return Pairs(np.concatenate(sequences), starts, np.array(prompt_lengths), context_length)


def _report(path, num_pairs, context_length, cut_prompts, cut_completions) -> None:
    log.info("%s: %s pairs.", path, f"{num_pairs:,}")
    if cut_prompts:
        text = "%s of them are longer than model.context_length=%d: their prompts lose the beginning."
        log.info(text, f"{cut_prompts:,}", context_length)
    if cut_completions:
        log.warning("%s completions are longer by themselves and lose the end.", f"{cut_completions:,}")


def _read_texts(path: str | os.PathLike) -> list[tuple[str, str, str]]:
    try:
        with open(path, encoding="utf-8") as file:
            texts = [_parse(line, path, number) for number, line in enumerate(file, start=1) if line.strip()]
    except OSError as error:
        raise UserError(f"Cannot read data.preferences={str(path)!r}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"data.preferences={str(path)!r} is not UTF-8: {error}.") from None
    require(bool(texts), f"data.preferences={str(path)!r} has no pairs; a line is one, with {_NEEDED}.")
    return texts


_NEEDED = f"the texts {', '.join(FIELDS[:-1])} and {FIELDS[-1]}"


def _parse(line: str, path: str | os.PathLike, number: int) -> tuple[str, ...]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number}, is not JSON ({error}); it must have {_NEEDED}.") from None
    wrong = [name for name in FIELDS if not isinstance(row, dict) or not isinstance(row.get(name), str)]
    require(not wrong, f"{path}, line {number}, has no text {wrong and wrong[0]!r}; it must have {_NEEDED}.")
    return tuple(row[name] for name in FIELDS)


def write_reference(path: Path, key: str, reference: np.ndarray) -> None:
    """Keeps log-probabilities [N, 2] under a key: readers and crashes see the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, key=key, reference=reference)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk: they can be computed again
        temporary.unlink(missing_ok=True)
        log.warning("Cannot keep %s: %s.", path, error.strerror)


def read_reference(path: Path, key: str) -> np.ndarray | None:
    """Returns what was kept under a key; None if there is nothing, or it is damaged: the format has checksums."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) == key:
                return file["reference"]
            log.warning("%s is of other pairs or another model; computing it again.", path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged (%s); computing it again.", path, error)
    return None
