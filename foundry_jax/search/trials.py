"""The runs of a sweep: what each is, which go together into a process, and what became of it."""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from foundry_jax.config import Config, to_flat_dict
from foundry_jax.runfolder import read_result
from foundry_jax.search import measuring
from foundry_jax.search.jobs import Job, Run, RunState

ENVIRONMENT = ("versions", "git_commit", "device", "num_devices", "num_processes", "sharding")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    key: its name in the ledger, and its folder: "runs/mla/seed-0".
    program: equal for runs that one executable can train.
    """

    key: str
    folder: pathlib.Path
    config: Config
    program: str


def with_rate(config: Config, rate: float) -> Config:
    """Returns the config with another peak learning rate; the minimum keeps its ratio to it."""
    o = config.optimizer
    least = o.min_learning_rate * rate / o.learning_rate if o.learning_rate else o.min_learning_rate
    return dataclasses.replace(config, optimizer=dataclasses.replace(o, learning_rate=rate, min_learning_rate=least))


def step_at(config: Config, share: float) -> int:
    """Returns the step at which a share of a run is over."""
    return max(1, round(share * config.num_steps))


def jobs_of(trials: Sequence[Trial], share: float, slots: int) -> list[Job]:
    """Returns what runs in one process each: the trials of a program, spread where there are fewer programs than slots.

    Their names say what is in them, so that a sweep that goes on finds what a job has left.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.program, []).append(trial)
    parts = max(1, slots // max(1, len(groups)))
    return [_job(group[part::parts], share) for group in groups.values() for part in range(min(parts, len(group)))]


def _job(trials: Sequence[Trial], share: float) -> Job:
    runs = []
    for trial in trials:
        until = None if share == 1.0 else step_at(trial.config, share)
        runs.append(Run(trial.folder, to_flat_dict(trial.config), until))
    digest = hashlib.sha256("\n".join(f"{run.folder} {run.until}" for run in runs).encode()).hexdigest()[:8]
    return Job(f"{trials[0].key.replace('/', '-')}-{digest}", tuple(runs), way="auto")


def outcome_of(trial: Trial, state: RunState) -> dict[str, Any]:
    """Returns what a run came to, for the ledger; `state` is what became of it."""
    result = read_result(trial.folder)
    reason = state.reason or "it ended without a result" if result is None else failed_tasks(result)
    if reason:
        return {"folder": trial.key, "status": "failed", "reason": reason, "metrics": {}, "seconds": 0.0}
    return {
        "folder": trial.key,
        "status": "done",
        "reason": None,
        "step": result["step"],
        "metrics": measuring.metrics_of(result),
        "seconds": math.fsum(result["seconds"].values()),
        "compile_seconds": result["seconds"]["compile"],
        "tokens": result["tokens"],
        "flops": result["tokens"] * result["train_flops_per_token"],
        "environment": {key: result[key] for key in ENVIRONMENT},
    }


def failed_tasks(result: Mapping[str, Any]) -> str | None:
    """Returns which tasks failed at the end of a run, and why; None if none did."""
    tasks = (result.get("tasks") or {}).items()
    return "; ".join(f"{label}: {task['error']}" for label, task in tasks if "error" in task) or None
