"""Which text is for training and which for validation. No seed enters: every run is measured on the same text."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from foundry_jax.data.sources.text import Document
from foundry_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Texts:
    """Non-empty texts that can be read again and again without being held in memory."""

    read: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        return (text for text in self.read() if text)


def split(documents: Iterable[Document], how: str, fraction: float) -> tuple[Texts, Texts]:
    """Returns (training, validation) texts; how is "document", "tail" or "last", fraction the share of validation.

    Raises:
        UserError: one side or both are empty.
    """
    train, validation = {"document": _by_document, "tail": _by_tail, "last": _by_last}[how](documents, fraction)
    empty = [what for what, texts in (("training", train), ("validation", validation)) if _is_empty(texts)]
    if len(empty) == 2:
        raise UserError("The data holds no text: there is nothing in data.path, or only empty files.")
    if empty:
        raise UserError(
            f"data.split={'tail' if how == 'last' else how} with data.validation_fraction={fraction:g} leaves no "
            f"{empty[0]} text; try {'data.split=tail' if how == 'document' else 'more text'}."
        )
    return train, validation


def in_validation(document_id: str, fraction: float) -> bool:
    """Returns whether a document is for validation: a hash of its id, so that others coming or going move nothing."""
    digest = hashlib.sha256(document_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _is_empty(texts: Texts) -> bool:
    return next(iter(texts), None) is None


def _by_document(documents: Iterable[Document], fraction: float) -> tuple[Texts, Texts]:
    def side(validation: bool) -> Iterator[str]:
        return (document.text for document in documents if in_validation(document.id, fraction) == validation)

    return Texts(partial(side, False)), Texts(partial(side, True))


def _by_tail(documents: Iterable[Document], fraction: float) -> tuple[Texts, Texts]:
    """Returns the head and the tail of all characters in order, cut as nanoGPT does: text[:int(n * 0.9)]."""
    total = sum(len(document.text) for document in documents)
    cut = int(total * (1 - fraction))
    return Texts(partial(_span, documents, 0, cut)), Texts(partial(_span, documents, cut, total))


def _by_last(documents: Iterable[Document], fraction: float) -> tuple[Texts, Texts]:
    """Returns the first and the last documents, whole ones: at least one for validation."""
    total = sum(1 for _ in documents)
    cut = max(total - max(round(total * fraction), 1), 0)

    def part(start: int, stop: int) -> Iterator[str]:
        return (document.text for document in itertools.islice(documents, start, stop))

    return Texts(partial(part, 0, cut)), Texts(partial(part, cut, total))


def _span(documents: Iterable[Document], start: int, stop: int) -> Iterator[str]:
    """Yields the parts of the documents between two positions in their concatenation."""
    position = 0
    for document in documents:
        yield document.text[max(start - position, 0) : max(stop - position, 0)]
        position += len(document.text)
