"""A finished sweep, read from its folder for the report: what result.json says, and the curves of its runs."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from foundry_jax.errors import UserError
from foundry_jax.runfolder import read_config, read_metrics, read_result
from foundry_jax.schema import require
from foundry_jax.search.verdict import Verdict

FORMAT = 1
TRAINED = ("incumbent", "trained")  # statuses of contestants whose numbers count
CURVES = ("bits_per_byte", "loss")  # what every run measures on the way; the first one that is there is shown


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """A metric on the way: the steps at which a run measured it, and the values."""

    steps: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One seed of a contestant; reason says why it has no metrics, if it has none."""

    seed: int
    folder: pathlib.Path
    status: str
    reason: str | None
    metrics: Mapping[str, float]
    seconds: float | None
    tokens: int | None
    step: int | None

    @functools.cached_property
    def curves(self) -> dict[str, Curve]:
        """What the run measured on the way, by metric; {} if its folder is gone."""
        return read_curves(self.folder / "metrics.jsonl")

    @functools.cached_property
    def config(self) -> dict[str, Any] | None:
        """The flat config that it ran with; None if its folder is gone."""
        return read_config(self.folder)


@dataclasses.dataclass(frozen=True)
class Check:
    """What the gate found of one property of a contestant."""

    name: str
    passed: bool
    evidence: str
    seconds: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Contestant:
    """One contestant. index: its place in the sweep, the incumbent's being 0; colours go by it."""

    name: str
    index: int
    argument: str
    status: str
    reason: str | None
    changes: Mapping[str, Sequence[Any]]
    forecast: Mapping[str, float]
    gate: Sequence[Check]
    learning_rate: float | None
    rates: Mapping[float, float]
    ratios: Mapping[str, float]
    runs: Sequence[Run]
    mean: Mapping[str, float]
    verdict: Verdict | None
    others: Mapping[str, Verdict]

    @property
    def has_counted(self) -> bool:
        """Whether its numbers may be compared: it was trained to the end."""
        return self.status in TRAINED

    @property
    def done(self) -> list[Run]:
        """The runs that finished."""
        return [run for run in self.runs if run.status == "done"]

    @property
    def seconds(self) -> float | None:
        """The mean of what its finished runs took; None if there is none."""
        measured = [run.seconds for run in self.done if run.seconds is not None]
        return float(np.mean(measured)) if measured else None


@dataclasses.dataclass(frozen=True)
class Metric:
    """What the sweep decided on."""

    name: str
    unit: str
    higher_is_better: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep. facts: all of result.json, for what is shown as it is."""

    folder: pathlib.Path
    name: str
    command: str
    config: str
    overrides: Sequence[str]
    metric: Metric
    alpha: float
    min_effect: float
    seeds: Sequence[int]
    contestants: Sequence[Contestant]
    promoted: str | None
    best: str | None
    why: str
    facts: Mapping[str, Any]

    @property
    def incumbent(self) -> Contestant:
        """The contestant that all others are compared with."""
        return self.contestants[0]

    @functools.cached_property
    def metric_key(self) -> str:
        """What the metric is called in the runs: a task's name stands for the first of its metrics."""
        names = [name for one in self.contestants for name in one.mean]
        longer = [name for name in names if name.startswith(f"{self.metric.name}/")]
        return self.metric.name if self.metric.name in names or not longer else longer[0]

    def seconds_ratio(self, contestant: Contestant) -> float | None:
        """Returns a contestant's seconds over the incumbent's, measured or else forecast; None if neither."""
        if contestant.seconds and self.incumbent.seconds:
            return contestant.seconds / self.incumbent.seconds
        return contestant.ratios.get("seconds")

    @functools.cached_property
    def ranking(self) -> list[Contestant]:
        """All contestants, the best mean first, those without one that counts at the end in their order."""
        name, sign = self.metric_key, -1 if self.metric.higher_is_better else 1
        counted = [one for one in self.contestants if one.has_counted and name in one.mean]
        rest = [one for one in self.contestants if one not in counted]
        return sorted(counted, key=lambda one: sign * one.mean[name]) + rest

    @functools.cached_property
    def shown_curve(self) -> Metric | None:
        """The metric whose curves can be shown: the sweep's own where it was measured on the way."""
        names = {name for one in self.contestants for run in one.runs for name in run.curves}
        if self.metric_key in names:
            return dataclasses.replace(self.metric, name=self.metric_key)
        units = {"bits_per_byte": "bits per byte", "loss": "nats per token"}
        found = [name for name in CURVES if name in names]
        return Metric(found[0], units[found[0]], higher_is_better=False) if found else None


