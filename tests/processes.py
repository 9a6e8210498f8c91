"""Real processes for end-to-end tests: start a run, stop it at a chosen moment, compare run folders bit for bit.

As a module it is the child of such tests: foundry_jax.main with a hook, so that the library needs none.

    python -m tests.processes --pause=eval:3 --config=...     # stays in its 4th evaluation batch until a signal comes
    python -m tests.processes --poison=12:17 --config=...     # batches 12 to 16 of the data have weights of NaN
"""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from foundry_jax import checkpoint, command, compilation, data, main
from foundry_jax.preemption import Preemption
from foundry_jax.runfolder import read_metrics

ROOT = pathlib.Path(__file__).parents[1]
SMOKE = ROOT / "configs" / "smoke.py"
# 11 kB instead of the standard library's 11 MB: an evaluation is one batch.
SMALL_TEXT = ("data.source=text", f"data.path={ROOT / 'LICENSE'}", "data.validation=tail(0.1)")
TIMEOUT = 300  # seconds; a child takes 5 to 10 on a busy machine


@dataclasses.dataclass(frozen=True)
class Child:
    """A training process and its run folder; its output goes to files beside the folder."""

    process: subprocess.Popen
    workdir: pathlib.Path

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def checkpoints(self) -> pathlib.Path:
        """The folder of its checkpoints."""
        return self.workdir / "checkpoints"

    @property
    def stderr(self) -> str:
        """All it has printed to stderr so far."""
        return _output(self.workdir, "stderr").read_text()

    @property
    def stdout(self) -> str:
        """All it has printed to stdout so far."""
        return _output(self.workdir, "stdout").read_text()

    def steps(self) -> list[int]:
        """Returns the steps it has logged since it was started."""
        return [int(step) for step in re.findall(r"^step (\d+)/", self.stderr, re.MULTILINE)]

    def wait_until(self, condition: Callable[[], bool], poll_seconds: float = 0.001) -> bool:
        """Waits until the condition holds; returns False if the process ended first."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"still waiting after {TIMEOUT} s:\n{self.stderr}")
            time.sleep(poll_seconds)
        return True

    def wait(self) -> int:
        """Returns the exit code."""
        return self.process.wait(TIMEOUT)

    def signal_in_phase(self, number: int) -> int:
        """Waits until a process started with pause= is in its phase, sends it the signal, returns the exit code."""
        assert self.wait_until(lambda: "phase reached" in self.stderr), self.stderr
        self.process.send_signal(number)
        return self.wait()


def start(
    workdir: pathlib.Path,
    overrides: Sequence[str] = SMALL_TEXT,
    *,
    config: str | os.PathLike = SMOKE,
    pause: str = "",
    poison: str = "",
    environment: dict[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Child:
    """Starts a run with dotted overrides; `prefix` is a command that runs it, such as unshare."""
    hooks = [*([f"--pause={pause}"] if pause else []), *([f"--poison={poison}"] if poison else [])]
    arguments = [f"--config={config}", f"--workdir={workdir}", *(f"--config.{text}" for text in overrides)]
    module = "tests.processes" if hooks else "foundry_jax.main"
    with open(_output(workdir, "stdout"), "w") as stdout, open(_output(workdir, "stderr"), "w") as stderr:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", module, *hooks, *arguments],
            cwd=ROOT, env={**os.environ, **(environment or {})}, stdout=stdout, stderr=stderr)  # fmt: skip
    return Child(process, workdir)


def finish(workdir: pathlib.Path, overrides: Sequence[str] = SMALL_TEXT, **options) -> Child:
    """Returns a run that has ended with exit code 0."""
    with start(workdir, overrides, **options) as child:
        assert child.wait() == 0, child.stderr
    return child


def _output(workdir: pathlib.Path, name: str) -> pathlib.Path:
    return workdir.with_name(f"{workdir.name}.{name}")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How much was compared, and one line for everything that differs."""

    num_rows: int
    num_arrays: int
    mismatches: list[str]


