"""What a task came to, on disk, and the difference between two models on the same items.

    evals/x/mmlu/.lock         held by the process that evaluates there
    evals/x/mmlu/config.json   {"task": "mmlu", "shots": 5, "weights": "3c0f...", ...}: what decides the numbers
    evals/x/mmlu/items.jsonl   one line an item (see base.Row), added as items are done; where a killed run goes on
    evals/x/mmlu/result.json   written once, at the end

Two such folders are compared by

    difference, (low, high), n = paired_difference("evals/x/mmlu", "evals/y/mmlu")
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from scipy import special

from foundry_jax.errors import UserError
from foundry_jax.registry import lookup
from foundry_jax.runfolder import RunFolder, fsync, read_config, read_result
from foundry_jax.schema import require
from foundry_jax.tasks.base import Item, Metric, Row

ITEMS, RESULT = "items.jsonl", "result.json"
FREE = ("model",)  # keys of config.json that may change: what the weights are called


@dataclasses.dataclass(frozen=True)
class Result:
    """What a task came to.

    metrics: all scores, the first being the task's.
    rows: the items, those that counted.
    truncated: requests that were longer than the context and lost their beginning.
    settings: what decided the numbers.
    """

    task: str
    dataset: str
    metrics: Sequence[Metric]
    rows: Sequence[Row]
    settings: Mapping[str, Any]

    @property
    def n(self) -> int:
        """The number of items."""
        return len(self.rows)

    @property
    def truncated(self) -> int:
        """See above."""
        return sum(row.truncated for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Returns what result.json holds."""
        return {
            "task": self.task,
            "dataset": self.dataset,
            "n": self.n,
            "truncated": self.truncated,
            "metrics": metrics_json(self.metrics),
            "settings": dict(self.settings),
        }

    def to_row(self, label: str) -> dict[str, float]:
        """Returns the scores, but those of single subjects, as numbers for metrics.jsonl: "mmlu/accuracy", ..."""
        shown = [metric for metric in self.metrics if not metric.is_detail]
        values = {f"{label}/{metric.name}": metric.value for metric in shown}
        errors = {f"{label}/{metric.name}_stderr": metric.stderr for metric in shown}
        return {**values, **errors, f"{label}/n": self.n, f"{label}/truncated": self.truncated}


def metrics_json(metrics: Iterable[Metric]) -> dict[str, dict[str, Any]]:
    """Returns scores as result.json has them, by name."""

    def row(metric: Metric) -> dict[str, Any]:
        has_none = metric.stderr is None or math.isnan(metric.stderr)
        return {"value": metric.value, "stderr": None if has_none else metric.stderr, "n": metric.n}

    return {metric.name: row(metric) for metric in metrics}


