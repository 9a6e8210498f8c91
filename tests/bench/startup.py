"""Seconds from the start of the process to the first finished step of configs/tiny.py, token cache built.

    python tests/bench/startup.py [--repeats 3]

Cold: an empty compilation cache (goal 10 s). Warm: the second run (goal 5 s). Exits 1 if a median misses its goal.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

GOALS = {"cold": 10.0, "warm": 5.0}


def seconds_to_first_step(folder: pathlib.Path, cache: pathlib.Path) -> float:
    """Returns how long a new run takes until metrics.jsonl holds its first step; then ends it."""
    command = [sys.executable, "-m", "foundry_jax.main", "--config=configs/tiny.py", "--config.log.every=1"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    start = time.perf_counter()
    process = subprocess.Popen([*command, f"--workdir={folder}"], env=environment, stderr=subprocess.DEVNULL)
    metrics = folder / "metrics.jsonl"
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                sys.exit(f"the run ended with exit code {process.returncode} before its first step")
            time.sleep(0.01)
        return time.perf_counter() - start
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Prints both medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    seconds = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        seconds_to_first_step(root / "tokens", root / "cache")  # builds the token cache
        for i in range(flags.repeats):
            for name in seconds:  # the cold run of a repeat fills the cache for its warm one
                seconds[name].append(seconds_to_first_step(root / f"{name}{i}", root / f"cache{i}"))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(
            f"startup {name}: {medians[name]:.1f} s (range {min(values):.1f} to {max(values):.1f}); goal {GOALS[name]}"
        )
    sys.exit(any(medians[name] > GOALS[name] for name in GOALS))


if __name__ == "__main__":
    main()
