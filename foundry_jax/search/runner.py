"""Jobs to processes on slots: started, watched, killed when they stall, started again, ended with this process.

    outcomes = run_jobs(jobs, slots=2, folder=sweep / "jobs", patience=300.0, tell=print)

A job's process is search/worker.py. It says that it lives by the heartbeats of its runs and by its status.json. Runs
that are finished are not trained again, so after any crash the same call goes on where it was. Imports no JAX.
"""

import collections
import contextlib
import ctypes
import dataclasses
import functools
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from foundry_jax.errors import EXIT_DONE, EXIT_PREEMPTED, EXIT_USER_ERROR, MachineError, Preempted
from foundry_jax.schema import require
from foundry_jax.search.jobs import EXIT_MACHINE, FINAL, Job, Run, RunState, read_status
from foundry_jax.search.slots import Slot, divide

WORKER = (sys.executable, "-m", "foundry_jax.search.worker")

POLL_SECONDS = 0.05  # how often it is asked whether a process has ended
SIGN_SECONDS = 1.0  # how often signs of life are looked for; heartbeats are written every two seconds
BACKOFF_SECONDS = 1.0  # before the first retry; twice as long before each further one
STOP_SECONDS = 60.0  # for a process that is asked to stop to save what it has
LOG_TAIL_BYTES = 8192
PR_SET_PDEATHSIG = 1  # linux/prctl.h

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: a new process must not

Event = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What has become of a job.

    status: "done" if each of its runs is done, paused or failed for a reason of its own, else "failed", and why.
    runs: {folder: what has become of the run}; of a job that failed, some may be "unfinished".
    seconds: how long its processes ran. starts: how often one was started.
    """

    status: str
    reason: str | None
    runs: Mapping[pathlib.Path, RunState]
    seconds: float
    starts: int


def run_jobs(
    jobs: Sequence[Job],
    *,
    slots: int,
    folder: pathlib.Path,
    patience: float,
    retries: int = 3,
    tell: Callable[[Event], None] = lambda event: None,
) -> dict[str, Outcome]:
    """Returns {name: outcome} of jobs, each in a folder of its name, as many at a time as there are slots.

    A process that is killed, that crashes or that shows no sign of life for `patience` seconds is started again, so
    often as `retries` says without a step gained. Exit code 1, a mistake of the user or of ours, is not tried again.
    A run that brings its process down again and again is left out, and the job goes on without it.

    Args:
        patience: longer than the longest compilation, during which there is no sign of life.
        tell: gets {"event": "started" | "step" | "run" | "retry" | "left out" | "ended", "job": name, ...} from this
            thread, as it happens; "text" says it in a line.

    Raises:
        MachineError: the machine refuses something to a process; nothing goes on, and nothing is lost.
        UserError: two jobs of one name, or a name that is none for a folder, or as in slots.divide.
        Preempted: SIGTERM or Ctrl-C came, and the processes have saved what they had. The second Ctrl-C kills them, and
            raises KeyboardInterrupt.
    """
    names = [job.name for job in jobs]
    require(len(names) == len(set(names)), f"Two jobs have one name: {', '.join(sorted(names))}.")
    for name in names:
        require(re.fullmatch(r"[\w.=+,-]+", name) is not None, f"A job is named {name!r}, which is no folder's name.")
    runner = _Runner(divide(slots), pathlib.Path(folder).absolute(), patience, retries, tell)
    for job in jobs:
        runner.add(job)
    with _stop_signals() as stop:
        return runner.run(stop)


@dataclasses.dataclass
class _Task:
    """A job on its way to its outcome."""

    job: Job
    steps: dict[pathlib.Path, int]  # the furthest step of each run at the last start
    left_out: dict[pathlib.Path, RunState] = dataclasses.field(default_factory=dict)
    told: dict[pathlib.Path, RunState] = dataclasses.field(default_factory=dict)  # which runs were said to be final
    tries: int = 0  # that gained no step
    starts: int = 0
    seconds: float = 0.0
    not_before: float = 0.0

    def states(self) -> dict[pathlib.Path, RunState]:
        """Returns what has become of the runs; those left out are unfinished, with the reason."""
        return {
            folder: self.left_out.get(folder, state) if not state.is_final else state
            for folder, state in self.job.states().items()
        }

    def remaining(self) -> tuple[Run, ...]:
        """Returns the runs that there is something to do for."""
        states = self.states()
        runs = [run for run in self.job.runs if not states[run.folder].is_final]
        return tuple(run for run in runs if run.folder not in self.left_out)

    def has_gained(self) -> bool:
        """Returns whether a run is further than it ever was before, and remembers where they are now."""
        before, self.steps = self.steps, {run.folder: max(run.step(), self.steps[run.folder]) for run in self.job.runs}
        ended = {folder for folder, state in self.states().items() if state.is_final}
        return self.steps != before or bool(ended - self.told.keys())


class _Process:
    """A worker of a job: a process in a group of its own, which ends with this process."""

    def __init__(self, task: _Task, slot: Slot, folder: pathlib.Path):
        """Starts it; it finds its job.json in the folder."""
        self.task, self.slot, self.folder = task, slot, folder
        self.job = dataclasses.replace(task.job, runs=task.remaining())
        self.job.write(folder)
        self.log: IO[bytes] = open(folder / "log.txt", "ab")  # noqa: SIM115
        self.started = self.last_sign = self.last_look = time.monotonic()
        self.signs = self.read_signs()  # a heartbeat of the process before
        self.process = subprocess.Popen(
            [*WORKER, str(folder)],
            env={**os.environ, **slot.environment},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
            preexec_fn=functools.partial(_settle_in, os.getpid(), slot.cores),
        )

    def look(self) -> bool:
        """Looks for signs of life, if it is time to; returns whether there was a new one."""
        now = time.monotonic()
        if now - self.last_look < SIGN_SECONDS:
            return False
        self.last_look = now
        signs = self.read_signs()
        if signs == self.signs:
            return False
        self.signs, self.last_sign = signs, now
        return True

    def read_signs(self) -> list:
        """Returns what changes as long as it lives."""
        status = self.folder / "status.json"
        beats = [run.heartbeat() for run in self.job.runs]
        return [*beats, status.stat().st_mtime_ns if status.exists() else None]

    def send(self, number: int) -> None:
        """Sends the worker a signal, and with SIGKILL all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)

    def end(self) -> None:
        """Kills what is left of it, and waits until nothing is."""
        self.send(signal.SIGKILL)
        self.process.wait()
        self.log.close()
        self.task.seconds += time.monotonic() - self.started

    def last_words(self) -> str:
        """Returns the last line of the log, or the last that reports an error."""
        with open(self.folder / "log.txt", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"(error: |\S*Error\b)", line)]
        return (errors or lines or ["it printed nothing"])[-1].removeprefix("error: ")


