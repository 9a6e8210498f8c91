"""How often a sweep promotes a contestant that is not better, and how often one that is: real runs, real verdicts.

    python tests/bench/null_and_power.py [--sweeps 200] [--power-sweeps 50] [--quick]

Null: incumbent and contestant have the same config, and only their seeds differ, so every promotion is wrong. Power:
the contestant's learning rate is known to be better, and both have the same seeds. Every sweep goes through the
functions of a real one (measuring.evidence, verdict.judge, decision.choose), from run folders, at the default settings;
one program trains all runs, and is checked against train.run. Prints Markdown tables. Exits 1 if more than
5 % of the null sweeps promote, or fewer than 80 % of those with a learning rate twice too small find the better one.
5,200 runs took 19 minutes on 2 cores that 8 processes shared (2026-11).
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from scipy import stats

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from foundry_jax import compilation, config, data, train  # noqa: E402
from foundry_jax.config import Config, to_flat_dict  # noqa: E402
from foundry_jax.optimizer import hyperparameters  # noqa: E402
from foundry_jax.runfolder import write_json_atomic  # noqa: E402
from foundry_jax.search import decision, measuring, verdict  # noqa: E402
from foundry_jax.train_step import Program, eval_step, init_state, train_step, unbox  # noqa: E402

# Byte tokens and 14 kB of the text to validate on: a fifth of a second a run (2 busy cores).
SETTINGS = (
    "num_steps=60", "data.validation=document(0.004)", "eval.every=60", "checkpoint.every=60",
    "optimizer.warmup_steps=6", "optimizer.learning_rate=7e-3", "optimizer.min_learning_rate=7e-4", "log.every=60",
)  # fmt: skip
QUICK = ("num_steps=8", "eval.every=8", "checkpoint.every=8")
MEMBERS = 16  # runs in one call of the program, one after another: 0.12 CPU seconds a run, with vmap 0.14 (2026-11)
METRIC = measuring.metric_of("bits_per_byte")
ALPHA, SEEDS, MOST_SEEDS, CONTESTANTS = 0.05, 3, 8, 3
FACTORS = (1.1, 1.25, 1.5, 2.0)  # by how much the incumbent's learning rate is too small
PLANTED = 2.0  # that of the bar
FIRST_POWER_SEED = 500_000  # none of the null runs' seeds
AGREEMENT = 1e-3  # bits per byte: the programs differ in the order of sums

Folders = Sequence[pathlib.Path]


# ------------------------------------------------------------------------------------------------ runs


class Population:
    """Trains runs of one program, many at a time, and keeps of each what a run folder has at its end."""

    def __init__(self, settings: Config, folder: pathlib.Path):
        self.corpus = data.prepare(settings.data, None)
        self.settings = train.with_vocabulary(settings, self.corpus.vocab_size)
        self.folder = folder
        sizes = {"batch_size": settings.eval.batch_size, "context_length": settings.model.context_length}
        (batches,) = data.validation(self.corpus, **sizes)
        validation = jax.tree.map(lambda *x: np.stack(x), *batches)
        one = functools.partial(_run, Program.of(self.settings), validation)
        self.program = jax.jit(lambda hyper, batches: jax.lax.map(lambda x: one(*x), (hyper, batches)))
        self.targets = validation["weights"].sum(-1).ravel()
        self.seconds = 0.0

    def train(self, changes: Iterable[dict]) -> list[pathlib.Path]:
        """Returns the folders of the runs with some fields changed: seed and learning_rate."""
        configs = [changed(self.settings, **change) for change in changes]
        folders = []
        for i in range(0, len(configs), MEMBERS):
            part = configs[i : i + MEMBERS]
            padded = part + part[:1] * (MEMBERS - len(part))  # one shape, one program
            start = time.perf_counter()
            nats = np.asarray(self.program(*jax.tree.map(lambda *x: np.stack(x), *map(self.inputs, padded))))
            self.seconds += time.perf_counter() - start
            folders += [self.keep(one, nats[j]) for j, one in enumerate(part)]
        return folders

    def inputs(self, settings: Config) -> tuple:
        """Returns the hyperparameters of a run and all its batches, [steps, B, L]."""
        steps, size, length = settings.num_steps, settings.data.batch_size, settings.model.context_length
        # The order of windows does not depend on the size of a batch, so one large batch is all of them.
        all_at_once = dataclasses.replace(settings.data, batch_size=steps * size)
        batches = data.training(self.corpus, all_at_once, context_length=length, num_steps=steps, seed=settings.seed)
        return hyperparameters(settings), {name: x.reshape(steps, size, length) for name, x in batches.batch(0).items()}

    def keep(self, settings: Config, nats: np.ndarray) -> pathlib.Path:
        """Returns the folder of a run, written as train.run would, as far as a verdict reads it."""
        folder = self.folder / f"lr-{settings.optimizer.learning_rate:g}" / f"seed-{settings.seed}"
        folder.mkdir(parents=True)
        blocks = {"nats": nats, "targets": self.targets, "bytes": self.corpus.validation_bytes}
        values = train.validation_metrics(float(nats.sum()), float(self.targets.sum()), self.corpus)
        result = {"step": settings.num_steps, "validation": values, "validation_hash": self.corpus.validation_hash}
        blocks |= {name: blocks[name].tolist() for name in ("nats", "targets")}
        for name, value in {"config": to_flat_dict(settings), "validation_blocks": blocks, "result": result}.items():
            write_json_atomic(folder / f"{name}.json", value, durable=False)
        return folder


def _run(program: Program, validation: dict, hyper, batches):
    """Returns the nats of each validation sequence after a run, [n]."""
    step = lambda state, batch: (train_step(program, state, batch, hyper, {})[0], None)  # noqa: E731
    state, _ = jax.lax.scan(step, unbox(init_state(program, hyper)), batches)
    return jax.lax.map(lambda batch: eval_step(program, state.params, batch, hyper, {})[0], validation).ravel()


def changed(settings: Config, *, seed: int, learning_rate: float | None = None) -> Config:
    """Returns a config with another seed and rate; the least rate keeps its share."""
    o = settings.optimizer
    rate = learning_rate or o.learning_rate
    o = dataclasses.replace(o, learning_rate=rate, min_learning_rate=o.min_learning_rate * rate / o.learning_rate)
    return dataclasses.replace(settings, seed=seed, optimizer=o)


def value(folder: pathlib.Path) -> float:
    """Returns the bits per byte of a run."""
    return measuring.measure(folder, METRIC).value


# ------------------------------------------------------------------------------------------------ decisions


def promotes(incumbent: Folders, contestants: Sequence[Folders], *, first=SEEDS, min_effect=METRIC.default_min_effect):
    """Returns whether a sweep promotes anybody, that looks after `first` seeds and after one more while undecided."""
    verdicts: dict[str, verdict.Verdict] = {}
    for n in range(first, len(incumbent) + 1):
        found = {
            str(i): measuring.evidence(dict(enumerate(incumbent[:n])), dict(enumerate(runs[:n])), METRIC)
            for i, runs in enumerate(contestants)
        }
        look = verdict.Look(n, first, len(incumbent))
        verdicts = verdict.settle(verdicts, verdict.judge(found, alpha=ALPHA, min_effect=min_effect, look=look))
        if all(one.is_decided for one in verdicts.values()):
            break
    return decision.choose(verdicts, {}, METRIC.unit).best is not None


def best_run(incumbent: Folders, contestants: Sequence[Folders]) -> bool:
    """Returns whether the best of all the contestants' runs beats the incumbent's first one."""
    return min(value(run) for runs in contestants for run in runs) < value(incumbent[0])


def first_run(incumbent: Folders, contestants: Sequence[Folders]) -> bool:
    """Returns whether the first run of any contestant beats the incumbent's first one."""
    return best_run(incumbent, [runs[:1] for runs in contestants])


