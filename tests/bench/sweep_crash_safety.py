"""Crash safety of a sweep: kill -9 of the sweep or of one of its processes at random moments, and run it again.

    python tests/bench/sweep_crash_safety.py [--kills 20] [--seed 0]

Compares ledger and decision with those of a sweep left alone, and looks for runs that were finished twice and for
processes that outlive their sweep. Prints one line such as

    20 kills (9 of the sweep, 8 of a worker, 3 of a probe): same ledger of 25 facts, same decision, 0 runs finished
    twice, 0 orphans

and exits with 1 if that is not so.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from foundry_jax.runfolder import read_result  # noqa: E402
from foundry_jax.search.ledger import Ledger  # noqa: E402

WORDS = ("norm=layernorm,layernorm_nobias", "lr=1e-3,3e-3")
OVERRIDES = ("--config.num_steps=600", "--config.checkpoint.every=20", "--config.eval.every=100", "--seeds=6")
ORPHAN_SECONDS = 5.0  # the kernel kills a child at once; it may take a moment to be gone
LONGEST_WAIT = 8.0  # seconds between kills: a worker needs about 5 to start and 2 for a run


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sweep-crash-safety-") as folder:
        calm, victim = pathlib.Path(folder) / "calm", pathlib.Path(folder) / "victim"
        if start(calm).wait():
            sys.exit("The sweep fails even when it is left alone.")
        kills, twice, orphans = disturb(victim, flags.kills, random.Random(flags.seed))
        facts, expected = (without_times(Ledger(path)._facts) for path in (victim, calm))
        same_facts = facts == expected
        same_decision = read_result(victim)["decision"] == read_result(calm)["decision"]
    of = {kind: kills.count(kind) for kind in ("sweep", "worker", "probe")}
    print(
        f"{len(kills)} kills ({of['sweep']} of the sweep, {of['worker']} of a worker, {of['probe']} of a probe): "
        f"{'same' if same_facts else 'ANOTHER'} ledger of {len(expected)} facts, "
        f"{'same' if same_decision else 'ANOTHER'} decision, {twice} runs finished twice, {orphans} orphans"
    )
    if not same_facts:
        different = [key for key in facts.keys() | expected.keys() if facts.get(key) != expected.get(key)]
        print(f"different: {', '.join(different)}", file=sys.stderr)
    if len(kills) < flags.kills:
        sys.exit(f"The sweep was done after {len(kills)} kills; raise the number of steps.")
    sys.exit(not same_facts or not same_decision or twice > 0 or orphans > 0)


def start(folder: pathlib.Path) -> subprocess.Popen:
    """Starts the sweep, or goes on with it."""
    command = ["foundry_jax.cli.sweep", *WORDS, "--config", str(ROOT / "configs" / "smoke.py"), "--jobs=2", *OVERRIDES]
    return subprocess.Popen(
        [sys.executable, "-m", *command, f"--workdir={folder}"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip


def disturb(folder: pathlib.Path, count: int, rng: random.Random) -> tuple[list[str], int, int]:
    """Carries the sweep out with kills; returns what was killed, how many runs were finished twice, and orphans."""
    kills, orphans, twice, seen = [], 0, set(), {}
    process = start(folder)
    while process.poll() is None:
        until = time.monotonic() + rng.uniform(0.5, LONGEST_WAIT)
        while len(kills) < count and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
            twice |= finished_again(folder, seen)
        if len(kills) == count:
            process.wait()
        elif process.poll() is None:
            kills.append(kill_one(process, folder, rng))
            print(f"kill {len(kills)}: {kills[-1]}, {len(seen)} runs finished", file=sys.stderr)
            if kills[-1] == "sweep":
                process.wait()
                orphans += left_over(folder)
                process = start(folder)
    if process.returncode:
        sys.exit(f"The sweep ended with exit code {process.returncode}.")
    twice |= finished_again(folder, seen)
    return kills, len(twice), orphans + left_over(folder)


def kill_one(sweep: subprocess.Popen, folder: pathlib.Path, rng: random.Random) -> str:
    """Kills the sweep or one of its processes, and returns which."""
    children = [(pid, kind) for pid, kind in processes_of(folder) if pid != sweep.pid]
    pid, kind = rng.choice([(sweep.pid, "sweep"), *children])
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has just ended
        os.kill(sweep.pid, signal.SIGKILL)
        kind = "sweep"
    return kind


def processes_of(folder: pathlib.Path) -> list[tuple[int, str]]:
    """Returns (pid, what it is) of the processes that work in a sweep's folder."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(str(folder) in word for word in words):
            kind = next((kind for kind in ("worker", "probe", "sweep") if any(kind in word for word in words[:3])), "?")
            found.append((int(path.parent.name), kind))
    return found


def left_over(folder: pathlib.Path) -> int:
    """Returns how many processes outlive the sweep."""
    until = time.monotonic() + ORPHAN_SECONDS
    while (found := processes_of(folder)) and time.monotonic() < until:
        time.sleep(0.05)
    return len(found)


def finished_again(folder: pathlib.Path, seen: dict[pathlib.Path, int]) -> set[pathlib.Path]:
    """Returns the results that were written once more since they were first seen."""
    again = set()
    for path in folder.glob("runs/*/*/result.json"):
        written = path.stat().st_mtime_ns
        if seen.setdefault(path, written) != written:
            again.add(path)
    return again


def without_times(value):
    """Returns facts without what a clock has said."""
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if "seconds" not in key and key != "time"}
    return json.loads(json.dumps(value)) if not isinstance(value, list) else [without_times(inner) for inner in value]


if __name__ == "__main__":
    main()
