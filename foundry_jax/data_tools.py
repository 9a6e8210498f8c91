"""What filters and curricula may ask for, made of models and tasks, which `data` does not know."""

import functools
import inspect
from collections.abc import Iterator, Sequence

import jax

from foundry_jax.data.tools import Tools
from foundry_jax.registry import lookup


class ModelScorer:
    """A pretrained model or a run that says how hard texts are; it is loaded when it is first asked."""

    def __init__(self, model: str):
        """Opens the model.

        Raises:
            UserError: there is none of that name.
        """
        from foundry_jax import zoo  # as train.open_source: it takes time, and most runs need none

        self.name, self.fingerprint = model, zoo.open_source(model).fingerprint

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """Returns the cross-entropy of each text in nats per UTF-8 byte; of one without text, 0."""
        log_probs = self._scorer.loglikelihood_rolling(texts)
        return [-log_prob / max(len(text.encode()), 1) for text, log_prob in zip(texts, log_probs, strict=True)]

    @functools.cached_property
    def _scorer(self):
        from foundry_jax.tasks.scoring import Scorer
        from foundry_jax.zoo import load_pretrained

        # On one device: of several processes only the one that builds the cache asks.
        return Scorer(load_pretrained(self.name, device=jax.local_devices()[0]))


def items(tasks: str, folder: str) -> Iterator[str]:
    """Yields what the items of some tasks say, question and answer, without examples; names have commas between them.

    Raises:
        UserError: an unknown task, or no data for it.
    """
    from foundry_jax.tasks import TASKS

    for name in filter(None, map(str.strip, tasks.split(","))):
        task = lookup(TASKS, name, "task")
        alone = {"shots": 0} if "shots" in inspect.signature(task).parameters else {}
        for item in task(folder or None, **alone).items():
            yield " ".join([item.prompt, item.gold, *_texts(item.fields)])


def _texts(value) -> Iterator[str]:
    """Yields every text in a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for inner in value.values() for text in _texts(inner))
    elif isinstance(value, (list, tuple)):
        yield from (text for inner in value for text in _texts(inner))


TOOLS = Tools(scorer=functools.lru_cache(maxsize=4)(ModelScorer), items=items)
