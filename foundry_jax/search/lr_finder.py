"""A learning-rate range test: one short run whose rate grows exponentially, inside one compiled scan.

Smith 2015, 1506.01186. The rates of the steps are an input of the scan, so the same executable also runs a bracket: a
few whole schedules with different peaks on the same batches, which tells how good the suggestion is.
"""

import dataclasses
import functools
import logging
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from foundry_jax import compilation, data, rewards, sharding, train
from foundry_jax.config import SCHEDULES, Config
from foundry_jax.data_tools import TOOLS
from foundry_jax.errors import UserError
from foundry_jax.model import lora, transformer
from foundry_jax.optimizer import Hyperparameters, hyperparameters, learning_rate_at
from foundry_jax.registry import lookup
from foundry_jax.runfolder import write_json_atomic
from foundry_jax.schema import require
from foundry_jax.search import charts
from foundry_jax.train_step import Program, TrainState, train_step

log = logging.getLogger(__name__)

SMOOTHING = 0.9  # weight of the past in the smoothed loss: it looks back over about 10 steps
DIVERGED = 4.0  # a smoothed loss of so many times the best one ends the test
MIN_STEPS = 20  # fewer say nothing once they are smoothed
BRACKET = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)  # times the suggestion
CHECK_STEPS = 100


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """What the test saw, one entry a step up to where it ended: rates, losses in nats, smoothed losses."""

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    ended: str  # why it ended

    @property
    def finite(self) -> np.ndarray:
        """The steps whose loss was finite: all, or all but the last, which changed nothing and ended the test."""
        return np.isfinite(self.losses)


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A peak learning rate and the rule that it comes from."""

    rate: float
    rule: str


@dataclasses.dataclass(frozen=True)
class Bracket:
    """Short runs with the config's own schedule: {peak rate: mean training loss, in nats, of its last fifth}."""

    num_steps: int
    losses: dict[float, float]  # infinite where a run diverged

    @property
    def best(self) -> float:
        """The rate of the smallest loss."""
        return min(self.losses, key=self.losses.get)


