"""A job: runs that one process trains, and what has become of them. Imports no JAX.

    jobs/lr/job.json       {"name": "lr", "way": "auto", "runs": [{"folder": "/a/runs/lr=1/seed-0", "config": {...},
                            "until": null}, ...]}
    jobs/lr/status.json    {"way": "serial", "current": ["/a/runs/lr=1/seed-0"], "runs": {"/a/...": {"status": ...}},
                            "step_seconds": {"serial": 0.21}, "run_seconds": {"/a/...": 66.1}, "pid": 4711,
                            "compilations": {"train_steps": 1, ...}}: what its process says of itself
    jobs/lr/log.txt        what its process has printed
    RUN/failure.json       {"reason": "5 steps in a row ...", "kind": "diverged"}: this run is not tried again

What has become of a run is read from its own folder, so it does not matter how often, by whom and in which job it was
trained.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from foundry_jax.errors import UserError
from foundry_jax.registry import lookup
from foundry_jax.runfolder import read_heartbeat, write_json_atomic
from foundry_jax.schema import require

EXIT_MACHINE = 74  # EX_IOERR: the machine refuses something; see errors.MachineError

WAYS = {
    "serial": "one run after the other, all with the same executables",
    "vmap": "all runs in one program, a step of each at a time",
    "auto": "what takes less time on this machine, measured on the first steps; serial on CPU",
}
FAILURES = {
    "diverged": "its steps did not stay finite",
    "refused": "its config does not fit together, or not its data",
}
FINAL = ("result.json", "failure.json")  # a run that has one of them is not trained again


@dataclasses.dataclass(frozen=True)
class RunState:
    """What has become of a run: done, paused (it is where its job wants it), failed (never tried again), unfinished.

    reason, kind: of a failed one; see FAILURES. Of an unfinished one the reason may be known, too.
    """

    status: str
    reason: str | None = None
    kind: str | None = None

    @property
    def is_final(self) -> bool:
        """Whether there is nothing left to do."""
        return self.status != "unfinished"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of a job.

    folder: an absolute path. config: {dotted key: value}, all of them. until: the step to pause after; None: its last.
    """

    folder: pathlib.Path
    config: Mapping[str, Any]
    until: int | None = None

    def __post_init__(self):
        require(self.folder.is_absolute(), f"Run folder {self.folder} of a job must be an absolute path.")

    @property
    def last_step(self) -> int:
        """The step after which there is nothing to do."""
        steps = self.config["num_steps"]
        return steps if self.until is None else min(self.until, steps)

    def state(self) -> RunState:
        """Returns what has become of it, as its folder says.

        Raises:
            UserError: a file there is damaged.
        """
        if (self.folder / "result.json").exists():
            return RunState("done")
        if (failure := read_failure(self.folder)) is not None:
            return RunState("failed", failure["reason"], failure["kind"])
        if self.last_step < self.config["num_steps"] and _is_paused(self.folder, self.last_step):
            return RunState("paused")
        return RunState("unfinished")

    def step(self) -> int:
        """Returns how far it was when it last gave a sign of life; its last step if it is finished."""
        if (self.folder / "result.json").exists():
            return self.config["num_steps"]
        beat = self.heartbeat()
        return beat["step"] if beat else 0

    def heartbeat(self) -> dict[str, Any] | None:
        """Returns its last sign of life, None without one: a power cut may damage it, and it is not missed."""
        try:
            return read_heartbeat(self.folder)
        except UserError:
            return None


@dataclasses.dataclass(frozen=True)
class Job:
    """Runs that one process trains. The name is that of its folder; the way is one of WAYS."""

    name: str
    runs: tuple[Run, ...]
    way: str = "serial"

    def __post_init__(self):
        lookup(WAYS, self.way, "way to train several runs")
        folders = [run.folder for run in self.runs]
        require(len(folders) == len(set(folders)), f"Job {self.name} has two runs in one folder; give each its own.")

    def states(self) -> dict[pathlib.Path, RunState]:
        """Returns {folder: what has become of the run}."""
        return {run.folder: run.state() for run in self.runs}

    def write(self, folder: pathlib.Path) -> None:
        """Puts job.json into the job's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        runs = [dataclasses.asdict(run) | {"folder": str(run.folder)} for run in self.runs]
        write_json_atomic(folder / "job.json", {"name": self.name, "way": self.way, "runs": runs})


def read_job(folder: pathlib.Path) -> Job:
    """Returns the job of a folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        values = json.loads((folder / "job.json").read_text("utf-8"))
        runs = [Run(pathlib.Path(run["folder"]), run["config"], run["until"]) for run in values["runs"]]
        return Job(values["name"], tuple(runs), values["way"])
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no job.json that can be read ({error}); run the sweep again.") from error


def read_status(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what a job's process last said of itself; {} if that is nothing, or a power cut has damaged it."""
    try:
        return json.loads((folder / "status.json").read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def write_failure(folder: pathlib.Path, reason: str, kind: str) -> None:
    """Notes in a run's folder that it failed, why, and which kind of FAILURES it is."""
    lookup(FAILURES, kind, "kind of failure")
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / "failure.json", {"reason": reason, "kind": kind})


def read_failure(folder: pathlib.Path) -> dict[str, str] | None:
    """Returns {"reason", "kind"} of a run that failed for good, else None."""
    path = folder / "failure.json"
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it to try the run again.") from error


def _is_paused(folder: pathlib.Path, until: int) -> bool:
    """Returns whether a run was saved at a step or later, and evaluated if it is that step.

    A run that is asked to stop while it is evaluated is saved without the evaluation.
    """
    newest = max(_sealed_steps(folder / "checkpoints"), default=-1)
    return newest > until or (newest == until and until in _evaluated_steps(folder / "metrics.jsonl"))


def _sealed_steps(checkpoints: pathlib.Path) -> list[int]:
    return [int(seal.parent.name) for seal in checkpoints.glob("*/SEAL.json") if seal.parent.name.isdigit()]


def _evaluated_steps(metrics: pathlib.Path) -> Iterator[int]:
    if not metrics.exists():
        return
    for line in metrics.read_bytes().splitlines():
        if b'"eval"' in line:
            with contextlib.suppress(ValueError):  # the last line may be torn
                yield json.loads(line)["step"]
