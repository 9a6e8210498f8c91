"""JSON Lines, also compressed (.jsonl.gz). A document is a field of a line; its id is its place, or another field.

{"text": "Once upon a time", "id": "story-17", "anything": "else"}
"""

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foundry_jax.data.document import Document
from foundry_jax.data.sources import files
from foundry_jax.data.sources.rows import Row, document, not_utf8
from foundry_jax.errors import UserError
from foundry_jax.schema import require

SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclasses.dataclass(frozen=True)
class JsonLines(files.Files):
    """A document for each line of some files, read line by line."""

    text: str  # the field that holds it
    id: str  # the field that names it; empty: its place does

    def fingerprint(self) -> list:
        """Returns a hash of the files, and which fields are read."""
        return ["jsonl", super().fingerprint(), self.text, self.id]

    def __iter__(self) -> Iterator[Document]:
        for name, path in sorted(self.paths.items()):
            for row in rows(path, f'{{"{self.text}": "..."}}'):
                yield document(row, name, text=self.text, id=self.id, source="jsonl")


def find(path: str, *, text: str = "text", id: str = "") -> JsonLines:
    """Returns the JSONL files at a path: itself, those below a folder, or a glob's matches.

    Args:
        text: the field that holds the text.
        id: a field that names a document, so that it stays on its side of the split wherever it stands.

    Raises:
        UserError: nothing is there.
    """
    found = files.at(path, "jsonl", suffixes=SUFFIXES)
    return JsonLines(found.name, found.paths, text, id)


def rows(path: Path, shape: str) -> Iterator[Row]:
    """Yields the objects of a file, one a line; blank lines are skipped.

    Args:
        shape: what a line looks like, for messages.

    Raises:
        UserError: the file cannot be read, or a line is no object: names the file and the line.
    """
    opened = gzip.open if path.name.endswith(".gz") else open
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield Row(where, number, _parse(line, where, shape))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}.") from None
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from None


def _parse(line: bytes, where: str, shape: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise not_utf8(where, error, "line") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); a line is {shape}.") from None
    require(isinstance(row, dict), f"{where}: {type(row).__name__} instead of an object; a line is {shape}.")
    if rb"\u" in line:
        require(_is_unicode(row), f"{where}: holds one half of a surrogate pair, which is no character.")
    return row


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
