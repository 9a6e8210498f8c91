"""Filters at work, and the report of what they removed and why."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from foundry_jax.data.document import Document
from foundry_jax.data.filters.base import Filter, Judge
from foundry_jax.data.tools import Tools
from foundry_jax.errors import UserError

# Judged at a time: enough for libraries and models that are faster at many, little enough to hold in memory.
BLOCK_DOCUMENTS = 256
BLOCK_CHARACTERS = 1 << 20

NUM_SAMPLES = 5  # kept for each filter, the first it removed
SAMPLE_CHARACTERS = 200


class Removal(NamedTuple):
    """A document that a filter removed: its id, why, and how its text begins."""

    id: str
    why: str
    text: str


@dataclasses.dataclass
class Tally:
    """What one filter did. Bytes are of UTF-8.

    {"filter": "exact", "documents_in": 700, "bytes_in": 81920, "documents_removed": 2, "bytes_removed": 512,
     "samples": [["a.py", "the same text as an earlier document", "import os"], ...]}
    """

    filter: str
    documents_in: int = 0
    bytes_in: int = 0
    documents_removed: int = 0
    bytes_removed: int = 0
    samples: list[Removal] = dataclasses.field(default_factory=list)

    @property
    def documents_out(self) -> int:
        return self.documents_in - self.documents_removed

    def count(self, documents: Sequence[Document], verdicts: Sequence[str | None]) -> list[Document]:
        """Returns the documents that are kept."""
        removed = [(document, why) for document, why in zip(documents, verdicts, strict=True) if why is not None]
        self.documents_in += len(documents)
        self.bytes_in += sum(_bytes(document.text) for document in documents)
        self.documents_removed += len(removed)
        self.bytes_removed += sum(_bytes(document.text) for document, _ in removed)
        for document, why in removed[: NUM_SAMPLES - len(self.samples)]:
            self.samples.append(Removal(document.id, why, document.text[:SAMPLE_CHARACTERS]))
        return [document for document, why in zip(documents, verdicts, strict=True) if why is None]


@dataclasses.dataclass
class Report:
    """What each of some filters did, in their order."""

    filters: list[Tally]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Report":
        """Returns the report that to_json was asked of."""
        tallies = [Tally(**tally) for tally in values["filters"]]
        for tally in tallies:
            tally.samples = [Removal(*sample) for sample in tally.samples]
        return cls(tallies)


def run(filters: Sequence[Filter], documents: Iterable[Document], tools: Tools) -> tuple[Iterator[Document], Report]:
    """Returns what `filtered` does."""
    report = Report([Tally(str(filter)) for filter in filters])
    return _kept([filter.judge(tools) for filter in filters], documents, report), report


def _kept(judges: Sequence[Judge], documents: Iterable[Document], report: Report) -> Iterator[Document]:
    for block in _blocks(documents):
        for judge, tally in zip(judges, report.filters, strict=True):
            block = tally.count(block, judge(block)) if block else block
        yield from block
    if report.filters and report.filters[0].documents_in and not report.filters[-1].documents_out:
        raise UserError(_nothing_left(report))


def _blocks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    block, characters = [], 0
    for document in documents:
        if not document.text:
            continue
        block.append(document)
        characters += len(document.text)
        if len(block) == BLOCK_DOCUMENTS or characters >= BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    yield block


def _nothing_left(report: Report) -> str:
    removing = [tally for tally in report.filters if tally.documents_removed]
    counts = [f"{tally.filter} {tally.documents_removed:,} of {tally.documents_in:,}" for tally in removing]
    last = removing[-1].samples[0]
    return (
        f"data.filters removes every document: {', '.join(counts)}; {last.id!r} for one, because: {last.why}. "
        f"Loosen one of them, or leave it out."
    )


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
