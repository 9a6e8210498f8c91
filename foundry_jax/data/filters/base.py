"""What a filter is: a frozen dataclass of its options that makes a judge of documents."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from foundry_jax.data.document import Document
from foundry_jax.data.tools import Tools
from foundry_jax.schema import require, require_range

Judge = Callable[[Sequence[Document]], list[str | None]]  # why each document is removed; None: it is kept


class Filter(abc.ABC):
    """Options, each with a default, checked when they are given.

    name: in data.filters.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def judge(self, tools: Tools) -> Judge:
        """Returns a judge that is given all documents in order, some at a time; it keeps in mind what it has to.

        How many come at a time never changes a verdict.

        Raises:
            UserError: something is missing that the filter needs.
        """

    def fingerprint(self, tools: Tools) -> Any:
        """Returns JSON that is another whenever verdicts may be."""
        return str(self)

    def __str__(self) -> str:
        """The call with every option: length(min=200, max=0)."""
        options = [f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self)]
        return f"{self.name}({', '.join(options)})" if options else self.name

    def _require(self, condition: bool, problem: str) -> None:
        require(condition, f"data.filters={self}: {problem}")

    def _require_range(self, **bounds: tuple[float, float]) -> None:
        require_range(self, f"data.filters={self.name}: ", **bounds)


class TextFilter(Filter):
    """A filter that looks at each text by itself."""

    @abc.abstractmethod
    def why(self, text: str) -> str | None:
        """Returns why a text is removed, with the number that decided; None: it is kept."""

    def judge(self, tools: Tools) -> Judge:
        return lambda documents: [self.why(document.text) for document in documents]
