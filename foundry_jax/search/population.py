"""Several runs of one program, trained together: a step of all of them is one call on one device.

Each member has its trainer and its run folder, which in the end looks as if it had been trained alone; so train.run can
go on with any of them. A member whose steps do not stay finite leaves, and is to be finished alone.
"""

import collections
import contextlib
import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from foundry_jax import compilation, train
from foundry_jax.config import from_flat_dict
from foundry_jax.errors import MachineError, Preempted, UserError
from foundry_jax.preemption import Preemption
from foundry_jax.search.jobs import Run
from foundry_jax.train_step import TrainState

log = logging.getLogger(__name__)

TIMED_STEPS = 3  # of each way, after one that warms up

Ended = Callable[[Run, dict[str, Any] | UserError], None]


@dataclasses.dataclass(frozen=True)
class Member:
    """A run that can go on: its trainer, and the state and step to go on from."""

    run: Run
    trainer: train.Trainer
    state: TrainState
    step: int

    @property
    def kind(self) -> tuple:
        """What is equal among those that are trained together."""
        trainer = self.trainer
        return trainer.program, trainer.plan, trainer.batch_shape, trainer.last, self.step


@dataclasses.dataclass(frozen=True)
class Report:
    """What came of it: "vmap", or "serial" if nothing was trained, because that is faster, or all there is.

    step_seconds: {way: seconds of a step of one run}, of the ways that were timed.
    """

    way: str
    step_seconds: dict[str, float]


def train_together(
    runs: Sequence[Run], preemption: Preemption, *, ended: Ended, decided: Callable[[Report], None] | None = None
) -> Report:
    """Trains the runs that can be trained together: the most that have one program and one step, on one device.

    Args:
        decided: if given, some steps are timed both ways first; it gets what is faster, and if that is one run after
            the other, nothing is trained.
        ended: gets each run that comes to an end, and its result or why it failed; the others are to be trained alone.

    Raises:
        Preempted: the runs were asked to stop, and have saved.
        MachineError: as in train.run.
    """
    with contextlib.ExitStack() as stack:
        members = _largest_group(_begin(runs, preemption, stack, ended))
        if len(members) < 2:
            return Report("serial", {})
        seconds = {}
        if decided is not None:
            seconds = _compare(members)
            faster = Report(min(seconds, key=seconds.get), seconds)
            decided(faster)
            if faster.way == "serial":
                return faster
        for member in members:
            stack.enter_context(member.trainer.reporting(member.step))
            member.trainer.catch_up(member.state, member.step)
        population = Population(members, preemption)
        members.clear()  # the states are copied
        population.train(ended)
        return Report("vmap", seconds | {"vmap": population.seconds_of_a_step()})


def _begin(runs: Sequence[Run], preemption: Preemption, stack: contextlib.ExitStack, ended: Ended) -> Iterator[Member]:
    """Yields the runs that can go on; the stack holds their folders."""
    for run in runs:
        try:
            opened = train.opened(from_flat_dict(run.config), run.folder, preemption, quiet=True)
            if (trainer := stack.enter_context(opened)) is not None:
                yield Member(run, trainer, *trainer.begin(run.until))
        except MachineError:
            raise
        except UserError as error:
            ended(run, error)


def _largest_group(members: Iterator[Member]) -> list[Member]:
    groups = collections.defaultdict(list)
    for member in members:
        if member.trainer.plan.num_devices == 1 and member.step < member.trainer.last:
            groups[member.kind].append(member)
    return max(groups.values(), key=len, default=[])


def _compare(members: Sequence[Member]) -> dict[str, float]:
    """Returns {way: seconds of a step of one run} of some steps whose outcome is thrown away.

    Without "vmap" if there is not the memory for that.
    """
    trainer, size = members[0].trainer, len(members)
    batch = trainer.batches.train.batch(members[0].step)
    one = (jax.tree.map(jnp.copy, members[0].state), batch, trainer.hyper, trainer.base)
    compiled = compilation.compile_train_step(trainer.program, trainer.plan, trainer.batch_shape)
    seconds = {"serial": _seconds_of_a_step(compiled, one)}
    try:
        all_of_them = (_stack([member.state for member in members]), *_stack([one[1:]] * size))
        seconds["vmap"] = _seconds_of_a_step(_compiled(trainer, size), all_of_them) / size
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        log.warning("There is no memory for %d runs in one program: one after the other.", size)
    return seconds


