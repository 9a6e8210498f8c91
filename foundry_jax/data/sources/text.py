"""UTF-8 text files: one file, a folder of them, or a glob. A document is a file."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from foundry_jax.data.document import Document
from foundry_jax.data.sources import files
from foundry_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TextFiles(files.Files):
    """The documents of some files, in the order of their ids; iterating reads one file at a time.

    Text is exactly what the bytes say: no newline translation, and a byte order mark is a character.
    """

    skip_undecodable: bool = False

    def undecodable(self) -> list[str]:
        """Returns the ids that iterating leaves out because their file is not UTF-8."""
        kept = {document.id for document in self} if self.skip_undecodable else self.paths.keys()
        return sorted(self.paths.keys() - kept)

    def __iter__(self) -> Iterator[Document]:
        for name, path in sorted(self.paths.items()):
            data = _read(path)
            try:
                yield Document(name, data.decode("utf-8"))
            except UnicodeDecodeError as error:
                if not self.skip_undecodable:
                    raise UserError(
                        f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; "
                        f"convert the file, or leave it out of data.path with a glob."
                    ) from None


def find(path: str) -> TextFiles:
    """Returns the text files at a path: itself, every file below a folder except hidden ones, or a glob's matches.

    Raises:
        UserError: nothing is there.
    """
    found = files.at(path, "text")
    return TextFiles(found.name, found.paths)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
