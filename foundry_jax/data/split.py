"""Which documents are for training and which for validation. No seed enters: every run is measured on the same text."""

import abc
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import ClassVar

from foundry_jax.data.document import Document
from foundry_jax.errors import UserError
from foundry_jax.schema import require_range, variant


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents with text, which can be read again and again without being held in memory."""

    read: Callable[[], Iterable[Document]]

    def __iter__(self) -> Iterator[Document]:
        return (document for document in self.read() if document.text)

    def __bool__(self) -> bool:
        return next(iter(self), None) is not None


@dataclasses.dataclass(frozen=True)
class Validation(abc.ABC):
    """How documents are divided; fraction: the share that is never trained on."""

    name: ClassVar[str]
    fraction: float = 0.05

    def __post_init__(self):
        require_range(self, f"data.validation={self.name}: ", fraction=(0.0001, 0.5))

    @abc.abstractmethod
    def sides(self, documents: Iterable[Document]) -> tuple[Documents, Documents]:
        """Returns (training, validation) documents."""


class ByDocument(Validation):
    """A share of the documents, chosen by a hash of their ids."""

    name: ClassVar[str] = "document"

    def sides(self, documents: Iterable[Document]) -> tuple[Documents, Documents]:
        return tuple(Documents(partial(self._side, documents, validation)) for validation in (False, True))

    def _side(self, documents: Iterable[Document], validation: bool) -> Iterator[Document]:
        return (one for one in documents if in_validation(one.id, self.fraction) == validation)


class Tail(Validation):
    """The end of the text, cut as nanoGPT does: text[int(n * 0.9):]; of conversations the last ones, whole."""

    name: ClassVar[str] = "tail"

    def sides(self, documents: Iterable[Document]) -> tuple[Documents, Documents]:
        first = next(iter(documents), None)
        if first is not None and first.conversation:
            total = sum(1 for _ in documents)
            cut = max(total - max(round(total * self.fraction), 1), 0)
            part = lambda start, stop: itertools.islice(documents, start, stop)  # noqa: E731
        else:
            total = sum(len(document.text) for document in documents)
            cut = int(total * (1 - self.fraction))
            part = partial(_span, documents)
        return Documents(partial(part, 0, cut)), Documents(partial(part, cut, total))


VALIDATIONS: dict[str, type[Validation]] = {one.name: one for one in (ByDocument, Tail)}


def parse(validation: str) -> Validation:
    """Returns what data.validation stands for.

    Raises:
        UserError: an unknown name, or a fraction out of range.
    """
    return variant(validation, VALIDATIONS, "data.validation")


def split(documents: Iterable[Document], validation: str) -> tuple[Documents, Documents]:
    """Returns (training, validation) documents as data.validation says."""
    return parse(validation).sides(documents)


def require_both(sides: tuple[bool, bool], validation: str) -> None:
    """Raises UserError, with advice, unless there are (training, validation) documents."""
    empty = [what for what, there in zip(("training", "validation"), sides, strict=True) if not there]
    if len(empty) == 2:
        raise UserError("The data holds no text: there is nothing in data.path, or only empty files.")
    if empty:
        advice = "data.validation=tail" if isinstance(parse(validation), ByDocument) else "more text"
        raise UserError(f"data.validation={validation} leaves no {empty[0]} text; try {advice}.")


def in_validation(document_id: str, fraction: float) -> bool:
    """Returns whether a document is for validation: a hash of its id, so that others coming or going move nothing."""
    return place_of(document_id) < fraction * 2**64


def place_of(document_id: str) -> int:
    """Returns a number below 2**64, evenly distributed over ids; those with the smallest are held out."""
    return int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:8], "big")


def _span(documents: Iterable[Document], start: int, stop: int) -> Iterator[Document]:
    """Yields the parts of the documents between two positions in their concatenation."""
    position = 0
    for document in documents:
        text = document.text[max(start - position, 0) : max(stop - position, 0)]
        yield document._replace(text=text)
        position += len(document.text)