class Journal:
    """The folder of one task of one model; nobody else may write to it until close(). Without one, nothing is kept."""

    def __init__(self, path: str | os.PathLike | None, settings: Mapping[str, Any]):
        """Creates the folder if need be, takes its lock, and reads the items that are done.

        Raises:
            UserError: another process holds it, it cannot be written to, it was begun with other settings, or a line is
                damaged that is not the last.
        """
        self._folder = None if path is None else RunFolder(path)
        self._rows: dict[str, Row] = {}
        if self._folder is None:
            return
        try:
            self._folder.write_config(settings, FREE)
            self._items = self._folder.path / ITEMS
            self._rows = {row.id: row for row in _whole_rows(self._items)}
            (self._folder.path / RESULT).unlink(missing_ok=True)  # a run that fails shall leave none
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the folder back."""
        if self._folder is not None:
            self._folder.close()

    def rows_of(self, items: Iterable[Item]) -> dict[str, Row]:
        """Returns the rows of those items that are done, by their ids.

        Raises:
            UserError: one had another prompt.
        """
        found = {item.id: self._rows[item.id] for item in items if item.id in self._rows}
        for item in items:
            if item.id in found and found[item.id].prompt_sha256 != item.prompt_sha256:
                raise UserError(f"{self._items} has item {item.id} with another prompt: use another --workdir.")
        return found

    def add(self, rows: Sequence[Row]) -> None:
        """Adds rows, so that they survive whatever comes.

        Raises:
            UserError: they cannot be written.
        """
        self._rows |= {row.id: row for row in rows}
        if self._folder is None:
            return
        lines = "".join(f"{json.dumps(dataclasses.asdict(row), allow_nan=False)}\n" for row in rows)
        try:
            with open(self._items, "ab") as file:
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"Cannot write to {self._items}: {error.strerror}; run it again once it can be.") from error

    def finish(self, values: Mapping[str, Any]) -> None:
        """Writes the result."""
        if self._folder is not None:
            self._folder.write_result(values)


def _whole_rows(path: pathlib.Path) -> list[Row]:
    """Returns the rows of a file, and cuts off what a process that was killed left of its last line.

    Raises:
        UserError: a line before the last is damaged.
    """
    if not path.exists():
        return []
    rows, end = _parse(path)
    if end < path.stat().st_size:
        os.truncate(path, end)
        fsync(path)
    return rows


def _parse(path: pathlib.Path) -> tuple[list[Row], int]:
    """Returns (rows, bytes of the lines they stand on); the last line may be incomplete and does not count then."""
    rows, end, lines = [], 0, path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is None and number < len(lines):
            raise UserError(f"{path}, line {number}, is damaged: delete that line, and its item is asked about again.")
        if row is not None:
            rows.append(row)
            end += len(line)
    return rows, end


def _row(line: bytes) -> Row | None:
    try:
        return Row(**json.loads(line)) if line.endswith(b"\n") else None
    except (ValueError, TypeError):
        return None


def save(result: Result, folder: str | os.PathLike, facts: Mapping[str, Any] | None = None) -> None:
    """Writes a result to a new folder; `facts` is what result.json says besides.

    Raises:
        UserError: it cannot be written.
    """
    with Journal(folder, result.settings) as journal:
        journal.add(result.rows)
        journal.finish({**result.to_json(), **(facts or {})})


def read(folder: str | os.PathLike) -> Result:
    """Returns the result of a task's folder.

    Raises:
        UserError: there is none, or it is not finished.
    """
    folder = pathlib.Path(folder).expanduser()
    values, settings = read_result(folder), read_config(folder)
    if values is None or settings is None or not (folder / ITEMS).exists():
        raise UserError(f"{folder} has no finished result: name the folder of one task, such as evals/NAME/mmlu.")
    rows = [row for row in _parse(folder / ITEMS)[0] if row.rank < values["n"]]
    metrics = [
        Metric(name, found["value"], math.nan if found["stderr"] is None else found["stderr"], found["n"])
        for name, found in values["metrics"].items()
    ]
    return Result(values["task"], values["dataset"], metrics, rows, settings)


class Difference(NamedTuple):
    """A mean difference a - b over n items that both models were asked about, and its confidence interval."""

    difference: float
    interval: tuple[float, float]
    n: int


def paired_difference(
    a: Result | str | os.PathLike, b: Result | str | os.PathLike, metric: str | None = None, *, confidence: float = 0.95
) -> Difference:
    """Returns by how much the metric of a is higher than that of b, item by item, with a t interval.

    What is hard for one model is mostly hard for the other, so it is much narrower than what two standard errors give.

    Args:
        a, b: results, or the folders of finished ones.
        metric: one of the items' metrics; None: the task's score.

    Raises:
        UserError: another task, other items, other prompts, no such metric, or fewer than two items.
    """
    a, b = (given if isinstance(given, Result) else read(given) for given in (a, b))
    require(0 < confidence < 1, f"confidence={confidence} must be between 0 and 1, such as 0.95.")
    pairs = _paired(a, b)
    metric = metric or a.metrics[0].name
    values = [[lookup(row.metrics, metric, "metric of items") for row in pair] for pair in pairs]
    differences = [x - y for x, y in values]
    n = len(differences)
    require(n >= 2, f"{n} items in common say nothing about the spread of a difference; take more.")
    centre = math.fsum(differences) / n
    spread = math.sqrt(math.fsum((x - centre) ** 2 for x in differences) / (n - 1) / n)
    half = float(special.stdtrit(n - 1, (1 + confidence) / 2)) * spread
    return Difference(centre, (centre - half, centre + half), n)


def _paired(a: Result, b: Result) -> list[tuple[Row, Row]]:
    require(a.task == b.task, f"One result is of {a.task}, the other of {b.task}: there is nothing to compare.")
    left, right = ({row.id: row for row in result.rows} for result in (a, b))
    if left.keys() != right.keys():
        only = [len(left.keys() - right.keys()), len(right.keys() - left.keys())]
        raise UserError(
            f"The results of {a.task} are of different items ({only[0]} only in the first, {only[1]} only in the "
            f"second, {len(left.keys() & right.keys())} in both): evaluate both with the same --limit and data."
        )
    pairs = [(left[name], right[name]) for name in left]
    for x, y in pairs:
        require(
            x.prompt_sha256 == y.prompt_sha256,
            f"Item {x.id} of {a.task} had different prompts: evaluate both with the same --shots and data.",
        )
    return pairs