def _seconds_of_a_step(step_fn, arguments: tuple) -> float:
    state, *others = arguments
    seconds = []
    for _ in range(TIMED_STEPS + 1):
        start = time.perf_counter()
        state, metrics = step_fn(state, *others)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _compiled(trainer: train.Trainer, size: int):
    return compilation.compile_population_step(trainer.program, trainer.plan, trainer.batch_shape, size)


def _stack(trees: Sequence[Any]) -> Any:
    """Returns one tree of many, its leaves with a new first axis; of numpy arrays if theirs are."""

    def stacked(*leaves):
        return np.stack(leaves) if isinstance(leaves[0], (np.ndarray, np.generic)) else jnp.stack(leaves)

    return jax.tree.map(stacked, *trees)


class Population:
    """Members of one kind, and their training: like train.Trainer, with a state of one more axis."""

    def __init__(self, members: Sequence[Member], preemption: Preemption):
        """Takes members whose metrics are open (Trainer.reporting)."""
        self.runs = [member.run for member in members]
        self.trainers = [member.trainer for member in members]
        self.active = list(range(len(members)))  # those that have not left
        self.preemption, self.start, self.last = preemption, members[0].step, members[0].trainer.last
        self.state = _stack([member.state for member in members])
        self.hyper = _stack([trainer.hyper for trainer in self.trainers])
        self.base = _stack([trainer.base for trainer in self.trainers])
        where = jax.tree.map(lambda x: x.sharding, self.trainers[0].inputs().state)
        self._take = jax.jit(lambda state, index: jax.tree.map(lambda x: x[index], state), out_shardings=where)

    def train(self, ended: Ended) -> None:
        """Trains to the last step; each member that has not left has then ended.

        Raises:
            Preempted: the runs were asked to stop, and have saved.
        """
        with self.measure("compile"):
            step_fn = _compiled(self.trainers[0], len(self.trainers))
        log.info("%d runs in one program, from step %d to %d.", len(self.trainers), self.start, self.last)
        batches = [trainer.iterate(self.start) for trainer in self.trainers]
        unread = None
        for step in range(self.start + 1, self.last + 1):
            with self.measure("data"):
                batch = _stack([next(each)[1] for each in batches])
            with self.measure("step"):
                self.state, metrics = step_fn(self.state, batch, self.hyper, self.base)
            self.note(unread)
            unread = (step, metrics)
            if self.preemption.requested(step) or any(self.trainers[i].is_anything_due(step) for i in self.active):
                self.note(unread)
                unread = None
                self.do_what_is_due(step)
            if not self.active:
                return
        for index in self.active:
            ended(self.runs[index], self.trainers[index].finish(self.last))

    def note(self, unread: tuple[int, dict] | None) -> None:
        """Waits for the metrics of a step, has each member note its own, and lets go of those in trouble."""
        if unread is None:
            return
        step, metrics = unread
        with self.measure("step"):
            metrics = jax.device_get(metrics)
        for index in list(self.active):
            try:
                self.trainers[index].note((step, {name: values[index] for name, values in metrics.items()}))
            except train.TooManySkipsError:
                log.warning("%s does not stay finite at step %d: it goes on alone.", self.runs[index].folder, step)
                self.active.remove(index)  # it is computed as before; leaving it out would take another program

    def do_what_is_due(self, step: int) -> None:
        """Evaluates and saves the members for which that is due.

        Raises:
            Preempted: the runs were asked to stop; all members have saved.
        """
        try:
            for index in self.active:
                trainer = self.trainers[index]
                if self.preemption.requested(step) or trainer.is_anything_due(step):
                    state = self._take(self.state, index)
                    trainer.evaluate_if_due(state, step)
                    trainer.ask_tasks_if_due(state, step)
                    trainer.save_if_due(state, step)
        except Preempted:
            for index in self.active:
                self.trainers[index].save(self._take(self.state, index), step)
            for index in self.active:
                self.trainers[index].checkpointer.wait()
            raise

    def seconds_of_a_step(self) -> float:
        """Returns how long a step of one run took."""
        return statistics.median(trainer.busy_seconds() for trainer in self.trainers) / (self.last - self.start)

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds to the clock of each member its share of the time spent inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            share = (time.perf_counter() - start) / len(self.trainers)
            for trainer in self.trainers:
                trainer.clock.seconds[name] += share