def better_mean(incumbent: Folders, contestants: Sequence[Folders]) -> bool:
    """Returns whether the mean of any contestant's runs is better, by the smallest effect worth having."""
    means = [np.mean([value(run) for run in runs]) for runs in (incumbent, *contestants)]
    return min(means[1:]) <= means[0] - METRIC.default_min_effect


def sweeps_of(runs: Folders, contestants: int, seeds: int, most: int) -> list[tuple[Folders, list[Folders]]]:
    """Returns (incumbent, contestants) of as many sweeps as the runs suffice for; no two share a run."""
    arms = [runs[i : i + seeds] for i in range(0, len(runs) - seeds + 1, seeds)]
    groups = [arms[i : i + 1 + contestants] for i in range(0, len(arms) - contestants, 1 + contestants)]
    return [(group[0], group[1:]) for group in groups[:most]]


def row(name: str, sweeps: list, rule: Callable[..., bool]) -> tuple[str, int, int]:
    """Returns (rule, promotions, sweeps)."""
    return name, sum(rule(*sweep) for sweep in sweeps), len(sweeps)


def line(name: str, promoted: int, n: int) -> str:
    """Returns a line of the table; the interval is that of Clopper and Pearson."""
    low, high = stats.binomtest(promoted, n).proportion_ci(0.95)
    return f"| {name} | {promoted} of {n} | {100 * promoted / n:.1f} % | {100 * low:.1f} to {100 * high:.1f} % |"


