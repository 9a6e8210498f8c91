"""What finished runs are worth in a metric, and how much better one run is than another, seed by seed and part by part.

    metric_of("bits_per_byte")                               # on the whole validation text; lower is better
    metric_of("mmlu"), metric_of("mmlu/gold_share")          # of a task of eval.tasks; higher is better
    evidence({0: "runs/x/seed-0", ...}, {0: "runs/mla/seed-0", ...}, metric)

Runs are compared on the same validation text, or on the same items with the same prompts, or not at all.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from foundry_jax.errors import UserError
from foundry_jax.registry import unknown
from foundry_jax.runfolder import read_result, read_validation_blocks
from foundry_jax.schema import require
from foundry_jax.search.verdict import Evidence

if TYPE_CHECKING:
    from foundry_jax.tasks.base import Metric as Score
    from foundry_jax.tasks.results import Result

Folder = str | os.PathLike

# Neighbouring sequences are of the same document, and what helps one helps the next: differences correlate by 0.35
# (3,200 runs of configs/smoke.py, 2026-11). As independent units they would make the interval too narrow, so many of
# them are one. Groups still correlate where documents are longer, so the text is the second witness, not the first.
MOST_GROUPS = 30


@dataclasses.dataclass(frozen=True)
class Metric:
    """What runs are compared in.

    name: as the user writes it.
    unit: of its values, for people.
    default_min_effect: the smallest difference worth having, in that unit.
    task: the label of a task in eval.tasks; "" for one of the validation text.
    score: of the task; "" for its first one.
    """

    name: str
    unit: str
    higher_is_better: bool
    default_min_effect: float
    task: str = ""
    score: str = ""

    @property
    def sign(self) -> int:
        """1 or -1: what a difference is multiplied by, so that more is better."""
        return 1 if self.higher_is_better else -1

    def to_json(self) -> dict[str, Any]:
        """Returns what the result of a sweep says of it."""
        return {"name": self.name, "unit": self.unit, "higher_is_better": self.higher_is_better}


# Of the validation text. Lower is better in all of them.
VALIDATION = {
    "bits_per_byte": Metric("bits_per_byte", "bits per byte", False, 0.005),
    "loss": Metric("loss", "nats per token", False, 0.005),
    "ema_bits_per_byte": Metric("ema_bits_per_byte", "bits per byte", False, 0.005),
    "ema_loss": Metric("ema_loss", "nats per token", False, 0.005),
}

# Scores of tasks that are no shares of the items: (unit, whether more is better, the smallest difference worth having).
SCORES = {"bits_per_byte": ("bits per byte", False, 0.005), "margin": ("nats", True, 0.1)}
MIN_SHARE = 0.01  # a point, as people say

EMA_SUFFIX = "_ema"  # of a label in eval.tasks that asks the averaged weights


def metric_of(name: str) -> Metric:
    """Returns the metric of a name: one of VALIDATION, TASK or TASK/SCORE.

    Raises:
        UserError: there is no such metric or task.
    """
    if name in VALIDATION:
        return VALIDATION[name]
    task, _, score = name.partition("/")
    tasks = _task_names()
    is_task = task.removesuffix(EMA_SUFFIX) in tasks
    if not is_task or name.endswith("/"):
        wrong = unknown(name if is_task else task, [*VALIDATION, *tasks], "metric")
        raise UserError(f"{wrong} Or TASK/SCORE, such as mmlu/gold_share.")
    unit, higher_is_better, min_effect = SCORES.get(score, (score or "score", True, MIN_SHARE))
    return Metric(name, unit, higher_is_better, min_effect, task, score)


def _task_names() -> Sequence[str]:
    from foundry_jax.tasks import TASKS  # imports JAX, which metrics of the validation text do without

    return list(TASKS)


def metrics_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Returns the values of a run's result.json by the names of their metrics, but those of parts of the items."""
    values = {name: value for name, value in result["validation"].items() if name in VALIDATION}
    for task, found in (result.get("tasks") or {}).items():
        scores = found.get("metrics", {}) if found else {}  # a task that failed has an error instead
        values |= {f"{task}/{name}": score["value"] for name, score in scores.items() if "/" not in name}
    return values


def full_name(metric: Metric, names: Iterable[str]) -> str:
    """Returns what a metric is called among the names of metrics_of: "mmlu/accuracy" for "mmlu", its first score."""
    if not metric.task or metric.score:
        return metric.name
    return next((name for name in names if name.startswith(f"{metric.task}/")), metric.name)


@dataclasses.dataclass(frozen=True, eq=False)
class Measurement:
    """What one run is worth.

    hash: of what was measured on: two runs with the same one can be compared.
    units: what each sequence of the text, or each item, contributes, [n]; they add up to the value. None if not known.
    ends: how many tokens, or items, there are up to the end of each unit, [n]; None if not known.
    """

    value: float
    hash: str
    units: np.ndarray | None
    ends: np.ndarray | None


def measure(folder: Folder, metric: Metric) -> Measurement:
    """Returns what a finished run is worth.

    Raises:
        UserError: it is not finished, has no such metric, or its value is not finite.
    """
    result = read_result(folder)
    require(result is not None, f"{folder} has no result: it is no run, or not finished; train it to the end.")
    found = _of_task(folder, result, metric) if metric.task else _of_validation(folder, result, metric)
    require(math.isfinite(found.value), f"{folder} has {metric.name}={found.value}: a run that failed has no value.")
    return found