class Finder:
    """A config made ready to run at any rates: its first batches on the devices, its start, and the program."""

    def __init__(self, config: Config, num_steps: int):
        """Prepares the data, places num_steps batches and compiles the scan over them.

        Raises:
            UserError: the config does not fit together, or not the data or the devices; or fewer than MIN_STEPS steps.
        """
        require(num_steps >= MIN_STEPS, f"--steps={num_steps} is too few for a range test; use {MIN_STEPS} or more.")
        transformer.check(config.model)
        if config.lora.rank:
            lora.target_paths(config.model, config.lora.targets)
        self.source = train.open_source(config)
        corpus = data.prepare(config.data, train.tokenizer_of(config, self.source), TOOLS)
        self.config = train.with_vocabulary(config, train.vocab_size_of(config, corpus, self.source))
        self.num_steps, self.program, self.hyper = num_steps, Program.of(self.config), hyperparameters(self.config)
        self.plan = sharding.plan(transformer.num_params(self.config.model), jax.device_count(), config.sharding)
        train.require_even_batches(self.config, self.plan)
        batches = train.batches_of(self.config, corpus).train
        with self.plan.context():
            self.base = self._base()
            self.batches = self._placed([batch for _, batch in batches.iterate(0, num_steps)])
            self._compiled = self._compile()

    def run(self, rates: Sequence[float], *, limit: float = np.inf) -> tuple[np.ndarray, np.ndarray]:
        """Returns (losses, smoothed losses) in nats of the steps that a run from the start took at these rates.

        It ends early with a loss that is not finite, or a smoothed loss over `limit` times its best: that loss is the
        last one returned.
        """
        assert len(rates) <= self.num_steps, (len(rates), self.num_steps)
        padded = np.zeros(self.num_steps, np.float32)
        padded[: len(rates)] = rates
        with self.plan.context():
            start = self._start()
            found = self._compiled(start, self.batches, padded, np.float32(limit), self.hyper, self.base)
        losses, smoothed, taken = jax.device_get(found)
        return losses[taken], smoothed[taken]

    def schedule(self, peak: float, num_steps: int) -> np.ndarray:
        """Returns the rates of the config's schedule, stretched to num_steps, with another peak; the rest in ratio."""
        o, share = self.config.optimizer, num_steps / self.config.num_steps
        low = peak * o.min_learning_rate / o.learning_rate if o.learning_rate else 0.0
        hyper = self.hyper.replace(
            learning_rate=np.float32(peak),
            min_learning_rate=np.float32(low),
            warmup_steps=np.int32(round(o.warmup_steps * share)),
            num_steps=np.int32(num_steps),
        )
        return np.asarray(_schedule(np.arange(num_steps), hyper))

    def _inputs(self) -> compilation.Inputs:
        return compilation.abstract_inputs(self.program, self.plan, self.config.batch_shape)

    def _base(self) -> dict:
        """Returns the parameters under the adapters; {} where all parameters are trained."""
        if not self.program.lora_rank:
            return {}
        if self.source:
            return self._read_source(self._inputs().base)
        return compilation.compile_base(self.program, self.plan)(self.hyper)

    def _start(self) -> TrainState:
        """Returns the state at step 0, made anew: the scan consumes it."""
        if self.source is None or self.program.lora_rank:
            return compilation.compile_init(self.program, self.plan)(self.hyper)
        params = self._read_source(self._inputs().state.params)
        return compilation.compile_start(self.program, self.plan)(params, self.hyper)

    def _read_source(self, wanted: dict) -> dict:
        from foundry_jax.zoo import graft  # what it needs takes time to import, and most configs do not need it

        places, start = jax.tree.map(lambda x: x.sharding, wanted), self.config.init
        return graft.start(self.source, self.config.model, places, fresh=start.fresh, seed=self.config.seed)

    def _placed(self, batches: list[dict]) -> dict[str, jax.Array]:
        """Returns the batches on the devices as [steps, ...]; each lies as it would alone."""
        if self.program.learns_from_pairs:
            batches = self._with_reference(batches)
        one = self.plan.batch_sharding()
        many = jax.sharding.NamedSharding(one.mesh, jax.sharding.PartitionSpec(None, *one.spec))
        return {name: jax.device_put(np.stack([batch[name] for batch in batches]), many) for name in batches[0]}

    def _with_reference(self, batches: list[dict]) -> list[dict]:
        """Returns the batches of pairs with what the parameters at the start say of them."""
        ask = rewards.compile_answers_step(self.program, self.plan, self.config.batch_shape)
        params, where = self._start().params, self.plan.batch_sharding()
        answers = [ask(params, jax.device_put(batch, where), self.hyper, self.base).completions for batch in batches]
        return [batch | {"reference": np.asarray(answer)} for batch, answer in zip(batches, answers, strict=True)]

    def _compile(self) -> Callable:
        inputs = self._inputs()
        batches = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.batches)
        rates, limit = jax.ShapeDtypeStruct((self.num_steps,), np.float32), jax.ShapeDtypeStruct((), np.float32)
        run = jax.jit(functools.partial(scan, self.program))
        lowered = run.lower(inputs.state, batches, rates, limit, inputs.hyper, inputs.base)
        return lowered.compile(compilation.CPU_OPTIONS if jax.default_backend() == "cpu" else None)


@jax.jit
def _schedule(steps: jax.Array, hyper: Hyperparameters) -> jax.Array:
    return jax.vmap(learning_rate_at, in_axes=(0, None))(steps, hyper)


