"""Trains the runs of a job: python -m foundry_jax.search.worker JOB_FOLDER

search/runner.py starts it. Exit code 0: every run is done, is paused where the job says, or has failed for a reason of
its own, which is in its folder; 1: a mistake in the job; 74: the machine refuses something; 75: stopped, and saved.
"""

import argparse
import contextlib
import fcntl
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from foundry_jax import command
from foundry_jax.errors import MachineError, Preempted, UserError

if TYPE_CHECKING:
    from foundry_jax.preemption import Preemption
    from foundry_jax.search.jobs import Job, Run

LOCK_SECONDS = 30.0  # a process that was killed may take this long to be gone


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the flags of a command line."""
    parser = command.Parser(
        prog="python -m foundry_jax.search.worker", description="Trains the runs of a job, for the runner of a sweep."
    )
    parser.add_argument("folder", type=pathlib.Path, metavar="JOB_FOLDER", help="with a job.json")
    return parser.parse_args(argv)


def main() -> None:
    """The command."""
    flags = parse_arguments(sys.argv[1:])
    if sys.platform != "linux":  # there the kernel does it
        threading.Thread(target=end_after, args=(os.getppid(),), daemon=True).start()
    # Imported here: --help must not wait for JAX.
    from foundry_jax import compilation
    from foundry_jax.preemption import Preemption
    from foundry_jax.search.jobs import EXIT_MACHINE, read_job

    try:
        with held(flags.folder), Preemption() as preemption:
            job = read_job(flags.folder)
            compilation.enable_cache()
            work(job, Status(flags.folder, job), preemption)
    except MachineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_MACHINE)


def end_after(parent: int) -> None:
    """Kills this process when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
    """Holds the job, once the process that did before is gone: it may have been killed just now.

    Raises:
        UserError: there is no such folder.
        MachineError: that process stays.
    """
    if not folder.is_dir():
        raise UserError(f"No job folder {folder}; it is search/runner.py that makes them.")
    with open(folder / ".lock", "w") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise MachineError(f"{folder} is in use by another process; wait for it, or stop it.") from None
                time.sleep(0.1)
        yield


class Status:
    """What status.json says of the job."""

    def __init__(self, folder: pathlib.Path, job: "Job"):
        self.path, self.job = folder / "status.json", job
        self.way = way_of(job, folder)
        self.step_seconds: dict[str, float] = {}  # by way
        self.run_seconds: dict[str, float] = {}  # of each run that was trained alone, all included

    def write(self, current: "Sequence[Run]") -> None:
        """Writes it anew; current are the runs that are worked on from now on."""
        from foundry_jax import compilation
        from foundry_jax.runfolder import write_json_atomic

        runs = {str(folder): {"status": x.status, "reason": x.reason} for folder, x in self.job.states().items()}
        steps = [compilation.compile_train_step, compilation.compile_population_step]
        built = {"train_steps": sum(step.cache_info().misses for step in steps)}
        facts = {"way": self.way, "current": [str(run.folder) for run in current], "runs": runs, "pid": os.getpid()}
        facts |= {
            "step_seconds": self.step_seconds,
            "run_seconds": self.run_seconds,
            "compilations": built | compilation.counts(),
        }
        write_json_atomic(self.path, facts, durable=False)


def work(job: "Job", status: Status, preemption: "Preemption") -> None:
    """Trains what there is to do of a job.

    Raises:
        Preempted: it was asked to stop; what was being trained has saved.
        MachineError: the machine refuses something; nothing is said of the run.
    """
    if status.way != "serial":
        train_together(remaining(job), status, preemption)
    for run in remaining(job):
        if preemption.requested(0):
            raise Preempted(f"job {job.name} has runs that have not begun; run it again to go on.")
        status.write([run])
        train_alone(run, status)
    status.write([])


def way_of(job: "Job", folder: pathlib.Path) -> str:
    """Returns the way of a job; "auto" is what was decided before this process, for the same bits, and on CPU "serial".

    There a step of three runs of configs/tiny.py in one program took twice as long as three steps (2 cores, 2026-11);
    see tests/bench/population_speed.py.
    """
    import jax

    from foundry_jax.search.jobs import read_status

    if job.way != "auto":
        return job.way
    return "serial" if jax.default_backend() == "cpu" else read_status(folder).get("way", "auto")


def remaining(job: "Job") -> "list[Run]":
    """Returns the runs that are not finished."""
    return [run for run in job.runs if not run.state().is_final]


def train_together(runs: "Sequence[Run]", status: Status, preemption: "Preemption") -> None:
    """Trains those of the runs that can be trained together."""
    from foundry_jax.search import population

    def ended(run: "Run", outcome: dict[str, Any] | UserError) -> None:
        if isinstance(outcome, UserError):
            note_failure(run, outcome)
        status.write(runs)

    def decided(report: population.Report) -> None:
        status.way = report.way
        status.write(runs)

    if len(runs) > 1:
        status.write(runs)
        ask = decided if status.way == "auto" else None
        status.step_seconds = population.train_together(runs, preemption, ended=ended, decided=ask).step_seconds


def train_alone(run: "Run", status: Status) -> None:
    """Trains one run; one that fails for a reason of its own has it in its folder."""
    from foundry_jax import config, train

    start = time.perf_counter()
    try:
        result = train.run(config.from_flat_dict(run.config), run.folder, until=run.until)
    except MachineError:
        raise
    except UserError as error:
        note_failure(run, error)
        return
    status.run_seconds[str(run.folder)] = time.perf_counter() - start
    if result["status"] == "done":
        seconds = result["seconds"]
        status.step_seconds.setdefault("serial", (seconds["step"] + seconds["data"]) / result["step"])


def note_failure(run: "Run", error: UserError) -> None:
    """Writes into a run's folder why it failed."""
    from foundry_jax import train
    from foundry_jax.search.jobs import write_failure

    print(f"{run.folder} failed: {error}", file=sys.stderr, flush=True)
    write_failure(run.folder, str(error), "diverged" if isinstance(error, train.DivergedError) else "refused")


if __name__ == "__main__":
    command.restart_with_huge_pages()
    command.run(main)
