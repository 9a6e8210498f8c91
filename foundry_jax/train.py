"""The story of one run: data, plan, state, loop, result."""

import collections
import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from foundry_jax import compilation, data, forecast, provenance, rewards, sharding
from foundry_jax.checkpoint import Checkpointer
from foundry_jax.config import Config, to_flat_dict
from foundry_jax.data import pair_files, preferences, split
from foundry_jax.data.tokenize import Tokenizer
from foundry_jax.data_tools import TOOLS
from foundry_jax.errors import Preempted, UserError
from foundry_jax.metrics import TRACKERS, MetricsWriter, Progress, device_peak_flops
from foundry_jax.model import lora, transformer
from foundry_jax.optimizer import hyperparameters
from foundry_jax.preemption import Preemption
from foundry_jax.registry import lookup
from foundry_jax.runfolder import RunFolder, read_metrics, read_result
from foundry_jax.schema import require
from foundry_jax.train_step import Program, TrainState

if TYPE_CHECKING:
    from foundry_jax.tasks.in_loop import Scheduled
    from foundry_jax.tasks.scoring import Scorer
    from foundry_jax.zoo import Source

log = logging.getLogger(__name__)

# Keys that may change when a run is resumed: they decide what is kept and shown, not what is computed.
OPERATIONAL = ("name", "sharding", "checkpoint", "log", "data.cache_dir", "eval.tasks")


def run(config: Config, workdir: str | Path, *, quiet: bool = False, until: int | None = None) -> dict[str, Any]:
    """Trains one configuration, or goes on where workdir says it stopped, and returns its result.

    Args:
        until: stop after so many steps with an evaluation and a checkpoint, and return {"status": "paused", "step": n};
            a later call goes on from there.

    Raises:
        UserError: the config does not fit together, or not the data, the devices or what workdir holds.
        DivergedError: its steps do not stay finite.
        MachineError: a full disk, or a folder that is in use; the run may be fine.
        Preempted: SIGTERM or Ctrl-C came; a checkpoint was saved.
    """
    with Preemption() as preemption, opened(config, workdir, preemption, quiet=quiet) as trainer:
        if trainer is not None:
            return trainer.train(until)
    log.info("%s is finished; delete it or use another --workdir to train again.", workdir)
    return read_result(workdir)


@contextlib.contextmanager
def opened(
    config: Config, workdir: str | Path, preemption: Preemption, *, quiet: bool = False
) -> "Iterator[Trainer | None]":
    """Gives the trainer of a run, which holds its folder until the end of the block; None if the run is finished.

    Raises:
        UserError: as in run.
    """
    transformer.check(config.model)
    Program.of(config)
    require_known_trackers(config)
    if config.lora.rank:
        lora.target_paths(config.model, config.lora.targets)
    with RunFolder(workdir, primary=jax.process_index() == 0) as folder:
        source, tasks = open_source(config), tasks_of(config)
        corpus = data.prepare(config.data, tokenizer_of(config, source), TOOLS)
        config = with_vocabulary(config, vocab_size_of(config, corpus, source))
        num_params = transformer.num_params(config.model)
        plan = sharding.plan(num_params, jax.device_count(), config.sharding)
        require_even_batches(config, plan)
        batches = batches_of(config, corpus)  # too little data must be found before a config is written that stays
        folder.write_config(to_flat_dict(config), OPERATIONAL)
        if read_result(folder.path) is not None:
            yield None
            return
        if source and config.lora.rank:
            folder.require_same_source(source.name, source.fingerprint)
        if corpus.tokenizer:
            folder.keep("tokenizer.json", corpus.tokenizer.save)
        log.info("%s: %s parameters on %d x %s.", workdir, f"{num_params:,}", plan.num_devices, device_kind())
        if config.lora.rank:
            log.info("Training adapters of %s parameters.", f"{forecast.num_trained_params(config):,}")
        log.info("Sharding: %s, because %s.", plan.strategy, plan.reason)
        warn_about_memory(config, plan, device_memory())
        keep = config.checkpoint
        with (
            plan.context(),
            Checkpointer(folder.checkpoints, keep_latest=keep.keep_latest, keep_best=keep.keep_best) as checkpointer,
        ):
            yield Trainer(config, source, corpus, batches, tasks, plan, folder, checkpointer, preemption, quiet=quiet)


