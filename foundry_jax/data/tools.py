"""What the data pipeline is handed by those above it, because it knows neither models nor tasks."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from foundry_jax.errors import UserError


class TextScorer(Protocol):
    """A model that says how hard texts are."""

    fingerprint: str  # of the model, for the keys of the cache

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """Returns the cross-entropy of each text in nats per UTF-8 byte."""


def _no_scorer(model: str) -> TextScorer:
    raise UserError(f"Nothing here can score texts with model={model!r}; train.run can.")


def _no_items(tasks: str, folder: str) -> Iterable[str]:
    raise UserError(f"Nothing here knows the items of tasks={tasks!r}; train.run does.")


@dataclasses.dataclass(frozen=True)
class Tools:
    """scorer: the name of a model -> its TextScorer. items: (names of tasks, folder with their data or "") -> texts."""

    scorer: Callable[[str], TextScorer] = _no_scorer
    items: Callable[[str, str], Iterable[str]] = _no_items
