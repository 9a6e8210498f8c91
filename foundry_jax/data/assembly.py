"""From a corpus to batches: packing and curriculum, worked out once and kept in the token cache.

<cache>/tokens/<key>/pieces.npy, offsets.npy    the rows that a stream is packed into; see pack.py
<cache>/tokens/<key>/difficulty.npy             [documents] float64, how hard each is; see curriculum.py
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foundry_jax.data import curriculum, pack
from foundry_jax.data.batches import (
    ALL_ROWS,
    Portion,
    TrainBatches,
    ValidationBatches,
    train_batches,
    validation_batches,
)
from foundry_jax.data.cache import open_or_build
from foundry_jax.data.corpus import Corpus, Part
from foundry_jax.data.stream import Stream
from foundry_jax.data.tokenize import Tokenizer
from foundry_jax.data.tools import Tools
from foundry_jax.errors import UserError

if TYPE_CHECKING:  # as in corpus.py
    from foundry_jax.config import DataConfig

log = logging.getLogger(__name__)

# How conversations that are held out are put into sequences, whatever data.packing says: in order, so that a part of
# the sequences is the same part of the conversations in every format.
ISOLATED = "first_fit(bins=1)"
FORMAT = 1  # raise it when the same packing would give other rows
MEASURED_TOKENS = 1 << 20  # that are decoded at a time


def training(
    corpus: Corpus,
    config: DataConfig,
    *,
    context_length: int,
    num_steps: int,
    seed: int,
    rows: slice = ALL_ROWS,
    tools: Tools | None = None,
) -> TrainBatches:
    """Returns the training batches of a corpus; config.batch_size is global, `rows` are this process's.

    Args:
        num_steps: of the run, over which a curriculum is spread.

    Raises:
        UserError: there are too few tokens, or a curriculum needs texts or tools that are not there.
    """
    portions = []
    for part in corpus.train:
        packed = _rows(corpus, part.stream, part.key, config.packing, context_length)
        order = _order(corpus, part, config, packed, context_length, num_steps, tools or Tools())
        portions.append(Portion(part.stream, part.weight, packed, order))
    return train_batches(portions, batch_size=config.batch_size, context_length=context_length, seed=seed, rows=rows)


def validation(
    corpus: Corpus, *, batch_size: int, context_length: int, rows: slice = ALL_ROWS
) -> tuple[ValidationBatches, ...]:
    """Returns the batches that predict everything held out once, source after source."""
    found = []
    for held in corpus.validation:
        packing = ISOLATED if held.isolated else "stream"
        packed = _rows(corpus, held.stream, held.key, packing, context_length)
        sizes = {"batch_size": batch_size, "context_length": context_length}
        found.append(validation_batches(held.stream, packed, **sizes, rows=rows))
    return tuple(found)


def _rows(corpus: Corpus, stream: Stream, key: str, packing: str, context_length: int) -> pack.Rows | None:
    """Returns how a stream is packed; None for the endless stream."""
    if packing == "stream":
        return None
    spec = {"format": FORMAT, "stream": key, "packing": packing, "context_length": context_length}
    entry = open_or_build(corpus.cache, spec, partial(_pack, stream, packing, context_length))
    log.info(
        "%s into %s sequences of %d tokens, %.1f %% of them used; %s of %s documents are split.",
        packing, f"{entry.facts['rows']:,}", context_length, 100 * entry.facts["efficiency"],
        f"{entry.facts['split_documents']:,}", f"{entry.facts['documents']:,}")  # fmt: skip
    return pack.Rows.load(entry.folder)


def _pack(stream: Stream, packing: str, context_length: int, folder: Path) -> dict[str, Any]:
    rows = pack.plan(stream.starts, packing, context_length, stream.trained)
    rows.save(folder)
    return pack.figures(rows, stream.starts, context_length)


def _order(
    corpus: Corpus,
    part: Part,
    config: DataConfig,
    packed: pack.Rows | None,
    context_length: int,
    num_steps: int,
    tools: Tools,
) -> curriculum.Curriculum | None:
    kind = curriculum.parse(config.curriculum)
    if kind is None:
        return None
    spec = {"format": FORMAT, "stream": part.key, "difficulty": kind.fingerprint(tools)}
    entry = open_or_build(corpus.cache, spec, partial(_measure, part.stream, corpus.tokenizer, kind, tools))
    difficulty = np.load(entry.folder / "difficulty.npy", allow_pickle=False)
    return curriculum.curriculum(kind, num_steps, difficulty, part.stream.starts, packed, context_length)


def _measure(
    stream: Stream, tokenizer: Tokenizer | None, kind: curriculum.Difficulty, tools: Tools, folder: Path
) -> dict[str, Any]:
    """Writes how hard each document is."""
    measure, decode = kind.measure(tools), None
    if kind.reads_text:
        if tokenizer is None:
            raise UserError("data.curriculum needs a tokenizer, but the token files have none; set data.tokenizer.")
        decode = partial(tokenizer.decode, skip_special=True)
    found = itertools.chain.from_iterable(measure(*group) for group in _groups(stream, decode))
    np.save(folder / "difficulty.npy", np.fromiter(found, np.float64, stream.num_documents), allow_pickle=False)
    return {}


def _groups(stream: Stream, decode: Callable[[np.ndarray], str] | None) -> Iterator[tuple[list[str], list[int]]]:
    """Yields (texts, numbers of tokens) of some documents at a time, in order; without `decode` the texts are empty."""
    texts, sizes, total = [], [], 0
    for start, stop in itertools.pairwise(stream.starts.tolist()):
        texts.append(decode(stream.tokens[start:stop]) if decode else "")
        sizes.append(stop - start)
        total += stop - start
        if total >= MEASURED_TOKENS:
            yield texts, sizes
            texts, sizes, total = [], [], 0
    if texts:
        yield texts, sizes
