"""Parquet files. A document is a value of a column of text.

A file is read a few rows at a time, whatever the size of its row groups.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foundry_jax.data.document import Document
from foundry_jax.data.sources import files
from foundry_jax.data.sources.rows import Row, decoded, document, require_field
from foundry_jax.errors import UserError, first_line

SUFFIXES = (".parquet",)
ROWS = 64  # read at a time
TEXT = ("string", "large_string", "binary", "large_binary", "dictionary<values=string")  # names of types
# Of a column at a time. By default all of a row group is held: 500 MB for one of 400 MB, 180 MB like this (2026-11).
BUFFER_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class ParquetFiles(files.Files):
    """A document for each row of some files."""

    text: str  # the column that holds it
    id: str  # the column that names it; empty: its place does

    def fingerprint(self) -> list:
        """Returns a hash of the files, and which columns are read."""
        return ["parquet", super().fingerprint(), self.text, self.id]

    def __iter__(self) -> Iterator[Document]:
        for name, path in sorted(self.paths.items()):
            for row in _rows(path, text=self.text, id=self.id):
                yield document(row, name, text=self.text, id=self.id, source="parquet")


def find(path: str, *, text: str = "text", id: str = "") -> ParquetFiles:
    """Returns the Parquet files at a path: itself, those below a folder, or a glob's matches.

    Args:
        text: the column that holds the text.
        id: a column that names a document, so that it stays on its side of the split wherever it stands.

    Raises:
        UserError: nothing is there.
    """
    found = files.at(path, "parquet", suffixes=SUFFIXES)
    return ParquetFiles(found.name, found.paths, text, id)


def _rows(path: Path, **options: str) -> Iterator[Row]:
    """Yields the rows of a file, with the columns that the options name."""
    import pyarrow  # takes 0.25 s
    import pyarrow.parquet

    columns = list(dict.fromkeys(filter(None, options.values())))
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES) as file:
            for option, column in options.items():
                require_field(str(path), column, option, file.schema_arrow.names, "parquet")
            for batch in file.iter_batches(ROWS, columns=columns):
                for values in zip(*map(_values, batch.columns), strict=True):
                    number += 1
                    where = f"{path}, row {number}"
                    texts = (decoded(value, where) for value in values)
                    yield Row(where, number, dict(zip(batch.schema.names, texts, strict=True)))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no Parquet file: {first_line(error)}.") from None
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from None


def _values(column) -> list[Any]:
    """Returns the values of a column, text as bytes: the library does not look whether it is UTF-8."""
    return (column.cast("large_binary") if str(column.type).startswith(TEXT) else column).to_pylist()
