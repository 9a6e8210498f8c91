"""Training speed against `transformers`: tokens per second of the baseline architecture, as a ratio in one run.

    python tests/bench/throughput.py [--pairs 7] [--batch 8]

Both train the same shape in float32 with AdamW on the same cores, a step of one after a step of the other. The bound is
the matrix product: XLA:CPU reaches 0.7 to 0.85 of MKL. Exits 1 if the median ratio is under 0.75.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from foundry_jax import command, compilation, config, sharding, train
from foundry_jax.optimizer import hyperparameters
from foundry_jax.train_step import Program

VOCAB_SIZE, GOAL = 8192, 0.75


def our_step(batch_size: int) -> Callable[[], None]:
    """Returns a function that trains one step of configs/baseline.py."""
    settings = train.with_vocabulary(config.load("configs/baseline.py", [f"data.batch_size={batch_size}"]), VOCAB_SIZE)
    plan = sharding.plan(1, 1, settings.sharding)
    shape = (batch_size, settings.model.context_length)
    compiled = compilation.compile_train_step(Program.of(settings), plan, shape)
    state = compilation.compile_init(Program.of(settings), plan)(hyperparameters(settings))
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, *shape)).astype(np.int32)
    batch = {"inputs": tokens[0], "targets": tokens[1], "weights": np.ones(shape, np.float32)}

    def step():
        nonlocal state
        state, metrics = compiled(state, batch, hyperparameters(settings), {})
        jax.block_until_ready((state, metrics))

    return step


def their_step(batch_size: int) -> Callable[[], None]:
    """Returns a function that trains one step of transformers' Llama of the same shape, eagerly."""
    import torch
    import transformers

    m = train.with_vocabulary(config.load("configs/baseline.py"), VOCAB_SIZE).model
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=m.vocab_size, hidden_size=m.model_dim, intermediate_size=m.mlp_dim, pad_token_id=None,
            num_hidden_layers=m.num_layers, num_attention_heads=m.num_heads, num_key_value_heads=m.num_kv_heads,
            max_position_embeddings=m.context_length, tie_word_embeddings=True, attn_implementation="eager",
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    tokens = torch.randint(0, VOCAB_SIZE, (batch_size, m.context_length))

    def step():
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    flags = parser.parse_args()
    steps = {"ours": our_step(flags.batch), "transformers": their_step(flags.batch)}
    seconds = {name: [] for name in steps}
    for pair in range(flags.pairs + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if pair > 0:  # the first pair warms up
                seconds[name].append(time.perf_counter() - start)
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["transformers"], strict=True)]
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"throughput: {statistics.median(ratios):.2f} of transformers' tokens per second "
        f"(range {min(ratios):.2f} to {max(ratios):.2f} over {flags.pairs} pairs; "
        f"{median['ours']:.2f} s against {median['transformers']:.2f} s a step); goal {GOAL}"
    )
    sys.exit(statistics.median(ratios) < GOAL)


if __name__ == "__main__":
    command.restart_with_huge_pages()
    main()
