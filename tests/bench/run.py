"""Runs every benchmark and prints its figure: make bench. Exits 1 if one misses its goal."""

import pathlib
import subprocess
import sys

BENCHMARKS = (
    "startup.py",
    "throughput.py",
    "attention_speed.py",
    "moe_speed.py",
    "loss_memory.py",
    "conversion.py",
    "overhead.py",
    "crash_safety.py",
    "sweep_crash_safety.py",
    "data_speed.py",
    "data_pipeline.py",
    "near_duplicates.py",
    "sft_and_dpo.py",
)


def main() -> None:
    """Runs them one after another: two at a time would measure each other."""
    here = pathlib.Path(__file__).parent
    failed = [name for name in BENCHMARKS if subprocess.run([sys.executable, here / name]).returncode]
    if failed:
        sys.exit(f"goal missed or failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
