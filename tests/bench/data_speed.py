"""How long data takes: opening a built cache, packing, one batch by hand, by batch(), by iterate(), a shuffled index.

    python tests/bench/data_speed.py [path to text]        default: the standard library, as bytes

On 2 idle CPU cores, 2026-11, batches of 32 x 257 tokens, in ms: open 20, by hand 0.09, batch 0.18, packed 0.39, a
mixture of two 0.47 (packed 0.74), iterate 0.33, shuffle 0.07 against Grain's 9.2. Packing a million documents of 400
tokens on average, in s: split 2.9, pad 0.2, first_fit 3.1, best_fit 7.1.
"""

import logging
import sys
import time
from collections.abc import Callable

import grain
import numpy as np

from foundry_jax import config
from foundry_jax.data import prepare
from foundry_jax.data.batches import Portion, shuffled, train_batches
from foundry_jax.data.curriculum import curriculum, parse
from foundry_jax.data.pack import figures, plan
from foundry_jax.data.stream import Stream

BATCH_SIZE, CONTEXT_LENGTH, REPEATS = 32, 256, 200
PACKINGS = ("split", "pad", "first_fit", "best_fit")
NUM_DOCUMENTS = 1_000_000


def milliseconds(action: Callable[[int], object], repeats: int = REPEATS) -> float:
    """Returns the mean time of action(0), action(1), ..."""
    start = time.perf_counter()
    for number in range(repeats):
        action(number)
    return (time.perf_counter() - start) / repeats * 1e3


def show_packings() -> None:
    """Prints one line per packing: of documents of 400 tokens on average, log-normal, whose tokens do not matter."""
    sizes = np.random.default_rng(0).lognormal(5.5, 1, NUM_DOCUMENTS).astype(np.int64) + 1
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for packing in PACKINGS:
        start = time.perf_counter()
        rows = plan(starts, packing, CONTEXT_LENGTH)
        seconds, found = time.perf_counter() - start, figures(rows, starts, CONTEXT_LENGTH)
        print(f"{seconds:10.2f} s   {packing}: {NUM_DOCUMENTS:,} documents, {found['efficiency']:.1%} of places used, "
              f"{found['split_documents']:,} split")  # fmt: skip


def batches_by_kind(stream: Stream) -> dict[str, list[Portion]]:
    """Returns what to time batch() of."""
    packed = plan(stream.starts, "first_fit", CONTEXT_LENGTH)
    order = curriculum(parse("length"), REPEATS, np.diff(stream.starts), stream.starts, packed, CONTEXT_LENGTH)
    return {
        "the endless text": [Portion(stream)],
        "packed": [Portion(stream, packed=packed)],
        "packed, with a curriculum": [Portion(stream, packed=packed, curriculum=order)],
        "a mixture of two": [Portion(stream), Portion(stream, weight=2)],
        "a packed mixture of two": [Portion(stream, packed=packed), Portion(stream, weight=2, packed=packed)],
    }


def main(path: str = "") -> None:
    """Prints one line per measurement."""
    source = [f"data.source={'text' if path else 'pystdlib'}", f"data.path={path}", "data.tokenizer=byte"]
    settings = config.load("configs/tiny.py", source).data
    stream = prepare(settings).train[0].stream
    timings = {"open a built cache": milliseconds(lambda _: prepare(settings), 5)}
    starts_B = np.random.default_rng(0).integers(len(stream.tokens) - CONTEXT_LENGTH, size=BATCH_SIZE)
    timings["gather by hand"] = milliseconds(
        lambda _: np.stack([stream.tokens[s : s + CONTEXT_LENGTH + 1] for s in starts_B])
    )
    for kind, portions in batches_by_kind(stream).items():
        batches = train_batches(portions, batch_size=BATCH_SIZE, context_length=CONTEXT_LENGTH, seed=0)
        timings[f"batch(step), {kind}"] = milliseconds(batches.batch)
        steps = batches.iterate(0, REPEATS + 1)
        next(steps)  # the import of grain
        timings[f"iterate(), {kind}"] = milliseconds(lambda _, steps=steps: next(steps))
    keys, rows = np.arange(8, dtype=np.uint64), np.arange(BATCH_SIZE)
    grain_shuffle = grain.experimental.index_shuffle
    timings["shuffle a batch of 100 windows, ours"] = milliseconds(lambda _: shuffled(rows, 100, keys))
    timings["shuffle a batch of 100 windows, Grain"] = milliseconds(
        lambda seed: [grain_shuffle(int(row), max_index=99, seed=seed, rounds=4) for row in rows], 5
    )
    for what, time_ms in timings.items():
        print(f"{time_ms:10.3f} ms  {what}")
    show_packings()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(*sys.argv[1:])
