"""Batches as text: what is trained on, and where one document ends and the next begins; and what there is in all."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from foundry_jax.data.batches import Batch, Packed, TrainBatches
from foundry_jax.data.batches import Part as ReadPart
from foundry_jax.data.corpus import Corpus, Part
from foundry_jax.data.pack import figures


@dataclasses.dataclass(frozen=True)
class Piece:
    """A document of a sequence, or a part of one.

    runs: [(text, whether it is trained on)], in order.
    """

    num_tokens: int
    runs: list[tuple[str, bool]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One sequence of a batch, and how many tokens of it are padding."""

    pieces: list[Piece]
    padding: int


def sequences(batch: Batch, decode: Callable[[Sequence[int]], str]) -> list[Row]:
    """Returns the sequences of a batch as text; of pairs the chosen and the rejected one of each, in turn."""
    rows = {name: x.reshape(-1, x.shape[-1]) for name, x in batch.items() if x.shape == batch["inputs"].shape}
    return [_sequence({name: x[row] for name, x in rows.items()}, decode) for row in range(len(rows["inputs"]))]


def _sequence(row: Batch, decode) -> Row:
    length = len(row["inputs"])
    positions = row.get("positions", np.arange(length))
    real = int(np.sum(positions >= 0))
    begins = [*np.flatnonzero(positions[:real] == 0).tolist(), real]
    pieces = [_piece(row, slice(start, stop), decode) for start, stop in itertools.pairwise(begins)]
    return Row(pieces, length - real)


def _piece(row: Batch, where: slice, decode) -> Piece:
    """Returns a piece: its first token, which nobody predicts, and its targets."""
    ids = [int(row["inputs"][where][0]), *row["targets"][where].tolist()]
    trained = [False, *(row["weights"][where] > 0).tolist()]
    groups = itertools.groupby(zip(ids, trained, strict=True), key=lambda item: item[1])
    runs = [(decode([index for index, _ in group]), is_trained) for is_trained, group in groups]
    return Piece(where.stop - where.start, runs)


def report(corpus: Corpus, batches: TrainBatches) -> dict[str, Any]:
    """Returns what there is to train on, source by source, and what the filters removed."""
    total = sum(part.weight for part in corpus.train)
    parts = [_facts(part, read, total) for part, read in zip(corpus.train, batches.parts, strict=True)]
    held = {"tokens": corpus.num_validation_tokens, "bytes": corpus.validation_bytes, "hash": corpus.validation_hash}
    return {"name": corpus.name, "parts": parts, "validation": held, "filters": list(corpus.reports)}


def _facts(part: Part, read: ReadPart, total: float) -> dict[str, Any]:
    stream = part.stream
    trained = len(stream.tokens) if stream.trained is None else int(np.sum(stream.trained))
    facts = {"name": part.name, "share": part.weight / total, "documents": stream.num_documents}
    facts |= {"tokens": len(stream.tokens), "trained": trained, "sequences": read.source.rows_per_epoch}
    if isinstance(read.source, Packed):
        found = figures(read.source.rows, stream.starts, read.source.context_length)
        facts |= {"filled": found["efficiency"], "split_documents": found["split_documents"]}
    return facts
