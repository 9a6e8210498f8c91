"""UTF-8 text files: one file, a folder of them, or a glob. A document is a file, or what stands between separators.

    data.source="text(path='TinyStories.txt', separator='<|endoftext|>')"

A file without separators is in memory whole; of one with them, a document at a time.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foundry_jax.data.document import Document
from foundry_jax.data.sources import files
from foundry_jax.errors import UserError

BLOCK = 1 << 20  # bytes read at a time


@dataclasses.dataclass(frozen=True)
class TextFiles(files.Files):
    """The documents of some files, in the order of their ids, as they are asked for.

    Text is exactly what the bytes say: no newline translation, and a byte order mark is a character.
    """

    skip_undecodable: bool = False
    separator: str = ""  # what stands between documents; empty: a file is one

    def fingerprint(self) -> Any:
        """Returns a hash of the files, and what separates documents."""
        return ["text", super().fingerprint(), self.separator] if self.separator else super().fingerprint()

    def undecodable(self) -> list[str]:
        """Returns the ids that iterating leaves out because their file is not UTF-8."""
        kept = {document.id for document in self} if self.skip_undecodable else self.paths.keys()
        return sorted(self.paths.keys() - kept)

    def __iter__(self) -> Iterator[Document]:
        for name, path in sorted(self.paths.items()):
            for number, (offset, data) in enumerate(_pieces(path, self.separator.encode()), start=1):
                try:
                    yield Document(f"{name}:{number}" if self.separator else name, data.decode("utf-8"))
                except UnicodeDecodeError as error:
                    if not self.skip_undecodable:
                        raise UserError(
                            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start}; "
                            f"convert the file, or leave it out of data.path with a glob."
                        ) from None


def find(path: str, *, separator: str = "") -> TextFiles:
    """Returns the text files at a path: itself, every file below a folder except hidden ones, or a glob's matches.

    Args:
        separator: the text between two documents of a file, which belongs to neither; empty: a file is one document.

    Raises:
        UserError: nothing is there.
    """
    found = files.at(path, "text")
    return TextFiles(found.name, found.paths, separator=separator)


def _pieces(path: Path, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields (offset in the file, bytes) of what stands between separators; of all there is if they are empty."""
    try:
        if not separator:
            yield 0, path.read_bytes()
            return
        buffer, offset = bytearray(), 0
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                searched = max(len(buffer) - len(separator) + 1, 0)  # a separator may have begun in the last block
                buffer += block
                while (end := buffer.find(separator, searched)) >= 0:
                    yield offset, bytes(buffer[:end])
                    del buffer[: end + len(separator)]
                    offset, searched = offset + end + len(separator), 0
        yield offset, bytes(buffer)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
