"""Training many runs: 24 in one process against one alone, and the ways to train several at once.

    python tests/bench/population_speed.py [--steps 300] [--members 3]

First it times a step of some runs of configs/tiny.py one after the other, in one vmapped program and in one program
that loops over them. Then eight learning rates x three seeds are trained as one job. The goals: exactly one training
compilation, and in all, from the start of the process with an empty compilation cache to its end, at most 1.1 times
24 x what a run takes by itself in a process that has trained one before (the mean of one such run before the job and
one after it). The token cache is built already. Exits 1 if a goal is missed. With 300 steps it takes half an hour.
"""

import argparse
import contextlib
import itertools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from foundry_jax import command, compilation, config, sharding, train
from foundry_jax.optimizer import hyperparameters
from foundry_jax.search.jobs import Job, Run, read_status
from foundry_jax.search.runner import run_jobs
from foundry_jax.train_step import Program, train_step

CONFIG, VOCAB_SIZE = "configs/tiny.py", 2048
RATES = [3e-3 * 2**exponent for exponent in range(-4, 4)]
SEEDS = range(3)
TIMED_STEPS = 10
GOAL = 1.1


def settings(steps: int, seed: int, rate: float) -> config.Config:
    """Returns the config of one run."""
    return config.load(CONFIG, [f"num_steps={steps}", f"seed={seed}", f"optimizer.learning_rate={rate}"])


def seconds_by_way(size: int) -> dict[str, float]:
    """Returns {way: median seconds of a step of one of so many runs}; the ways take turns."""
    members = [train.with_vocabulary(settings(300, seed, 3e-3), VOCAB_SIZE) for seed in range(size)]
    program, shape = Program.of(members[0]), members[0].batch_shape
    plan = sharding.plan(1, 1, members[0].sharding)
    hyper = [hyperparameters(member) for member in members]
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (size, 2, *shape)).astype(np.int32)
    batches = [{"inputs": x, "targets": y, "weights": np.ones(shape, np.float32)} for x, y in tokens]
    one_by_one = [compilation.compile_init(program, plan)(each) for each in hyper]
    vmapped = stacked(one_by_one)
    looped = jax.tree.map(jnp.copy, vmapped)
    batch, all_hyper = stacked(batches), stacked(hyper)
    alone = compilation.compile_train_step(program, plan, shape)
    at_once = compilation.compile_population_step(program, plan, shape, size)
    in_turn = jax.jit(lambda *many: jax.lax.map(lambda one: train_step(program, *one, {}), many), donate_argnums=0)
    in_turn = in_turn.lower(looped, batch, all_hyper).compile(compilation._options())
    seconds = {"serial": [], "vmap": [], "loop": []}
    for _ in range(TIMED_STEPS + 1):
        with timed(seconds["serial"]):
            for i in range(size):
                one_by_one[i], metrics = alone(one_by_one[i], batches[i], hyper[i], {})
                jax.block_until_ready(metrics)
        with timed(seconds["vmap"]):
            vmapped, metrics = at_once(vmapped, batch, all_hyper, {})
            jax.block_until_ready(metrics)
        with timed(seconds["loop"]):
            looped, metrics = in_turn(looped, batch, all_hyper)
            jax.block_until_ready(metrics)
    return {way: statistics.median(each[1:]) / size for way, each in seconds.items()}  # the first warms up


def stacked(trees: list):
    """Returns one tree of many, with a new first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@contextlib.contextmanager
def timed(seconds: list[float]):
    """Adds the seconds spent inside."""
    start = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - start)


def seconds_of_a_run(steps: int, folder: pathlib.Path) -> float:
    """Returns how long train.run takes in a process that has trained a run before and does nothing else."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, __file__, f"--steps={steps}", f"--alone={folder}"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def train_alone(steps: int, folder: pathlib.Path) -> None:
    """Trains two runs and prints the seconds of the second."""
    compilation.enable_cache()
    for seed in SEEDS[:2]:
        start = time.perf_counter()
        train.run(settings(steps, seed, RATES[0]), folder / f"alone-{seed}", quiet=True)
    print(time.perf_counter() - start)


def train_all(steps: int, folder: pathlib.Path) -> tuple[float, dict]:
    """Returns the seconds of all runs as one job, its process included, and what it says of itself."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
    flat = [config.to_flat_dict(settings(steps, seed, rate)) for seed, rate in itertools.product(SEEDS, RATES)]
    job = Job("all", tuple(Run(folder / "runs" / str(i), values) for i, values in enumerate(flat)))
    start = time.perf_counter()
    outcome = run_jobs([job], slots=1, folder=folder / "jobs", patience=600, tell=show)["all"]
    seconds = time.perf_counter() - start
    if outcome.status != "done" or {state.status for state in outcome.runs.values()} != {"done"}:
        sys.exit(f"not all runs are done: {outcome}")
    return seconds, read_status(folder / "jobs" / "all")


def show(event: dict) -> None:
    """Prints what is said of whole runs."""
    if event["event"] != "step":
        print(event["text"], file=sys.stderr, flush=True)


def main() -> None:
    """Prints a line on the ways, and one on the job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--members", type=int, default=3, help="runs that are trained at once to time the ways")
    parser.add_argument("--alone", type=pathlib.Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.alone:
        train_alone(flags.steps, flags.alone)
        return
    ways = ", ".join(f"{way} {seconds:.3f} s" for way, seconds in seconds_by_way(flags.members).items())
    print(f"ways: {ways} for each step of each of {flags.members} runs", flush=True)
    jax.clear_caches()
    with tempfile.TemporaryDirectory(prefix="population-speed-") as folder:
        folders = {name: pathlib.Path(folder) / name for name in ("before", "job", "after")}
        single = [seconds_of_a_run(flags.steps, folders["before"])]
        total, status = train_all(flags.steps, folders["job"])
        single.append(seconds_of_a_run(flags.steps, folders["after"]))
    runs, compiled = len(RATES) * len(SEEDS), status["compilations"]["train_steps"]
    ratio = total / (runs * statistics.mean(single))
    within = sorted(status["run_seconds"].values())
    spread = f"{statistics.median(within):.1f}, from {within[0]:.1f} to {within[-1]:.1f}"
    print(
        f"population: {runs} runs of {flags.steps} steps in {total:.0f} s, {ratio:.3f} of {runs} x the seconds of one "
        f"alone ({single[0]:.1f} before and {single[1]:.1f} after; within the job {spread}), "
        f"{compiled} training compilation(s); goal {GOAL} and 1"
    )
    sys.exit(ratio > GOAL or compiled != 1)


if __name__ == "__main__":
    command.restart_with_huge_pages()
    main()
