"""Filters that know more than the text: languages, a model's opinion, what the evaluation asks."""

import dataclasses
import functools
import importlib
import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from foundry_jax.data.document import Document
from foundry_jax.data.filters.base import Filter, Judge
from foundry_jax.data.filters.words import VERSION, hashed, runs
from foundry_jax.data.hashing import sha256_json
from foundry_jax.data.tools import Tools
from foundry_jax.errors import UserError
from foundry_jax.registry import unknown

log = logging.getLogger(__name__)

LOOKED_AT = 1000  # characters that decide the language: py3langid reads about 2 MB/s (busy cores, 2026-11)
FEWEST_WORDS = 8  # of an item that can be looked for: shorter ones stand in innocent texts (GPT-3, 2005.14165)
WORD = re.compile(r"\w+")


@dataclasses.dataclass(frozen=True)
class Language(Filter):
    """Texts in one of some languages, ISO 639-1 codes such as keep='en, de', with a probability of at least `min`.

    The language is that of the beginning, as py3langid sees it.
    """

    name = "language"
    keep: str = "en"
    min: float = 0.5

    def __post_init__(self):
        self._require_range(min=(0, 1))
        self._require(bool(_names(self.keep)), "keep must name a language, such as keep='en'.")

    def judge(self, tools: Tools) -> Judge:
        kept, classify = set(_names(self.keep)), self._classifier()

        def why(text: str) -> str | None:
            language, probability = classify(text[:LOOKED_AT])
            if language not in kept:
                return f"language {language} with probability {probability:.2f}, not {self.keep}"
            if probability < self.min:
                return f"language {language} with probability {probability:.2f}, less than min={self.min:g}"
            return None

        return lambda documents: [why(document.text) for document in documents]

    def fingerprint(self, tools: Tools) -> list:
        return [str(self), _langid().__version__]

    def _classifier(self) -> Callable[[str], tuple[str, float]]:
        identifier = _identifier()
        for language in _names(self.keep):
            if language not in identifier.labels:
                raise UserError(unknown(language, identifier.labels, "language in data.filters=language: keep"))
        return identifier.classify


@dataclasses.dataclass(frozen=True)
class Perplexity(Filter):
    """Texts that cost a model at least `min` and at most `max` nats for each byte of UTF-8."""

    name = "perplexity"
    model: str = "smollm2-135m"
    min: float = 0.0
    max: float = 2.0

    def __post_init__(self):
        self._require_range(min=(0, math.inf), max=(0, math.inf))
        self._require(self.min <= self.max, f"keeps nothing, min={self.min:g} is more than max.")
        self._require(bool(self.model.strip()), "model must name a model, such as model='smollm2-135m'.")

    def judge(self, tools: Tools) -> Judge:
        scorer = tools.scorer(self.model)
        return lambda documents: [self._why(cost) for cost in scorer([document.text for document in documents])]

    def fingerprint(self, tools: Tools) -> list:
        return [str(self), tools.scorer(self.model).fingerprint]

    def _why(self, cost: float) -> str | None:
        if self.min <= cost <= self.max:
            return None
        return f"{cost:.3f} nats a byte, not between min={self.min:g} and max={self.max:g}"


@dataclasses.dataclass(frozen=True)
class Decontaminate(Filter):
    """Texts that have no `n` words in a row in common with any item of some evaluation tasks.

    Only letters and digits count, without regard to case. An item of fewer words is looked for as a whole if it has
    at least FEWEST_WORDS of them.

    tasks: such as 'gsm8k, mmlu'. data: the folder of their data, as --data of foundry_jax.eval; '': its default.
    """

    name = "decontaminate"
    tasks: str = ""
    data: str = ""
    n: int = 13

    def __post_init__(self):
        self._require_range(n=(FEWEST_WORDS, 1000))
        self._require(bool(_names(self.tasks)), "tasks must name evaluation tasks, such as tasks='gsm8k, mmlu'.")

    def judge(self, tools: Tools) -> Judge:
        known = self._known([WORD.findall(item.lower()) for item in tools.items(self.tasks, self.data)])

        def judge(documents: Sequence[Document]) -> list[str | None]:
            words = [WORD.findall(document.text.lower()) for document in documents]
            return [self._why(*one, known) for one in zip(words, hashed(words), strict=True)]

        return judge

    def fingerprint(self, tools: Tools) -> list:
        return [str(self), VERSION, sha256_json(list(tools.items(self.tasks, self.data)))]

    def _known(self, items: Sequence[Sequence[str]]) -> dict[int, np.ndarray]:
        """Returns {number of words: sorted hashes of runs of so many words in the items}."""
        long_enough = [words for words in items if len(words) >= FEWEST_WORDS]
        self._require(bool(long_enough), f"none of the {len(items):,} items has {FEWEST_WORDS} words to look for.")
        log.info("%s: %s items, %s of them too short.", self, f"{len(items):,}", f"{len(items) - len(long_enough):,}")
        found: dict[int, list[np.ndarray]] = {}
        for hashes in hashed(long_enough):
            length = min(self.n, len(hashes))
            found.setdefault(length, []).append(runs(hashes, length))
        return {length: np.unique(np.concatenate(some)) for length, some in sorted(found.items())}

    def _why(self, words: Sequence[str], hashes: np.ndarray, known: dict[int, np.ndarray]) -> str | None:
        for length, theirs in known.items():
            ours = runs(hashes, length)
            at = np.flatnonzero(theirs[np.searchsorted(theirs, ours).clip(max=len(theirs) - 1)] == ours)
            if len(at):
                return f"{length} words of an item of {self.tasks}: {' '.join(words[at[0] : at[0] + length])!r}"
        return None


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _langid() -> Any:
    try:
        return importlib.import_module("py3langid")
    except ImportError:
        raise UserError("data.filters=language needs the package py3langid: pip install py3langid.") from None


@functools.cache
def _identifier() -> Any:
    """Returns py3langid's model, which takes 0.4 s to read, giving probabilities."""
    _langid()
    module = importlib.import_module("py3langid.langid")
    return module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)