# ------------------------------------------------------------------------------------------------ the two bars


def null(runs: Folders, most: int) -> list[tuple[str, int, int]]:
    """Returns what each rule promotes where nobody is better; the first row is the bar."""
    three, many = sweeps_of(runs, 1, SEEDS, most), sweeps_of(runs, CONTESTANTS, SEEDS, most)
    eight = sweeps_of(runs, 1, MOST_SEEDS, most)
    zero = functools.partial(promotes, min_effect=0.0)
    return [
        row(f"the sweep's verdict, {SEEDS} seeds", three, promotes),
        row("the same, min_effect 0", three, zero),
        row(f"the sweep's verdict, {SEEDS} to {MOST_SEEDS} seeds", eight, promotes),
        row("the same, min_effect 0", eight, zero),
        row(f"the sweep's verdict, {CONTESTANTS} contestants", many, promotes),
        row("the same, min_effect 0", many, zero),
        row("one run each", three, first_run),
        row(f"best of {SEEDS} runs against one", three, best_run),
        row(f"best of {CONTESTANTS} contestants, one run each", many, first_run),
        row(f"best of {CONTESTANTS} contestants with {SEEDS} runs against one", many, best_run),
        row(f"mean of {SEEDS} seeds, {METRIC.default_min_effect:g} better", three, better_mean),
    ]


def power(population: Population, num_sweeps: int) -> list[tuple[float, str, float]]:
    """Returns (factor, line of the table, share of sweeps with 3 seeds that promote) for rates that are too small."""
    seeds = range(FIRST_POWER_SEED, FIRST_POWER_SEED + num_sweeps * MOST_SEEDS)
    best = population.settings.optimizer.learning_rate
    better = population.train({"seed": seed} for seed in seeds)
    found = []
    for factor in FACTORS:
        worse = population.train({"seed": seed, "learning_rate": best / factor} for seed in seeds)
        gains = np.array([value(a) - value(b) for a, b in zip(worse, better, strict=True)])
        promoted = [paired(worse, better, seeds) for seeds in (SEEDS, MOST_SEEDS)]
        counts = " | ".join(f"{count} of {num_sweeps}" for count in promoted)
        rates = f"{best / factor:.3g} against {best:.3g}"
        shown = f"| {rates} | {gains.mean():.4f} | {gains.std(ddof=1):.4f} | {counts} |"
        found.append((factor, shown, promoted[0] / num_sweeps))
    return found


