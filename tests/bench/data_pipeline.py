"""How fast text becomes tokens and a token cache, against the `tokenizers` library called directly; and the memory.

    python tests/bench/data_pipeline.py                    # 200 MB
    python tests/bench/data_pipeline.py --megabytes=1000

Prints a line for each figure, and exits 1 where one misses its goal.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import psutil

from foundry_jax import config as config_lib
from foundry_jax import data
from foundry_jax.data.sources import pystdlib
from foundry_jax.data.tokenize import BPETokenizer, batched

TOKENIZE_GOAL = 0.8  # of the library's speed
BUILD_GOAL = 0.5
MEMORY_GOAL = 1e9  # bytes, all processes together
REPEATS = 5
DOCUMENT = 3000  # characters
COPIES = 0.05  # of the documents are as one before
BATCH = 1 << 22  # characters that the library is given at a time


def seconds(action: Callable[[], object]) -> float:
    """Returns how long an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def tokenize_ratio(tokenizer: BPETokenizer) -> tuple[float, float]:
    """Returns (speed of encode_batch as a share of encode_batch_fast's, MB/s of the former), best of a few turns.

    The library gives encodings, from which ids are still to be taken; ours gives arrays of ids.
    """
    texts = [document.text for document in pystdlib.find("")]
    direct = lambda: tokenizer._fitted.encode_batch_fast(texts, add_special_tokens=False)  # noqa: E731
    ours = lambda: tokenizer.encode_batch(texts)  # noqa: E731
    seconds(direct)  # the library keeps words that it has seen
    turns = [(seconds(direct), seconds(ours)) for _ in range(REPEATS)]
    library, here = (min(times) for times in zip(*turns, strict=True))
    return library / here, sum(len(text.encode()) for text in texts) / 1e6 / here


def write_corpus(path: pathlib.Path, megabytes: int) -> None:
    """Writes JSONL of documents from the standard library, no two alike but for the copies."""
    text = "".join(document.text for document in pystdlib.find(""))
    rng, size = random.Random(0), 0
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1_000_000:
            if size == 0 or rng.random() > COPIES:
                start = rng.randrange(len(text) - DOCUMENT)
                said = json.dumps({"text": text[start : start + DOCUMENT]}) + "\n"
            size += file.write(said)


def library_seconds(path: pathlib.Path, tokenizer: BPETokenizer) -> float:
    """Returns how long the library takes for the texts of a file, which are in memory already."""
    with open(path, encoding="utf-8") as file:
        groups = batched((json.loads(line)["text"] for line in file), BATCH)
        encode = tokenizer._fitted.encode_batch_fast
        return sum(seconds(lambda group=group: encode(group, add_special_tokens=False)) for group in groups)


@dataclasses.dataclass
class Peak:
    """The most memory that this process and its children had at once, in bytes."""

    size: int = 0


@contextlib.contextmanager
def watched() -> Iterator[Peak]:
    """Measures memory while the block runs: what belongs to each process alone, and the larger of what is shared."""
    peak, done, this = Peak(), threading.Event(), psutil.Process()

    def watch() -> None:
        while not done.wait(0.05):
            with contextlib.suppress(psutil.NoSuchProcess):
                everyone = [this, *this.children(recursive=True)]
                peak.size = max(peak.size, sum(one.memory_full_info().pss for one in everyone))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def build(path: pathlib.Path, folder: pathlib.Path) -> tuple[float, Peak]:
    """Returns how long a cache takes to build: read, drop exact copies, tokenize, write; and the memory."""
    overrides = [
        f"data.source=jsonl(path='{path}')", f"data.tokenizer={folder / 'tokenizer.json'}", "data.filters=exact",
        "data.validation=document(0.01)", f"data.cache_dir={folder / 'cache'}",
    ]  # fmt: skip
    config = config_lib.load("configs/tiny.py", overrides).data
    with watched() as peak:
        taken = seconds(lambda: data.prepare(config))
    return taken, peak


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=200)
    size = parser.parse_args().megabytes
    missed = []
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        tokenizer = BPETokenizer(8192).fit([document.text for document in pystdlib.find("")][::4])
        tokenizer.save(folder / "tokenizer.json")
        ratio, speed = tokenize_ratio(tokenizer)
        print(f"{ratio:10.2f} of tokenizers' own speed: encode_batch, {speed:.1f} MB/s (goal {TOKENIZE_GOAL})")
        missed += ["encode_batch"] * (ratio < TOKENIZE_GOAL)
        write_corpus(folder / "corpus.jsonl", size)
        taken, peak = build(folder / "corpus.jsonl", folder)
        ratio = library_seconds(folder / "corpus.jsonl", tokenizer) / taken
        print(f"{ratio:10.2f} of tokenizers' own speed: a cache of {size} MB in {taken:.1f} s (goal {BUILD_GOAL})")
        print(f"{peak.size / 1e9:10.2f} GB of memory at most, all processes together (goal {MEMORY_GOAL / 1e9:g})")
        missed += ["cache"] * (ratio < BUILD_GOAL) + ["memory"] * (peak.size > MEMORY_GOAL)
    if missed:
        sys.exit(f"goal missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
