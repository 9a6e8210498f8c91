"""Tiny architectures that the contract suites run over; all sizes differ, so no swapped axis goes unnoticed."""

import dataclasses
import functools

import flax.linen as nn
import jax

from foundry_jax.config import load
from foundry_jax.model.config import ModelConfig
from foundry_jax.model.transformer import Transformer

VOCAB, BATCH, LENGTH = 37, 3, 8

SIZES = {
    "vocab_size": VOCAB,
    "context_length": LENGTH,
    "num_layers": 2,
    "model_dim": 20,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 4,
    "mlp_dim": 28,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}

VARIANTS = {
    "gqa": {},
    "mha": {"num_kv_heads": 6},
    "mqa": {"num_kv_heads": 1},
    "mla": {"attention": "mla"},
    "mla_q_lora": {"attention": "mla", "q_lora_rank": 7},
    "untied": {"tie_embeddings": False},
}


def tiny(variant: str = "gqa", **changes) -> ModelConfig:
    """Returns the model config of a variant with further fields replaced."""
    base = load("configs/baseline.py").model
    return dataclasses.replace(base, **SIZES | VARIANTS[variant] | changes)


@functools.cache
def params_of(config: ModelConfig, seed: int = 0):
    """Returns parameters of a config, all of them well away from zero and from each other.

    With the default init (std 0.02, scales 1) whole classes of mistakes move the logits by less than the tolerance.
    """
    params = nn.meta.unbox(jax.jit(Transformer(config).init)(jax.random.key(seed), jax.numpy.zeros((1, 1), int)))
    leaves, tree = jax.tree.flatten(params["params"])
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    fresh = [
        x + 0.2 * jax.random.normal(k, x.shape) if x.ndim == 1 else 0.15 * jax.random.normal(k, x.shape)
        for k, x in zip(keys, leaves, strict=True)
    ]
    return {"params": jax.tree.unflatten(tree, fresh)}


def tokens_of(seed: int = 0, batch: int = BATCH, length: int = LENGTH):
    """Returns random tokens [batch, length]."""
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, VOCAB)


@functools.lru_cache(maxsize=64)
def forward(config: ModelConfig):
    """Returns the compiled (params, tokens) -> logits."""
    return jax.jit(lambda params, tokens: Transformer(config).apply(params, tokens)[0])