def scan(
    program: Program,
    state: TrainState,
    batches: dict,
    rates: jax.Array,
    limit: jax.Array,
    hyper: Hyperparameters,
    base: dict,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (losses, bias-corrected moving averages of them, whether the step was taken), each [steps].

    After a loss that is not finite, an average above `limit` times its best, or a rate of 0, no step is taken: a lost
    cause costs no time.
    """
    constant = np.int32(list(SCHEDULES).index("constant"))
    hyper = hyper.replace(schedule=constant, warmup_steps=np.int32(0))

    def take(carry, batch, rate, index):
        state, total, best, _ = carry
        state, metrics = train_step(program, state, batch, hyper.replace(learning_rate=rate), base)
        loss = metrics["loss"].astype(jnp.float32)
        total = SMOOTHING * total + (1 - SMOOTHING) * loss
        smoothed = total / (1 - SMOOTHING ** (index + 1.0))
        over = ~(jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"]) & (smoothed <= limit * best))
        return (state, total, jnp.minimum(best, smoothed), over), (loss, smoothed, jnp.array(True))

    def rest(carry, *_):
        *carry, _ = carry
        nan = jnp.float32(jnp.nan)
        return (*carry, jnp.array(True)), (nan, nan, jnp.array(False))

    def body(carry, inputs):
        _, rate, _ = inputs
        return jax.lax.cond(carry[-1] | (rate <= 0), rest, take, carry, *inputs)

    carry = (state, jnp.float32(0), jnp.float32(jnp.inf), jnp.array(False))
    _, seen = jax.lax.scan(body, carry, (batches, rates, jnp.arange(len(rates), dtype=jnp.float32)))
    return seen


def range_test(finder: Finder, low: float, high: float) -> RangeTest:
    """Returns the losses at finder.num_steps rates from low to high, evenly spaced by ratio.

    Raises:
        UserError: the test ended before anything could be seen.
    """
    rates = np.geomspace(low, high, finder.num_steps)
    losses, smoothed = finder.run(rates, limit=DIVERGED)
    taken = len(losses)
    require(taken >= MIN_STEPS, f"The loss diverged after {taken} steps from a rate of {low:g}; use a smaller --min.")
    if not np.isfinite(losses[-1]):
        ended = f"the loss was not finite at a rate of {rates[taken - 1]:.2g}: that step changed nothing"
    elif smoothed[-1] > DIVERGED * np.min(smoothed):
        ended = f"the smoothed loss was over {DIVERGED:g} times its best at a rate of {rates[taken - 1]:.2g}"
    else:
        ended = f"all {taken} steps were taken"
    return RangeTest(rates[:taken], losses, smoothed, ended)


# Rules


def two_thirds(rates: np.ndarray, smoothed: np.ndarray) -> float:
    """Returns the first rate by which the smoothed loss has made two thirds of its fall to its smallest value."""
    start, lowest = smoothed[: _head(smoothed)].mean(), smoothed.min()
    return float(rates[np.argmax(smoothed <= start - 2 / 3 * (start - lowest))])


def steepest(rates: np.ndarray, smoothed: np.ndarray) -> float:
    """Returns the rate at which the smoothed loss falls fastest per decade; Howard & Gugger 2020, 2002.04688."""
    return float(rates[np.argmin(np.gradient(smoothed, np.log(rates)))])


def minimum_tenth(rates: np.ndarray, smoothed: np.ndarray) -> float:
    """Returns a tenth of the rate of the smallest smoothed loss; Howard & Gugger 2020, 2002.04688."""
    return float(rates[np.argmin(smoothed)] / 10)


# With AdamW and clipping the loss does not explode at too large a rate, it stays on a plateau: where on it the minimum
# or a steep step lies is chance; how high it is, is not. Distance to the best of a bracket of 7 rates x 100 steps over
# 12 configs around smoke and tiny (AdamW, Lion, MLA, MoE, widths 16 to 128, batches of 2 to 16 sequences), in octaves,
# mean and largest: 0.5 and 2.3 by two thirds, 1.8 and 6.1 by the steepest descent, 1.0 and 3.8 by a tenth of the
# minimum; of other shares, a half 1.2 and 3.1, 0.8 0.7 and 1.8 but more nats behind (2026-11).
RULES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "two thirds of the fall": two_thirds,
    "steepest descent": steepest,
    "a tenth of the minimum": minimum_tenth,
}
RULE = "two thirds of the fall"


def suggest(test: RangeTest, rule: str = RULE) -> Suggestion:
    """Returns the peak learning rate that a rule of RULES suggests.

    Raises:
        UserError: an unknown rule, or a loss that fell by no more than its noise.
    """
    found = lookup(RULES, rule, "rule")
    smoothed, losses = test.smoothed[test.finite], test.losses[test.finite]
    head = losses[: _head(losses)]
    fall = smoothed[: len(head)].mean() - smoothed.min()
    noise = head.std() * math.sqrt((1 - SMOOTHING) / (1 + SMOOTHING))  # of the smoothed loss
    require(
        fall > 5 * noise,
        f"The loss fell by {fall:.3g} nats, and its noise is {noise:.3g}: no rate from {test.rates[0]:.2g} to "
        f"{test.rates[-1]:.2g} helps. Use a larger --max, more --steps or a larger data.batch_size.",
    )
    return Suggestion(found(test.rates[test.finite], smoothed), rule)


def _head(values: np.ndarray) -> int:
    """Returns how many of the first steps tell where the loss began: their rates are too small to change it."""
    return max(2, len(values) // 20)


# Bracket


def bracket(finder: Finder, middle: float) -> Bracket:
    """Returns what short runs with the config's own schedule come to, at peak rates around one."""
    steps = min(CHECK_STEPS, finder.num_steps)
    found = {}
    for factor in BRACKET:
        losses, _ = finder.run(finder.schedule(middle * factor, steps))
        whole = len(losses) == steps and np.isfinite(losses[-1])
        found[middle * factor] = float(losses[-(steps // 5) :].mean()) if whole else math.inf
    return Bracket(steps, found)


def to_json(test: RangeTest, suggestion: Suggestion, config: Config, check: Bracket | None) -> dict[str, Any]:
    """Returns all that was found, as it is written to lr_finder.json."""
    finite = test.finite
    return {
        "suggestion": {"learning_rate": suggestion.rate, "rule": suggestion.rule},
        "config": {"learning_rate": config.optimizer.learning_rate},
        "rules": {name: rule(test.rates[finite], test.smoothed[finite]) for name, rule in RULES.items()},
        "ended": test.ended,
        "rates": test.rates.tolist(),
        "losses": test.losses.tolist(),
        "smoothed": test.smoothed.tolist(),
        "check": check and {
            "steps": check.num_steps,
            "losses": {f"{rate:.6g}": loss for rate, loss in check.losses.items()},
            "best": check.best,
            "factor": suggestion.rate / check.best,
            "behind": check.losses[suggestion.rate] - check.losses[check.best],
        },
    }  # fmt: skip


def find(config: Config, *, low: float, high: float, num_steps: int, check: bool) -> dict[str, Any]:
    """Returns a suggestion for a config and all that it rests on, as to_json has it.

    Raises:
        UserError: what Finder, range_test and suggest refuse.
    """
    require(0 < low < high, f"--min={low:g} and --max={high:g} must be positive, and --min the smaller one.")
    finder = Finder(config, num_steps)
    test = range_test(finder, low, high)
    suggestion = suggest(test)
    log.info("%s; suggested %.2g.", test.ended, suggestion.rate)
    return to_json(test, suggestion, config, bracket(finder, suggestion.rate) if check else None)


def write(found: Mapping[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes lr_finder.json and lr_finder.png into a folder, made if need be, and returns their paths.

    Raises:
        UserError: it cannot be written to.
    """
    paths = [folder / "lr_finder.json", folder / "lr_finder.png"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(paths[0], found)
        paths[1].write_bytes(charts.range_test(found).png())
    except OSError as error:
        raise UserError(f"Cannot write to {folder}: {error.strerror}; use another --out.") from error
    return paths
