"""Does finetuning SmolLM2-135M teach it what it should, and how long does that take?

python tests/bench/sft_and_dpo.py --data=../shared/data

Adapters of rank 16 on the 175 seed tasks of self-instruct (instructions/seed_tasks.jsonl), a tenth of them held out;
then, from the pretrained model again, DPO on 200 pairs of preferences/harmless.jsonl, taken as conversations, each seen
once, with 88 more held out. Goals: the loss on answers that are held out falls; the loss on pairs that are held out
falls below ln 2, where it begins; both together take at most 20 minutes on 2 CPU cores.

The settings were chosen on the first 320 pairs of the file; these are others. What people prefer in them is hard to
tell: a logistic regression on words, fitted to 200 to 1000 of them, is right about 0.48 to 0.58 of the others.
"""

import argparse
import itertools
import math
import os
import pathlib
import sys
import tempfile
import time

from foundry_jax import compilation, rewards, train
from foundry_jax.config import load

MINUTES_GOAL = 20.0
LINES = slice(320, 608)  # so many that, of their prompts, 200 are not held out
COMMON = ("eval.batch_size=4", "eval.every=1000", "checkpoint.every=1000", "log.every=5")


def sft(tasks: pathlib.Path, folder: pathlib.Path) -> tuple[float, float]:
    """Returns the loss on answers that are held out, in nats per token, before and after."""
    given = [*COMMON, "model.context_length=160", "data.source=chat", f"data.path={tasks}", "data.packing=first_fit"]
    given += ["data.validation=document(fraction=0.1)", f"data.cache_dir={folder / 'cache'}"]
    config = "configs/finetune.py:batch_size=4,warmup=2,ema=0"
    still = load(f"{config},steps=1,lr=0", [*given, "optimizer.min_learning_rate=0"])
    before = train.run(still, folder / "still", quiet=True)
    after = train.run(load(f"{config},steps=24,lr=5e-4", given), folder / "sft")
    return before["validation"]["loss"], after["validation"]["loss"]


def dpo(pairs: pathlib.Path, folder: pathlib.Path) -> dict[str, float]:
    """Returns what the metrics say in the end of the pairs that are held out."""
    given = [*COMMON, "model.context_length=96", f"data.preferences=constitution(path='{pairs}')"]
    given += [f"data.path={pairs}", "data.validation=document(fraction=0.3)", f"data.cache_dir={folder / 'cache'}"]
    return train.run(load("configs/dpo.py:steps=50,lr=1e-4,ema=0", given), folder / "dpo")["validation"]


def main() -> None:
    """Trains both and prints their figures; exits 1 if a goal is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    flags = parser.parse_args()
    compilation.enable_cache()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        before, after = sft(flags.data / "instructions" / "seed_tasks.jsonl", folder)
        sft_minutes = (time.perf_counter() - start) / 60
        print(f"answers held out: {before:.3f} nats per token before, {after:.3f} after; {sft_minutes:.1f} minutes")
        pairs = folder / "pairs.jsonl"
        with open(flags.data / "preferences" / "harmless.jsonl", encoding="utf-8") as file:
            pairs.write_text("".join(itertools.islice(file, LINES.start, LINES.stop)), "utf-8")
        found = dpo(pairs, folder)
    minutes = (time.perf_counter() - start) / 60
    print(f"pairs held out (ln 2 is {math.log(2):.4f}): {rewards.line(found)}; {minutes - sft_minutes:.1f} minutes")
    print(f"{minutes:.1f} minutes in all on {len(os.sched_getaffinity(0))} cores (goal: {MINUTES_GOAL:g})")
    sys.exit(not (after < before and found["preference_loss"] < math.log(2) and minutes <= MINUTES_GOAL))


if __name__ == "__main__":
    main()
