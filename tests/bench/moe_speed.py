"""Cost of a layer of experts against one expert's MLP: time of a forward and backward pass over 4096 tokens.

    python tests/bench/moe_speed.py [--rounds 9]

All of the layer is timed: router, sorting, experts, combination; with gradients of parameters and input. The programs
run in turn, and ratios are taken within a round. Two experts a token cost 2 by arithmetic alone; how many experts there
are should not matter. Exits 1 if the median of 8 experts, top-2, is more than 3.5, or if 32 experts cost more than 1.5
times as much as 8.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from foundry_jax import command, compilation, config
from foundry_jax.model.mlp.dense import MLP
from foundry_jax.model.mlp.moe import MixtureOfExperts

BATCH, LENGTH, GOAL, GROWTH_GOAL = 16, 256, 3.5, 1.5
EXPERTS = {"8 experts, top-1": (8, 1), "8 experts, top-2": (8, 2), "32 experts, top-2": (32, 2)}


def passes(module: nn.Module, model_dim: int) -> Callable[[], object]:
    """Returns a function that runs the compiled forward and backward pass once."""
    x_BLD = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, model_dim))
    real_BL = jnp.ones((1, LENGTH), bool)
    params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(1), x_BLD, real_BL))

    def loss(params, x_BLD):
        return jnp.sum(jnp.sin(module.apply(params, x_BLD, real_BL)))

    options = compilation.CPU_OPTIONS if jax.default_backend() == "cpu" else None
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x_BLD).compile(options)
    return lambda: jax.block_until_ready(compiled(params, x_BLD))


def measure(model_dim: int, mlp_dim: int, rounds: int) -> dict[str, float]:
    """Prints one line per layer and returns its median ratio to the dense MLP."""
    base = dataclasses.replace(config.load("configs/baseline.py").model, model_dim=model_dim, mlp_dim=mlp_dim)
    programs = {"dense": passes(MLP(base), model_dim)}
    for name, (experts, top_k) in EXPERTS.items():
        call = f"softmax(experts={experts}, top_k={top_k}, expert_dim={mlp_dim})"
        programs[name] = passes(MixtureOfExperts(dataclasses.replace(base, moe=call)), model_dim)
    seconds = {name: [] for name in programs}
    for i in range(rounds + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            if i > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    dense = seconds.pop("dense")
    print(f"moe_speed {model_dim} x {mlp_dim}: dense MLP {statistics.median(dense) * 1e3:.0f} ms")
    ratios = {name: [a / b for a, b in zip(times, dense, strict=True)] for name, times in seconds.items()}
    for name, values in ratios.items():
        spread = f"range {min(values):.2f} to {max(values):.2f}"
        print(
            f"moe_speed {model_dim} x {mlp_dim}, {name}: {statistics.median(values):.2f} times ({spread})", flush=True
        )
    return {name: statistics.median(values) for name, values in ratios.items()}


def main() -> None:
    """Prints the ratios of two sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    flags = parser.parse_args()
    missed = False
    for model_dim, mlp_dim in ((384, 512), (384, 1024)):
        medians = measure(model_dim, mlp_dim, flags.rounds)
        growth = medians["32 experts, top-2"] / medians["8 experts, top-2"]
        missed |= medians["8 experts, top-2"] > GOAL or growth > GROWTH_GOAL
        print(f"moe_speed {model_dim} x {mlp_dim}: 32 experts cost {growth:.2f} of 8; goals {GOAL} and {GROWTH_GOAL}")
    sys.exit(missed)


if __name__ == "__main__":
    command.restart_with_huge_pages()
    main()