def _settle_in(parent: int, cores: Sequence[int]) -> None:
    """Runs in a new process, before it becomes a worker."""
    die_with_parent(parent)
    if cores and hasattr(os, "sched_setaffinity"):  # JAX makes as many threads as there are cores for it
        os.sched_setaffinity(0, cores)


def die_with_parent(parent: int | None = None) -> None:
    """Has Linux kill this process when its parent ends, however that ends; to be called in a new process.

    Args:
        parent: whose child this process should be; if that has ended already, this one ends now.
    """
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def is_settled(folder: pathlib.Path) -> bool:
    """Returns whether a run has a result, or has failed for good."""
    return any((folder / name).exists() for name in FINAL)


class _Runner:
    """The jobs that wait, those that run, and the outcomes of the others."""

    def __init__(
        self,
        slots: Sequence[Slot],
        folder: pathlib.Path,
        patience: float,
        retries: int,
        tell: Callable[[Event], None],
    ):
        self.free = collections.deque(slots)
        self.folder, self.patience, self.retries, self.tell = folder, patience, retries, tell
        self.waiting: list[_Task] = []
        self.running: list[_Process] = []
        self.outcomes: dict[str, Outcome] = {}

    def add(self, job: Job) -> None:
        """Puts a job in the queue, unless there is nothing left to do."""
        task = _Task(job, steps={run.folder: run.step() for run in job.runs})
        task.told = {folder: state for folder, state in task.states().items() if state.is_final}
        if len(task.told) == len(job.runs):
            self.conclude(task, None)
        else:
            self.waiting.append(task)

    def run(self, stop: "_Stop") -> dict[str, Outcome]:
        """Returns the outcomes when all jobs have one; no process is left, however this ends."""
        try:
            while self.waiting or self.running:
                if stop.asked:
                    self.stop(stop)
                self.start()
                time.sleep(POLL_SECONDS)
                for process in list(self.running):
                    self.look_after(process)
        finally:
            for process in self.running:
                process.end()
        return self.outcomes

    def start(self) -> None:
        """Starts the jobs that can be started, the first in the queue first."""
        for task in list(self.waiting):
            if self.free and time.monotonic() >= task.not_before:
                self.waiting.remove(task)
                slot = self.free.popleft()
                task.starts += 1
                process = _Process(task, slot, self.folder / task.job.name)
                self.running.append(process)
                count, pid = len(process.job.runs), process.process.pid
                text = f"{count} run{'s' if count > 1 else ''} on slot {slot.index}, process {pid}"
                self.say(task, "started", text, slot=slot.index, start=task.starts, pid=pid)

    def look_after(self, process: _Process) -> None:
        """Notes what a process has done since; ends it if it is stalled."""
        code = process.process.poll()
        if process.look():
            self.report(process.task)
            steps = {run.folder: run.step() for run in process.job.runs}
            self.say(process.task, "step", ", ".join(f"{f.name} {step}" for f, step in steps.items()), steps=steps)
        elif code is None and time.monotonic() - process.last_sign > self.patience:
            self.ended(process, None)
        if code is not None:
            self.ended(process, code)

    def report(self, task: _Task) -> None:
        """Tells which runs have come to an end."""
        for folder, state in task.states().items():
            if state.is_final and folder not in task.told:
                task.told[folder] = state
                text = f"{folder}: {state.status}" + (f": {state.reason}" if state.reason else "")
                self.say(task, "run", text, run=folder, status=state.status, reason=state.reason)

    def ended(self, process: _Process, code: int | None) -> None:
        """Decides how a job goes on whose process has ended, or is stalled (None)."""
        task = process.task
        self.running.remove(process)
        process.end()
        self.free.append(process.slot)
        gained = task.has_gained()
        self.report(task)
        if code == EXIT_MACHINE:
            raise MachineError(process.last_words())
        if not task.remaining():
            self.conclude(task, None)
        elif code in (EXIT_DONE, EXIT_USER_ERROR):
            self.conclude(task, process.last_words())
        else:
            self.try_again(task, process, self.why(code, process), gained=gained)

    def why(self, code: int | None, process: _Process) -> str:
        """Returns why a process has not done its job."""
        if code is None:
            return f"no sign of life for {self.patience:g} s"
        if code == EXIT_PREEMPTED:
            return "it was asked to stop, and has saved"
        if code < 0:
            return f"killed by signal {-code} ({signal.strsignal(-code)})"
        return f"exit code {code}: {process.last_words()}"

    def try_again(self, task: _Task, process: _Process, why: str, *, gained: bool) -> None:
        """Puts the job back into the queue; without the run that is the trouble, if it was tried often enough."""
        task.tries = 0 if gained else task.tries + 1
        if task.tries > self.retries and not self.leave_out(task, process, why):
            self.conclude(task, f"{why}, {task.tries} times without a step gained; see {process.folder / 'log.txt'}")
            return
        seconds = BACKOFF_SECONDS * 2 ** max(task.tries - 1, 0)
        task.not_before = time.monotonic() + seconds
        self.waiting.append(task)
        self.say(task, "retry", f"{why}; started again in {seconds:g} s", reason=why, seconds=seconds)

    def leave_out(self, task: _Task, process: _Process, why: str) -> bool:
        """Leaves out the run that the process was at, if others are left; returns whether it did."""
        status = read_status(process.folder)
        current = status.get("current", [])
        if status.get("pid") != process.process.pid or len(current) != 1 or len(task.remaining()) < 2:
            return False
        run = pathlib.Path(current[0])
        task.left_out[run] = RunState("unfinished", why)
        task.tries = 0
        self.say(task, "left out", f"{run} is left out: {why}", run=run, reason=why)
        return True

    def conclude(self, task: _Task, reason: str | None) -> None:
        """Writes down the outcome of a job; the reason says why it is not done."""
        states = task.states()
        if reason is None and not all(state.is_final for state in states.values()):
            reason = "; ".join(f"{folder}: {state.reason}" for folder, state in task.left_out.items())
        status = "done" if reason is None else "failed"
        self.outcomes[task.job.name] = Outcome(status, reason, states, task.seconds, task.starts)
        self.say(task, "ended", status if reason is None else f"failed: {reason}", status=status, reason=reason)

    def stop(self, stop: "_Stop") -> None:
        """Asks all processes to save and to end.

        Raises:
            Preempted: they have.
            KeyboardInterrupt: they were not given the time to.
        """
        for process in self.running:
            process.send(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while any(process.process.poll() is None for process in self.running):
            if stop.asked_again:
                raise KeyboardInterrupt
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        raise Preempted(f"{len(self.running)} jobs are stopped, {len(self.waiting)} wait; run the same command again.")

    def say(self, task: _Task, event: str, text: str, **facts: Any) -> None:
        self.tell({"event": event, "job": task.job.name, "text": f"{task.job.name}: {text}", **facts})


@dataclasses.dataclass
class _Stop:
    """Whether this process was asked to stop, and whether it was interrupted after that."""

    asked: bool = False
    asked_again: bool = False


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Turns SIGTERM and Ctrl-C into a question while it is entered; only the main thread gets signals."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, _: object) -> None:
        stop.asked_again = stop.asked and number == signal.SIGINT
        stop.asked = True

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
