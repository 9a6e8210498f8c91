"""Data sets of the Hugging Face hub, or of a folder, by the optional package `datasets`.

    data.source="huggingface(path='roneneldan/TinyStories', split='train', text='text')"

A document is a value of a column of text. The data set is downloaded once, to the cache of `datasets`, and read there.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from foundry_jax.data.document import Document
from foundry_jax.data.hub import load_dataset
from foundry_jax.data.sources.rows import Row, document, require_field
from foundry_jax.schema import require

INSTEAD = "Instead, get its files as JSONL, Parquet or text, and use data.source=jsonl, parquet or text."


@dataclasses.dataclass(frozen=True)
class HubRows:
    """A document for each row of a split."""

    name: str
    rows: Any  # a datasets.Dataset: memory-mapped
    text: str  # the column that holds it
    id: str  # the column that names it; empty: its place does

    def fingerprint(self) -> list:
        """Returns the data set's own fingerprint, a hash of what it was made from, and which columns are read."""
        return ["huggingface", self.rows._fingerprint, self.text, self.id]

    def undecodable(self) -> list[str]:
        """Returns nothing: such data sets hold text."""
        return []

    def __iter__(self) -> Iterator[Document]:
        columns = self.rows.select_columns([column for column in (self.text, self.id) if column])
        for number, fields in enumerate(columns, start=1):
            row = Row(f"{self.name}, row {number}", number, fields)
            yield document(row, self.name, text=self.text, id=self.id, source="huggingface")


def find(path: str, *, config: str = "", split: str = "train", text: str = "text", id: str = "") -> HubRows:
    """Returns the rows of a data set.

    Args:
        path: its name on the hub, or a folder.
        config: its part, if it has several.
        split: as `datasets` writes it: "train", "train[:10%]".
        text: the column that holds the text.
        id: a column that names a document, so that it stays on its side of the split wherever it stands.

    Raises:
        UserError: no such data set, no package to get it with, or no network: says what to do instead.
    """
    require(bool(path), "data.path is empty; data.source=huggingface needs the name of a data set, such as owner/name.")
    rows = load_dataset(
        path, name=config or None, split=split, subject=f"data.path={path!r} with {split=}", instead=INSTEAD
    )
    name = ", ".join(filter(None, (path, config, split)))
    require_field(name, text, "text", rows.column_names, "huggingface")
    require_field(name, id, "id", rows.column_names, "huggingface")
    return HubRows(name, rows, text, id)
