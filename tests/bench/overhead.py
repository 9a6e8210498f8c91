"""Time spent waiting for data, logging and saving, as shares of the time of a step; from a run's own result.json.

    python tests/bench/overhead.py

configs/tiny.py is trained whole (goal: each under 5 %). Of configs/baseline.py four steps are trained, with one
checkpoint, whose time is shared among the 100 steps between two (goal: each under 2 %). Exits 1 if a share is larger.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

CASES = {
    # config: (overrides, steps per checkpoint as they are trained, and as they are in earnest, goal)
    "configs/tiny.py": (["checkpoint.every=100", "eval.every=300"], 100, 100, 0.05),
    "configs/baseline.py": (
        ["num_steps=4", "checkpoint.every=2", "data.validation=document(0.01)", "log.every=1"],
        2,
        100,
        0.02,
    ),
}


def measure(config: str, folder: pathlib.Path) -> bool:
    """Trains a config, prints its shares, and returns whether they meet the goal."""
    overrides, trained_every, every, goal = CASES[config]
    command = [sys.executable, "-m", "foundry_jax.main", f"--config={config}", f"--workdir={folder}"]
    subprocess.run([*command, *[f"--config.{text}" for text in overrides]], check=True, capture_output=True)
    seconds = json.loads((folder / "result.json").read_text())["seconds"]
    shares = {name: seconds[name] / seconds["step"] for name in ("data", "log", "save")}
    shares["save"] *= trained_every / every
    figures = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
    print(f"overhead {config}: {figures} of {seconds['step']:.1f} s of steps; goal {goal:.0%} each", flush=True)
    return max(shares.values()) < goal


def main() -> None:
    """Prints the shares of both configs."""
    with tempfile.TemporaryDirectory() as temporary:
        met = [measure(config, pathlib.Path(temporary) / str(i)) for i, config in enumerate(CASES)]
    sys.exit(not all(met))


if __name__ == "__main__":
    main()