def read(folder: str | pathlib.Path) -> Sweep:
    """Returns the sweep of a folder.

    Raises:
        UserError: there is no finished sweep, or it is damaged or of another version.
    """
    folder = pathlib.Path(folder)
    require(folder.is_dir(), f"No sweep folder {str(folder)!r}; name one that foundry_jax.cli.sweep made.")
    facts = read_result(folder)
    require(facts is not None, f"{folder} holds no finished sweep; run the sweep's command again, and it goes on.")
    require(
        isinstance(facts, dict) and "contestants" in facts,
        f"{folder}/result.json is not a sweep's; name a sweep's folder, not that of one run.",
    )
    found = facts.get("format")
    require(
        found == FORMAT, f"{folder}/result.json has format {found}, this version reads {FORMAT}; run the sweep again."
    )
    try:
        return _sweep(folder, facts)
    except KeyError as error:
        raise UserError(f"{folder}/result.json lacks {error}; restore it, or run the sweep again.") from None


def _sweep(folder: pathlib.Path, facts: Mapping[str, Any]) -> Sweep:
    incumbent = facts["incumbent"]
    names = [incumbent, *(name for name in facts["contestants"] if name != incumbent)]
    return Sweep(
        folder=folder,
        name=facts["name"],
        command=facts["command"],
        config=facts["config"],
        overrides=facts["overrides"],
        metric=Metric(**facts["metric"]),
        alpha=facts["alpha"],
        min_effect=facts["min_effect"],
        seeds=facts["seeds"],
        contestants=[_contestant(folder, i, name, facts["contestants"][name]) for i, name in enumerate(names)],
        promoted=facts["decision"]["promoted"],
        best=facts["decision"]["best"],
        why=facts["decision"]["why"],
        facts=facts,
    )


def _contestant(folder: pathlib.Path, index: int, name: str, facts: Mapping[str, Any]) -> Contestant:
    """Returns one contestant; what one that was never trained does not have is empty."""
    verdict = facts.get("verdict")
    return Contestant(
        name=name,
        index=index,
        argument=facts["argument"],
        status=facts["status"],
        reason=facts.get("reason"),
        changes=facts.get("changes") or {},
        forecast=facts.get("forecast") or {},
        gate=[Check(**check) for check in facts.get("gate") or ()],
        learning_rate=facts.get("learning_rate"),
        rates={float(rate): loss for rate, loss in (facts.get("rates") or {}).items()},
        ratios=facts.get("ratios") or {},
        runs=[_run(folder, run) for run in facts.get("runs") or ()],
        mean=facts.get("mean") or {},
        verdict=Verdict.from_json(verdict) if verdict else None,
        others={metric: Verdict.from_json(one) for metric, one in (facts.get("others") or {}).items() if one},
    )


def _run(folder: pathlib.Path, facts: Mapping[str, Any]) -> Run:
    optional = {name: facts.get(name) for name in ("reason", "seconds", "tokens", "step")}
    metrics = facts.get("metrics") or {}
    return Run(facts["seed"], folder / facts["folder"], facts["status"], metrics=metrics, **optional)


def read_curves(path: pathlib.Path) -> dict[str, Curve]:
    """Returns {metric: its curve} of the eval and task rows of a metrics.jsonl; {} if it is gone.

    Raises:
        UserError: a line before the last is not JSON.
    """
    points: dict[str, dict[int, float]] = {}
    for row in read_metrics(path) if path.exists() else []:
        if row["kind"] in ("eval", "task"):
            for name in row.keys() - {"kind", "step"}:
                points.setdefault(name, {})[row["step"]] = row[name]
    return {name: Curve(*map(np.array, zip(*sorted(found.items()), strict=True))) for name, found in points.items()}
