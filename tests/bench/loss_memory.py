"""Memory and time of the loss with logits in chunks, as shares of those with all logits at once.

    python tests/bench/loss_memory.py [--pairs 3]

Value and gradients of the cross-entropy of 4 x 1024 tokens and a vocabulary of 128,256 (Llama 3's), in float32. Memory
is the peak of temporary arrays that XLA plans for; it is checked for two widths of the model, of which only the first
is run. Exits 1 if chunks need more than a quarter.
"""

import argparse
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from foundry_jax import command, compilation
from foundry_jax.losses import chunked_statistics, num_chunks, token_statistics

BATCH, LENGTH, VOCAB_SIZE, WIDTHS, GOAL = 4, 1024, 128_256, (512, 2048), 0.25


def at_once(x_BLD, kernel_DV, targets_BL):
    """Returns the statistics from all logits."""
    logits = (x_BLD.reshape(BATCH * LENGTH, -1) @ kernel_DV).reshape(BATCH, LENGTH, VOCAB_SIZE)
    return token_statistics(logits, targets_BL)


def in_chunks(x_BLD, kernel_DV, targets_BL):
    """Returns the statistics as the training step makes them."""
    return chunked_statistics(x_BLD, kernel_DV, targets_BL, num_chunks=num_chunks(BATCH * LENGTH, LENGTH, VOCAB_SIZE))


def compiled(statistics_of, width: int):
    """Returns the compiled (x, kernel, targets) -> (mean loss, gradients of x and kernel)."""
    shape = jax.ShapeDtypeStruct
    inputs = shape((BATCH, LENGTH, width), jnp.float32), shape((width, VOCAB_SIZE), jnp.float32)
    loss = jax.value_and_grad(lambda *inputs: jnp.mean(statistics_of(*inputs).nll), argnums=(0, 1))
    lowered = jax.jit(loss).lower(*inputs, shape((BATCH, LENGTH), jnp.int32))
    return lowered.compile(compilation.CPU_OPTIONS if jax.default_backend() == "cpu" else None)


def seconds(function, inputs) -> float:
    """Returns how long one call takes."""
    start = time.perf_counter()
    jax.block_until_ready(function(*inputs))
    return time.perf_counter() - start


def main() -> None:
    """Prints the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    flags = parser.parse_args()
    programs = {width: (compiled(in_chunks, width), compiled(at_once, width)) for width in WIDTHS}
    shares = {}
    for width, pair in programs.items():
        chunks, whole = (program.memory_analysis().temp_size_in_bytes for program in pair)
        shares[width] = chunks / whole
        print(
            f"loss memory, model_dim {width}: {chunks / whole:.3f} of that with all logits at once "
            f"({chunks / 2**20:,.0f} MiB against {whole / 2**20:,.0f} MiB); goal {GOAL}",
            flush=True,
        )
    keys = jax.random.split(jax.random.key(0), 3)
    x_BLD = jax.random.normal(keys[0], (BATCH, LENGTH, WIDTHS[0]))
    kernel_DV = 0.02 * jax.random.normal(keys[1], (WIDTHS[0], VOCAB_SIZE))
    inputs = x_BLD, kernel_DV, jax.random.randint(keys[2], (BATCH, LENGTH), 0, VOCAB_SIZE)
    times = [[seconds(program, inputs) for program in programs[WIDTHS[0]]] for _ in range(flags.pairs + 1)][1:]
    ratio = statistics.median(chunks / whole for chunks, whole in times)
    medians = (statistics.median(column) for column in zip(*times, strict=True))
    print("loss time, model_dim {}: {:.2f} ({:.1f} s against {:.1f} s)".format(WIDTHS[0], ratio, *medians))
    sys.exit(max(shares.values()) > GOAL)


if __name__ == "__main__":
    command.restart_with_huge_pages()
    main()
