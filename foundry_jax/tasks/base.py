"""What a task is: items with their prompts, what is asked of a model about each, and what its answers are worth.

A scorer (scoring.py) answers requests. `tasks.run` asks it about some items at a time, with

    scorer.loglikelihood(continuations, progress) -> list of Score, in the order of the requests
    scorer.generate_until(generations, progress) -> list of texts, likewise

and progress(n) is called with the number of requests that were answered since it was called last. No answer depends on
what else is asked with it, so that a task can be asked in parts, and go on where it stopped.
"""

import abc
import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from foundry_jax.errors import UserError
from foundry_jax.tasks.requests import Continuation, Generation, Score

Request = Continuation | Generation
Answer = Score | str  # to the one and the other

NATS_PER_BIT = math.log(2)


class Metric(NamedTuple):
    """A score over n items with its standard error, which is NaN where n is too small to have one."""

    name: str
    value: float
    stderr: float
    n: int

    @property
    def is_detail(self) -> bool:
        """Whether it is of a part of a part of the items, such as one subject of MMLU: too much for a table."""
        return self.name.count("/") > 1


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    id: unique in its task, and the same whatever limit there is.
    prompt: what the model reads, with the examples before it.
    gold: the right answer, as it is shown.
    group: what else it is counted with, such as a subject.
    fields: what the task needs to score it.
    """

    id: str
    prompt: str
    gold: str
    group: str = ""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def prompt_sha256(self) -> str:
        """What two runs have in common that asked the same."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the answers about an item are worth.

    prediction: what the model answered, for people to read.
    metrics: numbers of which a task reports means.
    log_probs: nats of what was scored, by name.
    notes: whatever else belongs on the item's line in items.jsonl.
    """

    prediction: Any
    metrics: Mapping[str, float]
    log_probs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of items.jsonl: an item and its outcome, without the prompt.

    {"id": "anatomy/3", "group": "anatomy", "prompt_sha256": "0d5e...", "gold": "C", "prediction": "B",
     "metrics": {"accuracy": 0.0, ...}, "log_probs": {"A": -2.25, ...}, "rank": 170, "truncated": 0, "notes": {}}

    rank: its place in Task.ranked: whether it counts under a limit.
    truncated: how many of its requests were longer than the context and lost their beginning.
    """

    id: str
    group: str
    rank: int
    prompt_sha256: str
    gold: str
    prediction: Any
    metrics: Mapping[str, float]
    log_probs: Mapping[str, float]
    truncated: int
    notes: Mapping[str, Any]

    @classmethod
    def of(cls, item: Item, outcome: Outcome, *, rank: int = 0, truncated: int = 0) -> "Row":
        """Returns the line of an item."""
        return cls(
            item.id, item.group, rank, item.prompt_sha256, item.gold, outcome.prediction, dict(outcome.metrics),
            dict(outcome.log_probs), truncated, dict(outcome.notes),
        )  # fmt: skip


class Task(abc.ABC):
    """A set of items and how they are scored. Options are keyword arguments of a task's __init__, which reads the data:
    all that can be wrong with either is refused before a model is loaded.

    name: on the command line, and of its folder of results.
    description: one line for people.
    dataset: what the data is called in results.
    metrics: names of what `summarise` reports over all items; the first is the task's score.
    settings: what decides the numbers besides the model: a run that is continued must have the same.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    dataset: str
    metrics: tuple[str, ...]
    settings: Mapping[str, Any]

    @abc.abstractmethod
    def items(self) -> list[Item]:
        """Returns all items in an order that never changes."""

    @abc.abstractmethod
    def requests(self, item: Item) -> list[Request]:
        """Returns what is asked about an item."""

    @abc.abstractmethod
    def score(self, item: Item, answers: Sequence[Answer]) -> Outcome:
        """Returns what the answers to an item's requests are worth, one answer a request."""

    def score_all(self, items: Sequence[Item], answers: Sequence[Sequence[Answer]]) -> list[Outcome]:
        """Returns `score` of several items; for tasks that do better at many at once."""
        return [self.score(item, given) for item, given in zip(items, answers, strict=True)]

    def prepare(self) -> None:
        """Makes the prompts, and refuses before anything is asked what would only fail once it was answered.

        Raises:
            UserError: something the task needs is missing.
        """
        self.items()

    def ranked(self) -> list[Item]:
        """Returns all items in the order in which a limit takes them."""
        return self.items()

    def summarise(self, rows: Sequence[Row]) -> list[Metric]:
        """Returns the scores of some items: the mean of each metric."""
        return [mean(name, [row.metrics[name] for row in rows]) for name in self.metrics]


def mean(name: str, values: Sequence[float]) -> Metric:
    """Returns a mean and its standard error: the sample's standard deviation over the root of n, as lm-eval's."""
    return pooled(name, [values])


def pooled(name: str, groups: Sequence[Sequence[float]]) -> Metric:
    """Returns the mean over all values of some groups, with the standard error of a sample stratified by group.

    It is the root of s^2 / N, where s^2 is the variance within groups: lm-eval's pooled_sample_stderr. A group of one
    value says nothing about that; if there is one, as there is under a small limit, all values are one group.
    """
    values = [value for group in groups for value in group]
    N = len(values)
    if not N:
        raise UserError(f"There are no items to take the mean of {name} of.")
    groups = groups if all(len(group) > 1 for group in groups) else [values]
    freedom = N - len(groups)
    stderr = math.sqrt(math.fsum(map(_squares, groups)) / freedom / N) if freedom else math.nan
    return Metric(name, math.fsum(values) / N, stderr, N)


def _squares(values: Sequence[float]) -> float:
    """Returns the sum of squared distances from the mean."""
    centre = math.fsum(values) / len(values)
    return math.fsum((value - centre) ** 2 for value in values)


def scored_bytes(context: str, continuation: str) -> int:
    """Returns the UTF-8 bytes that a log-likelihood is about: white space that ends the context is scored as well."""
    return len(context[len(context.rstrip()) :].encode()) + len(continuation.encode())


def bits_per_byte(log_prob: float, num_bytes: int) -> float:
    """Returns what a text costs: -log2 of its probability, a byte."""
    return -log_prob / NATS_PER_BIT / num_bytes
