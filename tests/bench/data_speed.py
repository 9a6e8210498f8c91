"""How long data takes: opening a built cache, one batch by hand, by batch(), by iterate(), one shuffled index.

    python tests/bench/data_speed.py [path to text]        default: the standard library, as bytes

On 2 CPU cores with a load of 4, 2026-11, batches of 32 x 257 tokens, in ms: open 260 (160 with BPE 4096), by hand
0.29, batch 0.47, iterate 0.62, shuffle 0.22 against Grain's 18.
"""

import logging
import sys
import time
from collections.abc import Callable

import grain
import numpy as np

from foundry_jax.config import DataConfig
from foundry_jax.data import prepare, train_batches
from foundry_jax.data.batches import shuffled

BATCH_SIZE, CONTEXT_LENGTH, REPEATS = 32, 256, 200


def milliseconds(action: Callable[[int], object], repeats: int = REPEATS) -> float:
    """Returns the mean time of action(0), action(1), ..."""
    start = time.perf_counter()
    for number in range(repeats):
        action(number)
    return (time.perf_counter() - start) / repeats * 1e3


def main(path: str = "") -> None:
    """Prints one line per measurement."""
    config = DataConfig(
        source="text" if path else "pystdlib", path=path, tokenizer="byte", tokenizer_path="", vocab_size=257,
        split="tail", validation_fraction=0.1, batch_size=BATCH_SIZE, cache_dir="")  # fmt: skip
    tokens = prepare(config).train_tokens
    batches = train_batches(tokens, batch_size=BATCH_SIZE, context_length=CONTEXT_LENGTH, seed=0)
    starts_B = np.random.default_rng(0).integers(len(tokens) - CONTEXT_LENGTH, size=BATCH_SIZE)
    steps = batches.iterate(0, REPEATS + 1)
    next(steps)  # the import of grain
    keys, rows = np.arange(8, dtype=np.uint64), np.arange(BATCH_SIZE)
    grain_shuffle = grain.experimental.index_shuffle
    timings = {
        "open a built cache": milliseconds(lambda _: prepare(config), 5),
        "gather by hand": milliseconds(lambda _: np.stack([tokens[s : s + CONTEXT_LENGTH + 1] for s in starts_B])),
        "batch(step)": milliseconds(batches.batch),
        "iterate(), nothing else running": milliseconds(lambda _: next(steps)),
        "shuffle a batch of 100 windows, ours": milliseconds(lambda _: shuffled(rows, 100, keys)),
        "shuffle a batch of 100 windows, Grain": milliseconds(
            lambda seed: [grain_shuffle(int(row), max_index=99, seed=seed, rounds=4) for row in rows], 5
        ),
    }
    for what, time_ms in timings.items():
        print(f"{time_ms:10.3f} ms  {what}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(*sys.argv[1:])
