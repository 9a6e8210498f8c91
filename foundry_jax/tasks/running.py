"""The story of one task: what is not done yet is asked, scored and kept, some items at a time, and then summed up."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from foundry_jax.schema import require
from foundry_jax.tasks.base import Answer, Item, Request, Row, Task
from foundry_jax.tasks.requests import Continuation
from foundry_jax.tasks.results import Journal, Result
from foundry_jax.tasks.scoring import Scorer

FIRST_CHUNK = 32  # items
CHUNK_SECONDS = 30.0  # what a kill may cost; longer ones leave fewer rows of a batch idle at their ends
GROWTH = 4
LONGEST = 256  # requests of each kind


def run(
    task: Task,
    scorer: Scorer,
    folder: str | os.PathLike | None = None,
    *,
    limit: int | None = None,
    model: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Returns what a model's answers to a task's items come to.

    Items that the folder has already are not asked about again; how many are asked at once changes no number.

    Args:
        folder: where it is kept; None: nowhere, and all are asked at once.
        limit: most items; those of a smaller limit are among those of a larger one.
        model: what else decides the numbers, such as {"weights": a hash}; a folder begun with another is refused.
            "model", the name of the weights, may differ.
        facts: what result.json says besides.
        progress: called with (requests that are answered, requests in all).

    Raises:
        UserError: the task cannot be run here, the folder is in use or of another evaluation, or the model gives no
            numbers.
    """
    require(limit is None or limit >= 1, f"limit={limit} must be 1 or more.")
    task.prepare()
    ranked = task.ranked()[:limit]
    ranks = {item.id: rank for rank, item in enumerate(ranked)}
    items = [item for item in task.items() if item.id in ranks]
    settings = {"task": task.name, **(model or {}), **task.settings}
    with Journal(folder, settings) as journal:
        started, rows = time.perf_counter(), journal.rows_of(items)
        requests = {item.id: task.requests(item) for item in items}
        count = _Counter({name: len(of_item) for name, of_item in requests.items()}, rows, progress)
        if len(rows) < len(items):
            scorer.reserve(_longest([request for of_item in requests.values() for request in of_item]))
        left = [item for item in items if item.id not in rows]
        for chunk in _chunks(left) if folder is not None else [left]:
            new = _rows(task, scorer, chunk, ranks, count.add)
            journal.add(new)
            rows |= {row.id: row for row in new}
        found = [rows[item.id] for item in items]
        result = Result(task.name, task.dataset, task.summarise(found), found, settings)
        journal.finish({**result.to_json(), **(facts or {}), "seconds": time.perf_counter() - started})
    return result


def _longest(requests: Sequence[Request]) -> list[Request]:
    """Returns the requests among which is the one with the most tokens, most likely: to count those of all would take
    half a minute (3,610 questions with five examples; 2 busy cores, 2026-11)."""
    by_kind: dict[type, list[Request]] = {}
    for request in sorted(requests, key=lambda request: -len(request.context)):
        kept = by_kind.setdefault(type(request), [])
        if len(kept) < LONGEST:
            kept.append(request)
    return [request for kept in by_kind.values() for request in kept]


class _Counter:
    """Counts answered requests."""

    def __init__(self, sizes: Mapping[str, int], done: Iterable[str], progress: Callable[[int, int], None]):
        self._total, self._done = sum(sizes.values()), sum(sizes[name] for name in done)
        self._progress = progress
        self.add(0)

    def add(self, count: int = 1) -> None:
        self._done += count
        self._progress(self._done, self._total)


def _chunks(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Yields items in order, as many at once as were answered in CHUNK_SECONDS before."""
    size, start = FIRST_CHUNK, 0
    while start < len(items):
        began = time.perf_counter()
        yield items[start : start + size]
        start += size
        rate = CHUNK_SECONDS / max(time.perf_counter() - began, 1e-9)
        size = max(1, int(size * min(rate, GROWTH)))


def _rows(
    task: Task, scorer: Scorer, items: Sequence[Item], ranks: Mapping[str, int], progress: Callable[[int], None]
) -> list[Row]:
    requests, before = [task.requests(item) for item in items], scorer.truncated
    answers = _ask(scorer, requests, progress)
    is_any_cut = scorer.truncated > before  # mostly not, and then none has to be looked at
    cut = [sum(map(scorer.is_cut, of_item)) if is_any_cut else 0 for of_item in requests]
    found = zip(items, task.score_all(items, answers), cut, strict=True)
    return [Row.of(item, outcome, rank=ranks[item.id], truncated=count) for item, outcome, count in found]


def _ask(scorer: Scorer, requests: Sequence[Sequence[Request]], progress: Callable[[int], None]) -> list[list[Answer]]:
    """Returns the answers to the requests of each item.

    Raises:
        UserError: a log-probability is not finite.
    """
    flat = [request for of_item in requests for request in of_item]
    answers: dict[int, Answer] = {}
    for kind, ask in ((True, scorer.loglikelihood), (False, scorer.generate_until)):
        places = [i for i, request in enumerate(flat) if isinstance(request, Continuation) == kind]
        if places:
            answers |= zip(places, ask([flat[i] for i in places], progress), strict=True)
    for i, request in enumerate(flat):
        _require_finite(request, answers[i])
    ordered = iter(answers[i] for i in range(len(flat)))
    return [[next(ordered) for _ in of_item] for of_item in requests]


def _require_finite(request: Request, answer: Answer) -> None:
    if isinstance(request, Continuation):
        require(
            math.isfinite(answer.log_prob),
            f"The model gives {request.continuation[:40]!r} the log-probability {answer.log_prob}: its weights or its "
            f"dtype are broken, and no score would mean anything.",
        )