def paired(worse: Folders, better: Folders, seeds: int) -> int:
    """Returns how many sweeps promote that have 3 seeds, and may go on to `seeds`."""
    starts = range(0, len(worse), MOST_SEEDS)
    return sum(promotes(worse[i : i + seeds], [better[i : i + seeds]]) for i in starts)


def noise(runs: Folders) -> str:
    """Returns one line on how much runs differ that differ in their seeds only."""
    half = len(runs) // 2
    pairs = [
        [measuring.measure(run, METRIC) for run in pair]
        for pair in zip(runs[:half], runs[half : 2 * half], strict=True)
    ]
    gains = [a.value - b.value for a, b in pairs]
    spread = np.std([one.value for pair in pairs for one in pair], ddof=1)
    sequences = np.mean([neighbours(a.units - b.units) for a, b in pairs])
    found = [
        measuring.evidence({0: a}, {0: b}, METRIC).units
        for a, b in zip(runs[:half], runs[half : 2 * half], strict=True)
    ]
    groups, mean = np.mean([neighbours(units) for units in found]), np.mean([a.value for a, _ in pairs])
    return (
        f"{len(runs)} runs of {mean:.3f} bits per byte; standard deviation {spread:.4f}, of differences "
        f"{np.std(gains, ddof=1):.4f}. Differences of neighbouring sequences correlate by {sequences:.2f}, of "
        f"neighbouring groups by {groups:.2f}."
    )


def neighbours(x: np.ndarray) -> float:
    """Returns the correlation of [n] numbers with those that follow them."""
    return np.corrcoef(x[:-1], x[1:])[0, 1]


def require_agreement(population: Population, run: pathlib.Path, folder: pathlib.Path) -> str:
    """Returns how well a run agrees with train.run; exits if it does not."""
    seed = int(run.name.removeprefix("seed-"))
    alone = train.run(changed(population.settings, seed=seed), folder, quiet=True)["validation"]["bits_per_byte"]
    if not abs(alone - value(run)) < AGREEMENT:
        sys.exit(f"seed {seed} has {value(run):.5f} bits per byte here, and {alone:.5f} when trained by train.run")
    return f"Seed {seed} trained by train.run: {alone:.5f} bits per byte, here {value(run):.5f}."


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweeps", type=int, default=200, help="null sweeps")
    parser.add_argument("--power-sweeps", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="a few sweeps of a few steps, to see that it works")
    flags = parser.parse_args()
    num_null, num_power = (4, 2) if flags.quick else (flags.sweeps, flags.power_sweeps)
    compilation.enable_cache()
    with tempfile.TemporaryDirectory(prefix="null-and-power-") as text:
        folder = pathlib.Path(text)
        settings = config.load(str(ROOT / "configs/smoke.py"), [*SETTINGS, *(QUICK if flags.quick else ())])
        population = Population(settings, folder / "runs")
        runs = population.train({"seed": seed} for seed in range(2 * MOST_SEEDS * num_null))
        print(f"{noise(runs)} {population.seconds / len(runs):.2f} s a run.")
        print(require_agreement(population, runs[0], folder / "alone"))
        rows = null(runs, num_null)
        print("\n| nobody is better: rule | promotions | share | 95 % interval |\n| --- | --- | --- | --- |")
        print("\n".join(line(*one) for one in rows))
        found = power(population, num_power)
        print(f"\n| learning rates | gain, bits per byte | its deviation | {SEEDS} seeds | {SEEDS} to {MOST_SEEDS} |")
        print("| --- | --- | --- | --- | --- |")
        print("\n".join(shown for _, shown, _ in found))
    wrong, n = rows[0][1:]
    right = next(share for factor, _, share in found if factor == PLANTED)
    print(f"\nwrong promotions {100 * wrong / n:.1f} % (goal: 5 at most), right ones {100 * right:.0f} % (goal: 80)")
    sys.exit(not flags.quick and (wrong > 0.05 * n or right < 0.8))


if __name__ == "__main__":
    main()
