"""Does finetuning SmolLM2-135M teach it what it should, and how long does that take?

python tests/bench/sft_and_dpo.py --data=../shared/data [--steps=24]

Adapters of rank 16 on 175 seed tasks of self-instruct (instructions/seed_tasks.jsonl), and then, from the pretrained
model again, DPO on the first 200 pairs of harmless.jsonl. Part of both is held out, by a hash. Goals: the loss on the
assistant's tokens that are held out falls; the loss on the pairs that are held out falls below ln 2, where it begins;
both together take at most 20 minutes on 2 CPU cores.
"""

import argparse
import itertools
import math
import os
import pathlib
import sys
import tempfile
import time

from foundry_jax import compilation, train
from foundry_jax.config import load

MINUTES_GOAL = 20.0
PAIRS = 200
# The sizes of both: enough to learn something in minutes.
COMMON = ("model.context_length=160", "eval.batch_size=4", "checkpoint.every=1000", "log.every=1")


def sft(tasks: pathlib.Path, folder: pathlib.Path, steps: int) -> tuple[float, float]:
    """Returns the loss on answers that are held out, in nats per token, before and after."""
    given = [*COMMON, "data.source=chat", f"data.path={tasks}", "data.validation=document(fraction=0.1)"]
    given += [f"data.cache_dir={folder / 'cache'}", "data.packing=first_fit", "eval.every=1000"]
    config = "configs/finetune.py:batch_size=4,warmup=2"
    still = load(f"{config},steps=1,lr=0,ema=0", [*given, "optimizer.min_learning_rate=0"])
    before = train.run(still, folder / "still", quiet=True)
    after = train.run(load(f"{config},steps={steps},lr=5e-4,ema=0", given), folder / "sft")
    return before["validation"]["loss"], after["validation"]["loss"]


def dpo(pairs: pathlib.Path, folder: pathlib.Path, steps: int) -> dict[str, float]:
    """Returns what the metrics say in the end of the pairs that are held out."""
    given = [*COMMON, f"data.preferences={pairs}", f"data.path={pairs}", "data.validation=document(fraction=0.15)"]
    given += [f"data.cache_dir={folder / 'cache'}", "eval.every=1000"]
    config = load(f"configs/dpo.py:steps={steps},warmup=2,lr=2e-4,ema=0", given)
    return train.run(config, folder / "dpo")["validation"]


def main() -> None:
    """Trains both and prints their figures; exits 1 if a goal is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    parser.add_argument("--steps", type=int, default=24)
    flags = parser.parse_args()
    compilation.enable_cache()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        before, after = sft(flags.data / "instructions" / "seed_tasks.jsonl", folder, flags.steps)
        sft_minutes = (time.perf_counter() - start) / 60
        print(f"answers held out: {before:.3f} nats per token before, {after:.3f} after; {sft_minutes:.1f} minutes")
        pairs = folder / "pairs.jsonl"
        with open(flags.data / "preferences" / "harmless.jsonl", encoding="utf-8") as file:
            pairs.write_text("".join(itertools.islice(file, PAIRS)), "utf-8")
        found = dpo(pairs, folder, flags.steps)
    minutes = (time.perf_counter() - start) / 60
    print(
        f"pairs held out: loss {found['preference_loss']:.4f} (ln 2 is {math.log(2):.4f}), reward accuracy "
        f"{found['reward_accuracy']:.2f} ({found['reward_accuracy_low']:.2f} to {found['reward_accuracy_high']:.2f}), "
        f"margin {found['reward_margin']:.4f}, KL {found['kl']:.5f} nats a token; {minutes - sft_minutes:.1f} minutes"
    )
    print(f"{minutes:.1f} minutes in all on {len(os.sched_getaffinity(0))} cores (goal: {MINUTES_GOAL:g})")
    sys.exit(not (after < before and found["preference_loss"] < math.log(2) and minutes <= MINUTES_GOAL))


if __name__ == "__main__":
    main()