def tasks_of(config: Config) -> "list[Scheduled]":
    """Returns the tasks to evaluate on the way, their data read.

    Raises:
        UserError: an unknown task or option, or no data.
    """
    if not config.eval.tasks.strip():
        return []
    from foundry_jax.tasks import in_loop  # as in open_source

    return in_loop.scheduled(config.eval.tasks)


def open_source(config: Config) -> "Source | None":
    """Returns the model that the run starts from, its weights not yet read; None if it starts from random parameters.

    Raises:
        UserError: no such model, or files that are damaged.
    """
    if not config.init.source:
        return None
    from foundry_jax import zoo  # what it needs takes time to import, and most runs do not need it

    return zoo.open_source(config.init.source)


def tokenizer_of(config: Config, source: "Source | None") -> Tokenizer | None:
    """Returns the tokenizer of the model that the run starts from; None if there is no such model or need.

    Raises:
        UserError: it has none, and the config names none either.
    """
    if source is None or config.data.tokenizer not in data.TOKENIZERS:
        return None
    tokenizer = source.tokenizer()
    require(
        tokenizer is not None or config.data.source == "bin",
        f"There is no tokenizer in {source.name}: set data.tokenizer to the one that its model was trained with.",
    )
    return tokenizer


def vocab_size_of(config: Config, corpus: data.Corpus, source: "Source | None") -> int:
    """Returns the vocabulary of the data; that of the model that the run starts from may be larger, and is kept."""
    if source is None or config.model.vocab_size:
        return corpus.vocab_size
    return max(corpus.vocab_size, source.model.vocab_size)


def with_vocabulary(config: Config, vocab_size: int) -> Config:
    """Returns the config with model.vocab_size known.

    Raises:
        UserError: the config asks for a smaller vocabulary than the tokens need.
    """
    given = config.model.vocab_size
    require(
        given == 0 or given >= vocab_size,
        f"model.vocab_size={given} is smaller than the data's vocabulary of {vocab_size}; set it to 0 or {vocab_size}.",
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=given or vocab_size))


def require_known_trackers(config: Config) -> None:
    """Raises UserError for a name in log.trackers that is none, before anything is compiled."""
    for name in filter(None, map(str.strip, config.log.trackers.split(","))):
        lookup(TRACKERS, name, "tracker")


def require_even_batches(config: Config, plan: sharding.Plan) -> None:
    """Raises UserError unless micro-batches and evaluation batches divide over the devices."""
    sizes = {
        "data.batch_size / optimizer.accumulation_steps": config.data.batch_size // config.optimizer.accumulation_steps,
        "eval.batch_size": config.eval.batch_size,
    }
    for name, size in sizes.items():
        require(
            size % plan.batch_shards == 0,
            f"{name} = {size} must be a multiple of the {plan.batch_shards} devices a batch is spread over; "
            f"try {math.ceil(size / plan.batch_shards) * plan.batch_shards}.",
        )


def device_memory() -> int | None:
    """Returns how many bytes one device has for arrays; None where JAX cannot tell (CPU)."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def warn_about_memory(config: Config, plan: sharding.Plan, device_bytes: int | None) -> None:
    """Logs a warning if the estimated memory of a step is more than a device has, and which strategy would fit."""
    needed = forecast.memory(config, plan).total
    if device_bytes is None or needed <= device_bytes:
        return
    fitting = ", ".join(forecast.strategies_that_fit(config, jax.device_count(), device_bytes))
    advice = f"sharding.strategy={fitting}" if fitting else "more devices, model.remat=full or accumulation_steps"
    text = "%s needs about %.1f GiB per device, which has %.1f: it will probably run out of memory; try %s."
    log.warning(text, plan.strategy, needed / 2**30, device_bytes / 2**30, advice)


def device_kind() -> str:
    """Returns the vendor's name of the devices."""
    return jax.devices()[0].device_kind


def process_rows(batch_size: int) -> slice:
    """Returns which rows of a global batch this process reads: processes hold neighbouring rows."""
    share = batch_size // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


@dataclasses.dataclass(frozen=True)
class Batches:
    """This process's rows of the batches of a run."""

    train: data.TrainBatches  # of rows of text, or of pairs
    validation: tuple[data.ValidationBatches, ...]  # one of each source
    held_out: preferences.Pairs | None  # of all processes; None if it is text that is trained on