def compare(one: pathlib.Path, other: pathlib.Path) -> Comparison:
    """Compares all rows of metrics.jsonl and the newest checkpoint of two runs, every number by its bits."""
    rows, other_rows = ([_bits(row) for row in read_metrics(run / "metrics.jsonl")] for run in (one, other))
    arrays, other_arrays = _newest_arrays(one), _newest_arrays(other)
    mismatches = [f"{len(rows)} rows, {len(other_rows)} rows"] if len(rows) != len(other_rows) else []
    mismatches += [f"{a} != {b}" for a, b in zip(rows, other_rows, strict=False) if a != b]
    names = sorted(arrays.keys() | other_arrays.keys())
    mismatches += [f"{name} differs" for name in names if arrays.get(name) != other_arrays.get(name)]
    return Comparison(len(rows), len(arrays), mismatches)


def assert_bitwise_equal(one: pathlib.Path, other: pathlib.Path) -> None:
    """Fails with all that differs between two runs."""
    comparison = compare(one, other)
    assert comparison.num_rows and comparison.num_arrays
    assert not comparison.mismatches, "\n".join(comparison.mismatches)


def newest_step(run: pathlib.Path) -> int:
    """Returns the step of a run's newest checkpoint."""
    return max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def newest_state(run: pathlib.Path) -> dict:
    """Returns the state in a run's newest checkpoint as nested dicts of numpy arrays."""
    return checkpoint._read(run / "checkpoints" / str(newest_step(run)), None).state


def _newest_arrays(run: pathlib.Path) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_leaves_with_path({str(newest_step(run)): newest_state(run)})
    return {jax.tree_util.keystr(path): (x.dtype.name, x.shape, x.tobytes()) for path, x in leaves}


def _bits(row: dict) -> dict:
    """Returns the row with floats as the hexadecimal digits of their bits, so that NaN equals NaN and 0 is not -0."""
    return {name: np.float64(x).tobytes().hex() if isinstance(x, float) else x for name, x in row.items()}


class Pause:
    """Keeps this process in a phase, the number-th time that it comes there, until a signal arrives.

    A pause in "save" holds up the thread that writes, while training goes on: as long saves do.
    """

    def __init__(self, phase: str, number: int):
        """Patches the library: phase is compile, step, eval or save."""
        self.signalled, self.calls, self.number = False, 0, number
        Preemption._note = self.noting(Preemption._note)
        if phase == "compile":
            compilation.compile_train_step = self.pausing(compilation.compile_train_step)
        elif phase == "save":
            checkpoint.Checkpointer._finish = self.pausing(checkpoint.Checkpointer._finish)
        else:
            name = {"step": "compile_train_step", "eval": "compile_eval_step"}[phase]
            compiler = getattr(compilation, name)
            setattr(compilation, name, lambda *inputs, **options: self.pausing(compiler(*inputs, **options)))

    def noting(self, note: Callable) -> Callable:
        """Returns the library's signal handler, and remembers that it was called."""

        def noting(preemption, number, frame):
            note(preemption, number, frame)
            self.signalled = True

        return noting

    def pausing(self, function: Callable) -> Callable:
        """Returns the function with the pause before it."""

        def pausing(*arguments):
            if self.calls == self.number:
                print("phase reached", file=sys.stderr, flush=True)
                deadline = time.monotonic() + TIMEOUT
                while not self.signalled and time.monotonic() < deadline:
                    time.sleep(0.005)
            self.calls += 1
            return function(*arguments)

        return pausing


@dataclasses.dataclass(frozen=True, eq=False)
class PoisonedBatches(data.TrainBatches):
    """Training batches of which some have weights of NaN, and so a loss of NaN."""

    poisoned: range = range(0)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        batch = super().batch(step)
        if step in self.poisoned:
            batch["weights"] = np.full_like(batch["weights"], np.nan)
        return batch


def poison(batches: range) -> Callable:
    """Returns data.training with these batches poisoned, counted along the data, not by training step."""
    training = data.training

    def poisoned(*arguments, **options):
        clean = training(*arguments, **options)
        fields = {field.name: getattr(clean, field.name) for field in dataclasses.fields(clean)}
        return PoisonedBatches(**fields, poisoned=batches)

    return poisoned


def _child() -> None:
    """Takes its own flags out of the command line, then is foundry_jax.main."""
    while sys.argv[1].startswith(("--pause=", "--poison=")):
        flag, _, value = sys.argv.pop(1).partition("=")
        first, _, second = value.partition(":")
        if flag == "--pause":
            Pause(first, int(second or 0))
        else:
            data.training = poison(range(int(first), int(second)))
    main.main()


if __name__ == "__main__":
    command.run(_child)
