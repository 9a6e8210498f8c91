"""One run against another, or all seeds of one against all seeds of another: the verdict of a sweep, without a sweep.

compare("runs/x", "runs/y")                              # two runs: one seed, so nothing is decided
compare("sweep/runs/incumbent", "sweep/runs/mla")        # two folders of runs, one a seed
compare("runs/sweeps/a:mla", "runs/sweeps/b:mla")        # contestants of finished sweeps
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from foundry_jax.errors import UserError
from foundry_jax.registry import lookup
from foundry_jax.runfolder import read_config, read_result
from foundry_jax.schema import require
from foundry_jax.search.measuring import Metric, evidence, measure, metric_of
from foundry_jax.search.verdict import Look, Verdict, judge

# Keys that say what a run is called and how it is carried out, not what is compared.
INCIDENTAL = ("name", "data.cache_dir", "eval.tasks", "log.", "checkpoint.", "sharding.")


@dataclasses.dataclass(frozen=True)
class Side:
    """The finished runs of one side, by seed; label is what the user called it."""

    label: str
    runs: Mapping[int, pathlib.Path]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What B is worth against A.

    values: of A and of B by seed, those that both have.
    changes: {dotted key: (of A, of B)}.
    """

    a: Side
    b: Side
    metric: Metric
    alpha: float
    min_effect: float
    values: Mapping[int, tuple[float, float]]
    changes: Mapping[str, tuple[Any, Any]]
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """Returns what --json prints."""
        return {
            "a": self.a.label,
            "b": self.b.label,
            "metric": self.metric.to_json(),
            "alpha": self.alpha,
            "min_effect": self.min_effect,
            "values": {str(seed): list(values) for seed, values in self.values.items()},
            "changes": {key: list(values) for key, values in self.changes.items()},
            "verdict": self.verdict.to_json(),
        }


def compare(
    a: str, b: str, *, metric: str = "bits_per_byte", alpha: float = 0.05, min_effect: float | None = None
) -> Comparison:
    """Returns whether B is better than A, from the seeds of which both have a finished run.

    Two single runs are compared whatever their seeds are.

    Args:
        a, b: a run folder, a folder of them, or SWEEP:CONTESTANT.
        min_effect: in the metric's unit; None: what the metric has by default.

    Raises:
        UserError: there are no such runs, no seed that both have, or they were not measured on the same.
    """
    chosen = metric_of(metric)
    min_effect = chosen.default_min_effect if min_effect is None else min_effect
    first, second = (side_of(text) for text in (a, b))
    before, after = first.runs, second.runs
    if len(before) == len(after) == 1:
        after = dict(zip(before, after.values(), strict=True))
    same = {path.resolve() for path in before.values()} & {path.resolve() for path in after.values()}
    require(not same, f"{a} and {b} have a run in common, {next(iter(same), '')}: name two different ones.")
    found = evidence(before, after, chosen)
    n, seeds = len(found.seeds), list(found.seeds)
    verdict = judge({b: found}, alpha=alpha, min_effect=min_effect, look=Look(n, n, n))[b]
    values = {seed: tuple(measure(side[seed], chosen).value for side in (before, after)) for seed in seeds}
    changes = changes_of(before[seeds[0]], after[seeds[0]])
    return Comparison(first, second, chosen, alpha, min_effect, values, changes, verdict)


def side_of(text: str) -> Side:
    """Returns the finished runs that a user names: a run folder, a folder of them, or SWEEP:CONTESTANT.

    Raises:
        UserError: there are none.
    """
    path = pathlib.Path(text).expanduser()
    if path.is_dir():
        return Side(text, _runs_in(path))
    sweep, colon, name = text.rpartition(":")
    require(
        bool(colon) and pathlib.Path(sweep).expanduser().is_dir(),
        f"There is no {text}: name a run folder, a folder of runs seed-0, seed-1, ..., or SWEEP:CONTESTANT.",
    )
    return Side(text, _runs_of_contestant(pathlib.Path(sweep).expanduser(), name))


def _runs_in(folder: pathlib.Path) -> dict[int, pathlib.Path]:
    """Returns the finished runs of a folder, which may be one itself."""
    folders = [folder] if read_config(folder) else sorted(path.parent for path in folder.glob("*/config.json"))
    require(bool(folders), f"{folder} is no run and holds none: a run has config.json.")
    finished = [path for path in folders if read_result(path) is not None]
    require(bool(finished), f"No run in {folder} is finished: train to the end first.")
    runs: dict[int, pathlib.Path] = {}
    for path in finished:
        seed = read_config(path)["seed"]
        if seed in runs:
            raise UserError(f"{runs[seed]} and {path} both have seed {seed}: keep one run a seed in {folder}.")
        runs[seed] = path
    return runs


def _runs_of_contestant(sweep: pathlib.Path, name: str) -> dict[int, pathlib.Path]:
    result = read_result(sweep)
    if result is None or "contestants" not in result:
        raise UserError(f"{sweep} is no finished sweep: run it to the end, or name a folder of runs in it.")
    contestant = lookup(result["contestants"], name, f"contestant of {sweep}")
    runs = {run["seed"]: sweep / run["folder"] for run in contestant["runs"] if run["status"] == "done"}
    reason = contestant["reason"] or "none of its runs is finished"
    require(bool(runs), f"{sweep}:{name} was {contestant['status']}: {reason}.")
    return runs


def changes_of(a: pathlib.Path, b: pathlib.Path) -> dict[str, tuple[Any, Any]]:
    """Returns the keys in which two runs differ, but those that do not change what is computed."""
    before, after = read_config(a) or {}, read_config(b) or {}
    keys = [key for key in dict.fromkeys([*before, *after]) if not _is_incidental(key)]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _is_incidental(key: str) -> bool:
    return any(key.startswith(entry) if entry.endswith(".") else key == entry for entry in INCIDENTAL)