def batches_of(config: Config, corpus: data.Corpus) -> Batches:
    """Returns the batches: text to train on, or pairs of completions; validation is on text, and on pairs if there are.

    Raises:
        UserError: there are too few tokens, or the pairs cannot be read.
    """
    size, length, seed = config.data.batch_size, config.model.context_length, config.seed
    held_out = None
    if config.data.preferences:
        found = pair_files.read(
            config.data.preferences,
            corpus.tokenizer,
            format=config.data.format,
            fraction=split.parse(config.data.validation).fraction,
            context_length=length,
        )
        train, held_out = found.batches(size, seed, process_rows(size)), found.held_out
    else:
        train = data.training(
            corpus,
            config.data,
            context_length=length,
            num_steps=config.num_steps,
            seed=seed,
            rows=process_rows(size),
            tools=TOOLS,
        )
    size = config.eval.batch_size
    validation = data.validation(corpus, batch_size=size, context_length=length, rows=process_rows(size))
    return Batches(train, validation, held_out)


class Clock:
    """Adds up seconds by activity."""

    def __init__(self):
        self.seconds = {name: 0.0 for name in ("compile", "data", "step", "log", "eval", "save")}

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


class DivergedError(UserError):
    """The run does not stay finite, whatever data it is given."""


class TooManySkipsError(Exception):
    """guard.max_skips steps in a row were not finite; carries the last of them."""

    def __init__(self, step: int, metrics: dict[str, float]):
        super().__init__(step, metrics)
        self.step, self.metrics = step, metrics