def _of_validation(folder: Folder, result: Mapping[str, Any], metric: Metric) -> Measurement:
    values = result["validation"]
    if metric.name not in values:
        raise UserError(
            f"{folder} has no {metric.name}: the size in bytes of its validation text is not known. Use --metric "
            f"{metric.name.replace('bits_per_byte', 'loss')}, or give data.tokenizer."
        )
    blocks = read_validation_blocks(folder)
    if blocks is None:
        return Measurement(values[metric.name], result["validation_hash"], None, None)
    nats, targets = np.array(blocks["nats"], float), np.array(blocks["targets"], float)
    total = targets.sum() if metric.name.endswith("loss") else blocks["bytes"] * math.log(2)
    units = None if metric.name.startswith("ema_") else nats / total  # the sequences are those of the raw weights
    return Measurement(values[metric.name], result["validation_hash"], units, np.cumsum(targets))


def _of_task(folder: Folder, result: Mapping[str, Any], metric: Metric) -> Measurement:
    from foundry_jax.tasks import results  # as in _task_names

    where = pathlib.Path(folder) / "evals" / f"step-{result['step']}" / metric.task
    if not where.is_dir():
        reason = ((result.get("tasks") or {}).get(metric.task) or {}).get("error", "eval.tasks does not name it")
        raise UserError(f"{folder} has no result of {metric.task}: {reason}.")
    found = results.read(where)
    score, rows = _score(found, metric), sorted(found.rows, key=lambda row: row.id)
    of_items = all(score.name in row.metrics for row in rows)  # and not of some of them, such as one subject
    units = np.array([row.metrics[score.name] for row in rows]) / len(rows) if of_items else None
    same = _sha256([[row.id, row.prompt_sha256] for row in rows])
    return Measurement(score.value, same, units, np.arange(1.0, len(rows) + 1))


def _score(result: "Result", metric: Metric) -> "Score":
    scores = {score.name: score for score in result.metrics}
    name = metric.score or result.metrics[0].name
    if name not in scores:
        raise UserError(unknown(name, scores, f"score of {metric.task}"))
    return scores[name]


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def evidence(incumbent: Mapping[int, Folder], contestant: Mapping[int, Folder], metric: Metric) -> Evidence:
    """Returns by how much a contestant's runs are better, from the seeds that both have.

    Args:
        incumbent, contestant: finished runs by their seeds.

    Raises:
        UserError: there is no seed that both have, or the runs were not measured on the same.
    """
    seeds = sorted(incumbent.keys() & contestant.keys())
    require(
        bool(seeds),
        f"There is no seed of which both have a finished run: {_listed(incumbent)} and {_listed(contestant)}.",
    )
    folders = [runs[seed] for runs in (incumbent, contestant) for seed in seeds]
    found = [measure(folder, metric) for folder in folders]
    _require_same(folders, found, metric)
    before, after = found[: len(seeds)], found[len(seeds) :]
    units = _units(before, after)
    if units is not None and not metric.task:
        units = _grouped(units)
    effects = [metric.sign * (b.value - a.value) for a, b in zip(before, after, strict=True)]
    return Evidence(
        seeds=dict(zip(seeds, effects, strict=True)),
        units=None if units is None else metric.sign * units * len(units),
        unit=metric.unit,
        parts="items" if metric.task else "groups of validation text",
        are_scores=bool(metric.task),
    )


def _listed(runs: Mapping[int, Folder]) -> str:
    return f"seeds {', '.join(map(str, sorted(runs)))}" if runs else "none"


def _require_same(folders: Sequence[Folder], found: Sequence[Measurement], metric: Metric) -> None:
    """Raises UserError unless all runs were measured on the same text, or the same items."""
    first, reference = folders[0], found[0]
    what = f"items or prompts of {metric.task}" if metric.task else "validation text"
    cure = "the same limit, shots and data in eval.tasks" if metric.task else "the same data settings"
    for folder, one in zip(folders, found, strict=True):
        require(
            one.hash == reference.hash,
            f"{first} and {folder} were measured on different {what} ({reference.hash[:12]} and {one.hash[:12]}), so "
            f"their difference says nothing: train both with {cure}.",
        )
        require(
            not metric.name.endswith("loss") or _is_same_length(one.ends, reference.ends),
            f"{first} and {folder} cut the text into different tokens, so a difference in nats per token says nothing: "
            f"use --metric bits_per_byte.",
        )


def _is_same_length(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is None or b is None or a[-1] == b[-1]


def _units(before: Sequence[Measurement], after: Sequence[Measurement]) -> np.ndarray | None:
    """Returns by how much more each part contributes after than before, [n], averaged over the pairs.

    A part ends where a unit of each run ends: runs with another context length cut the text into other sequences.
    None if units are not known, or the text has other tokens.
    """
    found = [*before, *after]
    if any(one.units is None or not _is_same_length(one.ends, found[0].ends) for one in found):
        return None
    shared = functools.reduce(np.intersect1d, [one.ends for one in found])
    sums = [np.diff(np.cumsum(one.units)[np.searchsorted(one.ends, shared)], prepend=0) for one in found]
    return np.mean(sums[len(before) :], axis=0) - np.mean(sums[: len(before)], axis=0)


def _grouped(units: np.ndarray) -> np.ndarray:
    """Returns sums over neighbours, at most MOST_GROUPS of them, all over equally many but the last."""
    size = math.ceil(len(units) / MOST_GROUPS)
    return np.add.reduceat(units, np.arange(0, len(units), size))
