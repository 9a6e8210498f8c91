"""Crash safety: kill -9 at random moments, restart, and compare every number with a run left alone.

    python tests/bench/crash_safety.py [--kills 20] [--seed 0] [--config configs/smoke.py] [--config.data.path=...]

Prints one line such as

    20 kills (7 with a checkpoint half written), 220 rows and 84 arrays compared bit for bit: 0 mismatches

and exits with 1 if there is a mismatch. A run has 10 steps for each kill unless --config.num_steps says otherwise.
20 kills took 4 minutes on 2 busy CPU cores (2026-11).
"""

import argparse
import itertools
import pathlib
import random
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from foundry_jax import command, config  # noqa: E402
from tests import processes  # noqa: E402
from tests.processes import Child  # noqa: E402

STEPS_PER_KILL = 10
MOMENTS = ("start", "step", "save", "seal", "eval")


def main() -> None:
    """The command."""
    flags, overrides = parse_arguments()
    overrides = [f"num_steps={STEPS_PER_KILL * flags.kills}", *overrides]  # of two values the later one counts
    eval_every = config.load(flags.config, overrides).eval.every
    with tempfile.TemporaryDirectory(prefix="crash-safety-") as folder:
        reference, victim = pathlib.Path(folder) / "reference", pathlib.Path(folder) / "victim"
        start_seconds = run_undisturbed(reference, flags.config, overrides)
        rng = random.Random(flags.seed)
        kills = half_written = 0
        for moment in itertools.islice(shuffled_moments(rng), flags.kills):
            with processes.start(victim, overrides, config=flags.config) as child:
                if not wait_for(moment, child, rng, start_seconds=start_seconds, eval_every=eval_every):
                    break  # it came to its end
                child.process.kill()
                child.wait()
            kills += 1
            half_written += bool(unfinished(child))
            print(f"kill {kills}: {moment}, after step {max(child.steps(), default='-')}", file=sys.stderr)
        last = processes.finish(victim, overrides, config=flags.config)
        comparison = processes.compare(reference, victim)
    for line in comparison.mismatches:
        print(line, file=sys.stderr)
    print(
        f"{kills} kills ({half_written} with a checkpoint half written), {comparison.num_rows} rows and "
        f"{comparison.num_arrays} arrays compared bit for bit: {len(comparison.mismatches)} mismatches"
    )
    if kills < flags.kills:
        sys.exit(f"The run was done before {flags.kills} kills (exit code {last.wait()}); raise --config.num_steps.")
    sys.exit(bool(comparison.mismatches))


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags and the overrides of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--config", default=str(processes.SMOKE), help="with :mutations, as for foundry_jax.main")
    return command.parse(parser)


def run_undisturbed(workdir: pathlib.Path, config_file: str, overrides: list[str]) -> float:
    """Trains the reference and returns the seconds until its first step."""
    began = time.monotonic()
    with processes.start(workdir, overrides, config=config_file) as child:
        child.wait_until(lambda: bool(child.steps()))
        seconds = time.monotonic() - began
        if child.wait() != 0:
            sys.exit(child.stderr)
    return seconds


def shuffled_moments(rng: random.Random):
    """Yields all MOMENTS in random order, again and again."""
    while True:
        yield from rng.sample(MOMENTS, len(MOMENTS))


def wait_for(moment: str, child: Child, rng: random.Random, *, start_seconds: float, eval_every: int) -> bool:
    """Waits for a random instance of the moment; returns False if the run ended first."""
    if moment == "start":  # imports, restoring, compiling
        began, delay = time.monotonic(), rng.uniform(0, start_seconds)
        return child.wait_until(lambda: time.monotonic() - began > delay)
    num_steps = rng.randint(1, 8)
    conditions = {
        "step": lambda: len(child.steps()) >= num_steps,
        "save": lambda: bool(child.steps()) and bool(unfinished(child)),
        "seal": lambda: bool(child.steps()) and has_unsealed(child),
        "eval": lambda: bool(child.steps()) and child.steps()[-1] % eval_every == 0,
    }
    longest_delay = {"step": 0.02, "save": 0.01, "seal": 0.0, "eval": 0.05}[moment]
    if not child.wait_until(conditions[moment], poll_seconds=0.0005):
        return False
    time.sleep(rng.uniform(0, longest_delay))
    return child.process.poll() is None


def unfinished(child: Child) -> list[pathlib.Path]:
    """Returns the folders of saves that are not committed."""
    return [path for path in child.checkpoints.glob("*tmp*") if path.is_dir()]


def has_unsealed(child: Child) -> bool:
    """Returns whether a committed step waits for its seal."""
    steps = [path for path in child.checkpoints.glob("*") if path.name.isdigit()]
    return any(not (path / "SEAL.json").exists() for path in steps)


if __name__ == "__main__":
    main()