class Trainer:
    """One run inside its plan's context: what its loop needs at hand, and the loop."""

    def __init__(
        self,
        config: Config,
        source: "Source | None",
        corpus: data.Corpus,
        batches: Batches,
        tasks: "Sequence[Scheduled]",
        plan: sharding.Plan,
        folder: RunFolder,
        checkpointer: Checkpointer,
        preemption: Preemption,
        *,
        quiet: bool,
    ):
        self.config, self.source, self.corpus, self.batches, self.plan = config, source, corpus, batches, plan
        self.tasks, self.failed_tasks, self.base = tasks, {}, {}
        self.reference = None  # of pairs that are held out, [tokens]
        self.folder, self.checkpointer, self.preemption = folder, checkpointer, preemption
        self.quiet = quiet or jax.process_index() > 0
        self.clock = Clock()
        self.skips = 0  # non-finite steps in a row, up to the last one noted
        self.last = config.num_steps  # the step to stop after
        self.program = Program.of(config)
        self.hyper = hyperparameters(config)
        self.batch_shape = config.batch_shape
        self.eval_shape = (config.eval.batch_size, config.model.context_length)

    def train(self, until: int | None = None) -> dict[str, Any]:
        """Trains from the newest checkpoint to the last step, or to `until`, and returns what finish does."""
        state, step = self.begin(until)
        with self.reporting(step):
            with self.clock.measure("compile"):
                step_fn = compilation.compile_train_step(self.program, self.plan, self.batch_shape)
            self.catch_up(state, step)
            while step < self.last:
                try:
                    state, step = self.loop(step_fn, state, step)
                except TooManySkipsError as trouble:
                    state, step = self.roll_back(trouble)
            return self.finish(step)

    def begin(self, until: int | None = None) -> tuple[TrainState, int]:
        """Returns the state to go on with, and its step; from then on the run's last step is known."""
        assert until is None or until > 0, until
        self.last = self.config.num_steps if until is None else min(until, self.config.num_steps)
        for task in self.tasks:
            task.check(self.scorer({}))
        self.base = self.init_base()
        if self.program.learns_from_pairs:
            self.add_reference()
        return self.restore_or_init()

    @contextlib.contextmanager
    def reporting(self, step: int) -> Iterator[None]:
        """Keeps metrics and progress open, of a run that goes on from `step`."""
        self.writer = MetricsWriter(
            self.folder.metrics, resume_step=step, trackers=self.config.log.trackers, primary=jax.process_index() == 0
        )
        self.evals = {row["step"]: row for row in self.rows("eval")}
        self.progress = Progress(self.config.num_steps, step=step, quiet=self.quiet)
        with self.writer, self.progress:
            self.writer.config(to_flat_dict(self.config))
            self.folder.heartbeat(step)
            yield

    def catch_up(self, state: TrainState, step: int) -> None:
        """Does what was due at the step that the run goes on from: it may have been stopped before that."""
        if step > 0:
            self.evaluate_if_due(state, step)
            self.ask_tasks_if_due(state, step)

    def finish(self, step: int) -> dict[str, Any]:
        """Returns the result, which is then in the folder, when the last checkpoint is sealed.

        Before the config's last step: {"status": "paused", "step": n}, and nothing is in the folder.
        """
        with self.clock.measure("save"):
            self.checkpointer.wait()
        if step < self.config.num_steps:
            return {"status": "paused", "step": step}
        result = self.result()
        self.folder.write_result(result)
        self.writer.summary(result)
        return result

    def add_reference(self) -> None:
        """Puts the reference into the batches: what the run's first parameters say of all completions.

        Adapters add nothing at first, so with them it is what the base says. Computed once, before anything else takes
        memory, and kept for every run that starts from the same parameters. In float32 the first step finds the same
        bits, and a margin of exactly 0; in bfloat16 XLA rounds two programs differently, and margins begin at about
        1e-5 nats (XLA:CPU, 2026-11).
        """
        train, held_out = [part.source for part in self.batches.train.parts], self.batches.held_out
        start = [self.config.seed] if self.source is None or self.config.init.fresh else []
        start += [self.source.fingerprint] if self.source else []
        kept = rewards.ReferenceFile.of(
            self.config.data.cache_dir, self.program, self.plan, self.pairs_shape,
            start=start, train=train, held_out=held_out)  # fmt: skip
        reference = kept.read()
        if reference is None:
            number = sum(map(len, (*train, held_out)))
            log.info("Computing the reference log-probabilities of %s pairs.", f"{number:,}")
            params, stop = self.init().params, self.stop_before_start
            found = [answers.completions for pairs in train for _, answers in self.answers(pairs, params, stop)]
            reference = preferences.Reference(np.concatenate(found), self.token_log_probs(held_out, params, stop))
            kept.write(reference)
        self.reference = reference.held_out
        with_reference = preferences.with_reference(self.batches.train, reference.train)
        self.batches = dataclasses.replace(self.batches, train=with_reference)

    @property
    def pairs_shape(self) -> tuple[int, ...]:
        """The shape of a micro-batch of pairs, which fits into memory."""
        return (self.batch_shape[0] // self.config.optimizer.accumulation_steps, *self.batch_shape[1:])

    def answers(
        self, pairs: preferences.Pairs, params: dict, stop_if_asked: Callable[[], None]
    ) -> Iterator[tuple[np.ndarray, rewards.Answers]]:
        """Yields (indices of some pairs, what the model says of them), until it was all of them."""
        size, *_ = shape = self.pairs_shape
        with self.clock.measure("compile"):
            ask = rewards.compile_answers_step(self.program, self.plan, shape)
        for first, batch in zip(range(0, len(pairs), size), pairs.in_order(size, process_rows(size)), strict=True):
            with self.clock.measure("eval"):
                found = jax.device_get(ask(params, self.place(batch, shape), self.hyper, self.base))
            indices = np.arange(first, min(first + size, len(pairs)))  # the last batch is filled up
            yield indices, rewards.Answers(*(x[: len(indices)] for x in found))
            stop_if_asked()

    def token_log_probs(self, pairs: preferences.Pairs, params: dict, stop_if_asked: Callable[[], None]) -> np.ndarray:
        """Returns the log-probabilities of all tokens of the completions, one after the other, in nats."""
        found = self.answers(pairs, params, stop_if_asked)
        return np.concatenate([answers.targets[pairs.is_completion(indices)] for indices, answers in found])

    def stop_before_start(self) -> None:
        """Raises Preempted if the run was asked to stop: there is nothing to save yet."""
        if self.preemption.requested(0):
            raise Preempted(f"{self.folder.path} has no reference yet; run it again to start.")

    def init(self) -> TrainState:
        """Returns the state at step 0."""
        if self.source is None or self.program.lora_rank:
            with self.clock.measure("compile"):
                return compilation.compile_init(self.program, self.plan)(self.hyper)
        params = self.read_source()
        with self.clock.measure("compile"):
            return compilation.compile_start(self.program, self.plan)(params, self.hyper)

    def init_base(self) -> dict:
        """Returns the parameters under the adapters; {} if all parameters are trained. They are in no checkpoint."""
        if not self.program.lora_rank:
            return {}
        if self.source:
            return self.read_source()
        with self.clock.measure("compile"):
            return compilation.compile_base(self.program, self.plan)(self.hyper)

    def read_source(self) -> dict:
        """Returns the parameters of the model that the run starts from, in float32, laid out by the plan.

        Raises:
            UserError: they do not fit the config's model, or cannot be read.
        """
        from foundry_jax.zoo import graft  # as in open_source

        log.info("Reading the parameters of %s.", self.source.name)
        inputs = self.inputs()
        shardings = jax.tree.map(lambda x: x.sharding, inputs.base if self.program.lora_rank else inputs.state.params)
        start, seed = self.config.init, self.config.seed
        with self.clock.measure("save"):
            return graft.start(self.source, self.config.model, shardings, fresh=start.fresh, seed=seed)

    def inputs(self) -> compilation.Inputs:
        """Returns the shapes of all that a step takes, laid out by the plan."""
        return compilation.abstract_inputs(self.program, self.plan, self.batch_shape)

    def restore_or_init(self, before: int | None = None) -> tuple[TrainState, int]:
        """Returns the newest whole checkpoint (of a step smaller than `before`) and its step, or a new state and 0."""
        with self.clock.measure("save"):
            restored = self.checkpointer.restore(self.inputs().state, before=before)
        if restored is not None:
            log.info("Resuming from step %d.", restored.step)
            if before is None:
                self.clock.seconds |= restored.metadata["seconds"]
            return restored.state, restored.step
        return self.init(), 0

    def loop(self, step_fn, state: TrainState, start: int) -> tuple[TrainState, int]:
        """Returns the state after the last step, and that step; logs, evaluates and saves on the way.

        The metrics of a step are read while the device works on the next, so that reading never makes it wait.
        """
        batches = self.iterate(start)
        unread = None
        while (item := self.next_batch(batches)) is not None:
            step, batch = item[0] + 1, item[1]  # from here on `step` counts finished steps
            with self.clock.measure("step"):
                state, metrics = step_fn(state, self.place(batch, self.batch_shape), self.hyper, self.base)
            self.note(unread)
            unread = (step, metrics)
            if self.preemption.requested(step) or self.is_anything_due(step):
                self.note(unread)
                unread = None
                self.evaluate_if_due(state, step)
                self.ask_tasks_if_due(state, step)
                self.save_if_due(state, step)
        self.note(unread)
        return state, self.last

    def iterate(self, start: int) -> Iterator[tuple[int, dict]]:
        """Returns the batches from a step on, and begins to measure the speed there."""
        self.logged = collections.deque([(start, self.busy_seconds())], maxlen=10)
        return self.batches.train.iterate(start, self.last, self.folder.data_offset)

    def next_batch(self, batches: Iterator[tuple[int, dict]]) -> tuple[int, dict] | None:
        """Returns the next (step, batch), or None at the end; the wait counts as "data"."""
        with self.clock.measure("data"):
            return next(batches, None)

    def place(self, batch: dict, shape: tuple[int, ...]) -> dict:
        """Returns the batch laid out over the devices; each process brings its own rows of the first axis."""
        make = functools.partial(jax.make_array_from_process_local_data, self.plan.batch_sharding())
        return {name: make(x, (shape[0], *x.shape[1:])) for name, x in batch.items()}

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Returns what metrics.jsonl holds of one kind, oldest first."""
        return read_metrics(self.folder.metrics, kind) if self.folder.metrics.exists() else []

    def eval_is_due(self, step: int) -> bool:
        return step % self.config.eval.every == 0 or step == self.last

    def save_is_due(self, step: int) -> bool:
        return step % self.config.checkpoint.every == 0 or step == self.last

    def is_anything_due(self, step: int) -> bool:
        return self.eval_is_due(step) or self.save_is_due(step) or bool(self.due_tasks(step))

    def due_tasks(self, step: int) -> "list[Scheduled]":
        return [task for task in self.tasks if task.is_due(step, self.config.num_steps)]

    def busy_seconds(self) -> float:
        return self.clock.seconds["step"] + self.clock.seconds["data"]

    def note(self, unread: tuple[int, dict] | None) -> None:
        """Waits for the metrics of a step, and logs them if that is due.

        Raises:
            TooManySkipsError: it was the last of too many non-finite steps.
        """
        if unread is None:
            return
        step, metrics = unread
        with self.clock.measure("step"):
            self.skips = int(metrics["skips"])
        if self.skips or step % self.config.log.every == 0 or step == self.config.num_steps:
            with self.clock.measure("log"):
                self.log(step, jax.device_get(metrics))
        with self.clock.measure("log"):
            self.folder.heartbeat(step)
        if self.skips >= self.config.guard.max_skips:
            raise TooManySkipsError(step, {name: float(value) for name, value in metrics.items()})

    def log(self, step: int, row: dict[str, Any]) -> None:
        """Writes one row of training metrics and shows it."""
        self.writer.write(step, "train", row)
        # Over the last ten rows: at an evaluation two rows are written at once, and one interval says nothing.
        self.logged.append((step, self.busy_seconds()))
        (first_step, first), (_, now) = self.logged[0], self.logged[-1]
        speed = (step - first_step) * math.prod(self.batch_shape) / max(now - first, 1e-9)
        self.progress.update(step, row | {"tokens_per_second": speed, "mfu": self.mfu(speed)})

    def mfu(self, tokens_per_second: float) -> float | None:
        """Returns the share of the devices' peak FLOP/s that the model's own FLOPs use; None if the peak is unknown."""
        peak = device_peak_flops(jax.local_devices()[0], self.config.model.dtype)
        flops = forecast.train_flops_per_token(self.config)
        return None if peak is None else tokens_per_second * flops / (peak * self.plan.num_devices)

    def evaluate_if_due(self, state: TrainState, step: int) -> None:
        """Writes the validation metrics of raw and averaged parameters, unless they are there already.

        Raises:
            Preempted: the run was asked to stop; the state is saved, and the evaluation is repeated on resume.
        """
        if not self.eval_is_due(step) or step in self.evals:
            return
        row = {}
        for prefix, params in (("", state.params), ("ema_", state.ema_params)):
            nats, targets = self.measure_validation(params, state, step)
            metrics = validation_metrics(math.fsum(nats), math.fsum(targets), self.corpus)
            row |= {prefix + name: x for name, x in metrics.items()}
            if not prefix and step == self.config.num_steps:
                self.folder.write_validation_blocks(nats, targets, self.corpus.validation_bytes)
        if self.program.learns_from_pairs:
            row |= self.measure_pairs(state, step)
        self.writer.write(step, "eval", row)
        self.evals[step] = row
        bits = f", {row['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in row else ""
        self.progress.line(
            f"step {step} validation loss {row['loss']:.4f}{bits}; of averaged weights {row['ema_loss']:.4f}"
        )
        if self.program.learns_from_pairs:
            self.progress.line(f"step {step} of {len(self.batches.held_out):,} pairs held out: {rewards.line(row)}")

    def measure_validation(self, params: dict, state: TrainState, step: int) -> tuple[list[float], list[float]]:
        """Returns the nats and the numbers of targets of all validation sequences, in order.

        Raises:
            Preempted: as in evaluate_if_due.
        """
        nats, targets = [], []
        for batches in self.batches.validation:
            with self.clock.measure("compile"):
                eval_fn = compilation.compile_eval_step(
                    self.program, self.plan, self.eval_shape, packed=batches.is_packed
                )
            for batch in batches:
                with self.clock.measure("eval"):
                    found = eval_fn(params, self.place(batch, self.eval_shape), self.hyper, self.base)
                    nats_B, targets_B = jax.device_get(found)
                kept = targets_B > 0  # the last batch is filled up
                nats += nats_B[kept].tolist()
                targets += targets_B[kept].tolist()
                self.stop_if_asked(state, step)
        return nats, targets

    def measure_pairs(self, state: TrainState, step: int) -> dict[str, float]:
        """Returns what the metrics say of the pairs that are held out, with the raw parameters.

        Raises:
            Preempted: as in evaluate_if_due.
        """
        pairs = self.batches.held_out
        now = self.token_log_probs(pairs, state.params, functools.partial(self.stop_if_asked, state, step))
        return rewards.figures(pairs, now, self.reference, self.config.loss.name, self.hyper.loss)

    def ask_tasks_if_due(self, state: TrainState, step: int) -> None:
        """Evaluates the tasks that are due, unless their rows are there already.

        What a task cannot do it says in a warning and in the result, and the run goes on.

        Raises:
            Preempted: as in evaluate_if_due.
        """
        done = {name.partition("/")[0] for row in self.rows("task") if row["step"] == step for name in row}
        for task in self.due_tasks(step):
            if task.label not in done:
                self.ask_task(task, state, step)

    def ask_task(self, task: "Scheduled", state: TrainState, step: int) -> None:
        """Evaluates one task, and writes what it came to."""
        scorer = self.scorer(state.ema_params if task.ema else state.params)
        folder = self.task_folder(task, step) if jax.process_index() == 0 else None
        about = {"run": str(self.folder.path), "step": step, "ema": task.ema, "dtype": self.config.model.dtype}
        environment = {"environment": provenance.environment(self.plan)}
        try:
            with self.clock.measure("eval"):
                result = task.evaluate(scorer, folder, about, environment, lambda *_: self.stop_if_asked(state, step))
        except UserError as error:
            log.warning("%s at step %d failed: %s", task.label, step, error)
            self.failed_tasks[task.label] = {"error": str(error)}
            return
        self.writer.write(step, "task", result.to_row(task.label))
        first = result.metrics[0]
        self.progress.line(f"step {step} {task.label} {first.name} {first.value:.4f} of {first.n:,} items")

    def task_folder(self, task: "Scheduled", step: int) -> Path:
        return self.folder.path / "evals" / f"step-{step}" / task.label

    def task_results(self) -> dict[str, Any]:
        """Returns what the tasks came to at the last step, as their result.json has it, or why one did not."""
        steps = self.config.num_steps
        found = {task.label: read_result(self.task_folder(task, steps)) for task in self.tasks}
        return {label: self.failed_tasks.get(label) or result for label, result in found.items()}

    def scorer(self, params: dict) -> "Scorer":
        """Returns what answers the requests of tasks with some parameters of the run."""
        from foundry_jax.tasks.scoring import Scorer  # as in open_source
        from foundry_jax.zoo.pretrained import Pretrained
        from foundry_jax.zoo.run import stop_ids_of

        tokenizer, adapters = self.corpus.tokenizer, None
        if self.program.lora_rank:
            params, adapters = self.base, lora.scaled(params, self.hyper.lora_scale)
        name, stop_ids = str(self.folder.path), stop_ids_of(tokenizer)
        model = Pretrained(name, self.program.model, params, tokenizer, stop_ids, self.plan, adapters)
        return Scorer(model, batch_size=self.config.eval.batch_size)

    def save_if_due(self, state: TrainState, step: int) -> None:
        """Saves if a checkpoint is due, but not between skipped steps.

        Nothing is learned there, and those saves would push out the checkpoint that a roll-back needs.

        Raises:
            Preempted: the run was asked to stop, and has saved.
        """
        self.stop_if_asked(state, step)
        if self.save_is_due(step) and (self.skips == 0 or step == self.last):
            self.save(state, step)
        self.stop_if_asked(state, step)

    def save(self, state: TrainState, step: int) -> None:
        """Saves in the background; validation loss decides which checkpoints are the best."""
        metrics = {"loss": self.evals[step]["loss"]} if step in self.evals else {}
        with self.clock.measure("save"):
            self.checkpointer.save(step, state, metrics=metrics, metadata={"seconds": self.clock.seconds})

    def stop_if_asked(self, state: TrainState, step: int) -> None:
        """Saves and raises Preempted if the run was asked to stop; else notes that it is alive."""
        self.folder.heartbeat(step)
        if self.preemption.requested(step):
            self.save(state, step)
            self.checkpointer.wait()
            raise Preempted(
                f"step {step} of {self.config.num_steps} is saved in {self.folder.path}; run it again to go on."
            )

    def roll_back(self, trouble: TooManySkipsError) -> tuple[TrainState, int]:
        """Returns the newest checkpoint before the trouble, with the data window moved past what caused it.

        Raises:
            DivergedError: that was tried guard.max_rollbacks times already.
        """
        if self.folder.num_rollbacks >= self.config.guard.max_rollbacks:
            raise DivergedError(self.diagnosis(trouble))
        first_bad = trouble.step - self.config.guard.max_skips + 1
        state, step = self.restore_or_init(before=first_bad)
        self.checkpointer.discard_newer(step)
        self.folder.add_data_window(step, self.folder.data_offset(step) + trouble.step - step)
        self.writer.rewind(step)
        self.writer.write(step, "rollback", {"from_step": trouble.step, "rollbacks": self.folder.num_rollbacks})
        self.evals = {eval_step: row for eval_step, row in self.evals.items() if eval_step <= step}
        text = "Steps %d to %d were not finite: back to step %d and on with other data (roll-back %d of %d)."
        numbers = (first_bad, trouble.step, step, self.folder.num_rollbacks, self.config.guard.max_rollbacks)
        log.warning(text, *numbers)
        return state, step

    def diagnosis(self, trouble: TooManySkipsError) -> str:
        """Returns what is known of a run that does not stay finite, and what to try."""
        rows = [row for row in self.rows("train") if math.isfinite(row["loss"])]
        last = (
            f"the last finite loss was {rows[-1]['loss']:.4g} at step {rows[-1]['step']}" if rows else "none was before"
        )
        o, guard, metrics = self.config.optimizer, self.config.guard, trouble.metrics
        return (
            f"{guard.max_skips} steps in a row up to step {trouble.step} were not finite (loss {metrics['loss']:.4g}, "
            f"gradient norm {metrics['grad_norm']:.4g}), after {guard.max_rollbacks} roll-backs to other data; {last}. "
            f"Try a smaller optimizer.learning_rate ({o.learning_rate:g} now), more optimizer.warmup_steps "
            f"({o.warmup_steps}), a smaller optimizer.clip_norm ({o.clip_norm:g}), or model.dtype=float32."
        )

    def result(self) -> dict[str, Any]:
        """Returns what result.json holds of a finished run."""
        steps = self.config.num_steps
        rows = self.rows("train")
        tokens = steps * math.prod(self.batch_shape)
        busy = self.busy_seconds()
        return {
            "status": "done",
            "name": self.config.name,
            "step": steps,
            "validation": {name: value for name, value in self.evals[steps].items() if name not in ("step", "kind")},
            "validation_hash": self.corpus.validation_hash,
            **({"preferences_hash": self.batches.held_out.hash} if self.batches.held_out else {}),
            **({"tasks": self.task_results()} if self.tasks else {}),
            "train_loss": rows[-1]["loss"],
            "noise_scale_tokens": noise_scale(rows, math.prod(self.batch_shape[1:])),
            "skipped_steps": sum(1 for row in rows if row["skips"]),
            "rollbacks": self.folder.num_rollbacks,
            "tokens": tokens,
            "num_params": transformer.num_params(self.config.model),
            "num_active_params": transformer.num_active_params(self.config.model),
            "num_trained_params": forecast.num_trained_params(self.config),
            "train_flops_per_token": forecast.train_flops_per_token(self.config),
            "kv_bytes_per_token": transformer.kv_bytes_per_token(self.config.model),
            "tokens_per_second": tokens / busy,
            "mfu": self.mfu(tokens / busy),
            "seconds": self.clock.seconds,
            "compilations": compilation.counts(),
            **provenance.environment(self.plan),
        }


def validation_metrics(nats: float, count: float, corpus: data.Corpus) -> dict[str, float]:
    """Returns loss (nats per token) and, if the text's size is known, bits_per_byte of a whole validation pass."""
    metrics = {"loss": nats / count}
    if corpus.validation_bytes:
        metrics["bits_per_byte"] = nats / math.log(2) / corpus.validation_bytes
    return metrics


def noise_scale(rows: list[dict[str, Any]], tokens_per_row: int) -> float | None:
    """Returns the gradient noise scale in tokens over the last half of the rows, or None if it was not measured.

    A ratio of averages, as McCandlish et al. 2018 (1812.06162) advise: each estimate alone is very noisy.
    """
    rows = [row for row in rows[len(rows) // 2 :] if math.isfinite(row.get("gradient_signal", math.nan))]
    signal = np.mean([row["gradient_signal"] for row in rows]) if rows else 0.0
    return float(np.mean([row["gradient_noise"] for row in rows]) / signal * tokens_per_row) if signal > 0 else None
