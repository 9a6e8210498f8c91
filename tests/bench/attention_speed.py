"""What narrow masks cost against the full one at 4096 tokens: FLOPs, time and memory of one attention.

    python tests/bench/attention_speed.py [--rounds 5]

Forward and backward pass of one row of 8 query heads on 2 key/value heads of 64 dims in float32. FLOPs and temporary
memory are XLA's figures; the programs run one after another in every round, and times are medians. Exits 1 if a window
of 256 or a sparse mask has more than 0.2 of the full mask's FLOPs, or takes more than 0.4 of its time or 0.25 of its
memory.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable

import jax

from foundry_jax import command, compilation
from foundry_jax.model.attention.core import attend
from foundry_jax.model.mask import Causal, Fixed, Mask, MaskSpec, Strided, Window, whole_sequence

LENGTH, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4096, 8, 2, 64
SPECS = {"full": Causal(), "window(256)": Window(256), "strided(64)": Strided(64), "fixed(64, 8)": Fixed(64, 8)}
FLOPS_GOAL, SECONDS_GOAL, MEMORY_GOAL = 0.2, 0.4, 0.25


@dataclasses.dataclass(frozen=True)
class Attention:
    """A compiled forward and backward pass, and what XLA says of it."""

    run: Callable[[], None]
    flops: float
    temporary_bytes: int


def build(spec: MaskSpec) -> Attention:
    """Returns the attention of one document under a mask."""
    heads = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS, NUM_HEADS)
    keys = jax.random.split(jax.random.key(0), 4)
    inputs = [jax.random.normal(key, (1, LENGTH, n, HEAD_DIM)) for key, n in zip(keys, heads, strict=True)]
    placement = whole_sequence(LENGTH)
    mask = Mask(placement, placement, spec, contiguous=True, aligned=True)

    def step(q, k, v, dy):
        y, pull = jax.vjp(lambda *x: attend(*x, mask, scale=HEAD_DIM**-0.5), q, k, v)
        return y, pull(dy)

    options = compilation.CPU_OPTIONS if jax.default_backend() == "cpu" else None
    compiled = jax.jit(step).lower(*inputs).compile(options)
    return Attention(
        run=lambda: jax.block_until_ready(compiled(*inputs)),
        flops=compiled.cost_analysis()["flops"],
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
    )


def measure(attentions: dict[str, Attention], rounds: int) -> dict[str, float]:
    """Returns the median seconds of each, interleaved."""
    seconds = {name: [] for name in attentions}
    for i in range(rounds + 1):
        for name, attention in attentions.items():
            start = time.perf_counter()
            attention.run()
            if i > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Prints three ratios for every narrow mask."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    attentions = {name: build(spec) for name, spec in SPECS.items()}
    seconds = measure(attentions, flags.rounds)
    full = attentions["full"]
    met = True
    for name in list(SPECS)[1:]:
        flops = attentions[name].flops / full.flops
        share = seconds[name] / seconds["full"]
        memory = attentions[name].temporary_bytes / full.temporary_bytes
        print(
            f"attention {name}: {flops:.3f} of the full mask's FLOPs (goal {FLOPS_GOAL}), {share:.3f} of its time "
            f"(goal {SECONDS_GOAL}; {seconds[name]:.2f} s against {seconds['full']:.2f} s), {memory:.3f} of its memory "
            f"(goal {MEMORY_GOAL}; {attentions[name].temporary_bytes / 1e6:.0f} MB against "
            f"{full.temporary_bytes / 1e6:.0f} MB)",
            flush=True,
        )
        met &= flops <= FLOPS_GOAL and share <= SECONDS_GOAL and memory <= MEMORY_GOAL
    sys.exit(not met)


if __name__ == "__main__":
    command.restart_with_huge_pages()
    main()
