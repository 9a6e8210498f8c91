"""How fast and how lean a checkpoint of 2 GB is converted and loaded, against copying its bytes.

python tests/bench/conversion.py

Goals: from file to file at least 0.3 as fast as cp on a warm cache; at most 1.2 times the largest tensor in memory
beyond what is made: nothing for a conversion from file to file, the parameters for a load. How fast a load is depends
on how fast the system gives new memory: touching 2.5 GB for the first time took 1.8 s where 2.8 s were measured.
"""

import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from foundry_jax.zoo.catalog import ZOO
from foundry_jax.zoo.export import write_header
from foundry_jax.zoo.families import FAMILIES
from foundry_jax.zoo.settings import model_of
from foundry_jax.zoo.source import num_bytes, param_shapes, parts_of

SPEED_GOAL, MEMORY_GOAL = 0.3, 1.2
DTYPE = np.dtype(ml_dtypes.bfloat16)

# Anonymous memory, sampled: pages of the files that are read are the kernel's to keep or drop.
MEASURED = """
import sys, threading, time
from foundry_jax import zoo
from foundry_jax.zoo.export import export
import jax
jax.devices()

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

source = zoo.open_source(sys.argv[2])
source.shapes
before = anonymous()
peak = [before]
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
if sys.argv[1] == "convert":
    export(source, sys.argv[3])
else:
    model = zoo.load_pretrained(sys.argv[2], dtype="bfloat16")
print(time.perf_counter() - start, peak[0] - before)
"""


def write_checkpoint(folder: pathlib.Path) -> tuple[int, int]:
    """Writes a random Llama of the shape of llama3-1b; returns the bytes of all its tensors and of the largest."""
    config = model_of(ZOO["llama3-1b"].settings)
    family = FAMILIES["LlamaForCausalLM"]
    shapes = {}
    for path, shape in param_shapes(config).items():
        (part,) = parts_of(path, shape, family)
        shapes[part.name] = part.layout.their_shape(shape)
    folder.mkdir()
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.02, 2**22).astype(DTYPE)
    with open(folder / "model.safetensors", "wb") as file:
        write_header(file, shapes, "BF16", DTYPE)
        for shape in shapes.values():
            file.write(np.resize(noise, shape).tobytes())
    described = {"architectures": [family.architecture], "model_type": family.model_type, **family.write(config)}
    (folder / "config.json").write_text(json.dumps(described))
    sizes = [num_bytes(shape, DTYPE) for shape in shapes.values()]
    return sum(sizes), max(sizes)


def copy(source: pathlib.Path, target: pathlib.Path) -> float:
    """Returns the seconds of cp."""
    os.sync()  # or it waits for what was written before
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def measured(what: str, source: pathlib.Path, target: pathlib.Path) -> tuple[float, int]:
    """Returns (seconds, bytes of memory beyond what the process had before)."""
    os.sync()
    command = [sys.executable, "-c", MEASURED, what, source, target]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shutil.rmtree(target, ignore_errors=True)
    seconds, memory = done.stdout.split()
    return float(seconds), int(memory)


def main() -> None:
    """Prints the figures; exits 1 if one misses its goal."""
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder, target = pathlib.Path(name) / "model", pathlib.Path(name) / "copy"
        total, largest = write_checkpoint(folder)
        copy(folder, target)  # warms the cache
        for what, made in (("convert", 0), ("load", total)):
            rows = [(copy(folder, target), *measured(what, folder, target)) for _ in range(3)]
            speed = statistics.median(cp / seconds for cp, seconds, _ in rows)
            memory = (max(memory for *_, memory in rows) - made) / largest
            seconds = statistics.median(seconds for _, seconds, _ in rows)
            cp = statistics.median(cp for cp, *_ in rows)
            goal = f"; goal {SPEED_GOAL}" if what == "convert" else ""  # a load fills as much new memory, cp none
            print(
                f"{what} {total / 1e9:.2f} GB: {speed:.2f} of the speed of cp ({seconds:.1f} s against {cp:.1f} s)"
                f"{goal}. Memory beyond the result: {memory:.2f} of the largest tensor; goal {MEMORY_GOAL}"
            )
            failed |= (what == "convert" and speed < SPEED_GOAL) or memory > MEMORY_GOAL
    sys.exit(failed)


if __name__ == "__main__":
    main()
