"""Tiny architectures that the contract suites run over; all sizes differ, so no swapped axis goes unnoticed."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundry_jax.config import load
from foundry_jax.model import combinations
from foundry_jax.model.config import ModelConfig
from foundry_jax.model.mask import Placement
from foundry_jax.model.transformer import Transformer
from tests.conftest import ROOT

VOCAB, BATCH, LENGTH = 37, 3, 8

SIZES = {
    "vocab_size": VOCAB,
    "context_length": LENGTH,
    "num_layers": 3,
    "model_dim": 20,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 4,
    "mlp_dim": 28,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "window": 3,
}


def often(values, common):
    """Returns test parameters, single values or tuples, of which those in `common` run in `make test`, and all in
    `make test-all`."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=[] if value in common else [pytest.mark.exhaustive],
        )
        for value in values
    ]


# By axis of the design space: every way to leave the base model (gqa) along it. Two axes can be left at once.
AXES = {
    "attention": {
        "mha": {"num_kv_heads": 6},
        "mqa": {"num_kv_heads": 1},
        "mla": {"attention": "mla"},
        "mla_q_lora": {"attention": "mla", "q_lora_rank": 7},
    },
    "bias": {f"bias_{where}": {"bias": where} for where in ("qkv", "attention", "all")},
    "qk_norm": {f"qk_norm_{over}": {"qk_norm": over} for over in ("head", "whole")},
    "softcap": {"softcap": {"attention_softcap": 2.0}},
    "pattern": {
        "window": {"pattern": "S"},
        "window_and_full": {"pattern": "SL"},
        "strided": {"pattern": "P", "sparse": "strided(stride=3)"},
        "fixed": {"pattern": "P", "sparse": "fixed(stride=3, summary=1)"},
    },
    "mlp": {name: {"mlp": name} for name in ("geglu", "geglu_tanh", "glu", "gelu", "gelu_tanh", "relu2")},
    "moe": {
        "moe_softmax": {"moe": "softmax(experts=4, top_k=2, expert_dim=12)"},
        "moe_unnormalized": {
            "moe": "softmax_unnormalized(experts=6, top_k=2, expert_dim=12, shared=1, dense_layers=1, scale=1.5)"
        },
        "moe_sigmoid": {
            "moe": "sigmoid(experts=8, top_k=3, expert_dim=12, shared=2, groups=4, top_groups=2, scale=2.5)"
        },
    },
    "norm": {name: {"norm": name} for name in ("layernorm", "layernorm_nobias")},
    "norm_placement": {f"{where}_norm": {"norm_placement": where} for where in ("post", "sandwich")},
    "position": {
        "alibi": {"position": "alibi"},
        "learned": {"position": "learned"},
        "nope": {"position": "none"},
    },
    "rope_scaling": {
        "rope_linear": {"rope_scaling": "linear(factor=3)"},
        "rope_llama3": {"rope_scaling": "llama3(factor=4, original_length=64)", "rope_theta": 100.0},
        "rope_yarn": {"rope_scaling": "yarn(factor=4, original_length=16, beta_fast=4, mscale_all_dim=0.7)"},
    },
    "embedding": {"scaled": {"embedding": "scaled"}, "normed": {"embedding": "normed"}},
    "output": {"untied": {"tie_embeddings": False}},
}
VARIANTS = {"gqa": {}} | {name: changes for group in AXES.values() for name, changes in group.items()}


def tiny(variant: str = "gqa", **changes) -> ModelConfig:
    """Returns the model config of a variant, or of several joined by "+", with further fields replaced."""
    for name in variant.split("+"):
        changes = VARIANTS[name] | changes
    return dataclasses.replace(_base(), **SIZES | changes)


@functools.cache
def _base() -> ModelConfig:
    return load(str(ROOT / "configs" / "baseline.py")).model


@functools.cache
def pairs() -> list[str]:
    """Returns "one+other" for all pairs of variants of different axes that are not refused."""
    found = []
    for one, other in itertools.combinations(AXES.values(), 2):
        for names in itertools.product(one, other):
            joined = "+".join(names)
            if not any(refusal.applies(tiny(joined)) for refusal in combinations.REFUSALS):
                found.append(joined)
    return found


@functools.cache
def params_of(config: ModelConfig, seed: int = 0):
    """Returns parameters of a config, all of them well away from zero and from each other.

    With the default init (std 0.02, scales 1) whole classes of mistakes move the logits by less than the tolerance.
    """
    init = functools.partial(Transformer(config).init, jax.random.key(0))
    shapes = nn.meta.unbox(jax.eval_shape(init, jnp.zeros((1, 1), int)))["params"]
    rng = np.random.default_rng(seed)

    def fresh(path, leaf):
        std = 0.2 if leaf.ndim == 1 else 0.15
        return jnp.asarray((path[-1].key == "scale") + std * rng.standard_normal(leaf.shape), jnp.float32)

    return {"params": jax.tree_util.tree_map_with_path(fresh, shapes)}


def tokens_of(seed: int = 0, batch: int = BATCH, length: int = LENGTH):
    """Returns random tokens [batch, length]."""
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, VOCAB)


@functools.lru_cache(maxsize=64)
def forward(config: ModelConfig):
    """Returns the compiled (params, tokens) -> logits."""
    return jax.jit(lambda params, tokens: Transformer(config).apply(params, tokens)[0])


@functools.lru_cache(maxsize=64)
def placed(config: ModelConfig):
    """Returns the compiled (params, tokens, positions, segments) -> logits."""
    return jax.jit(
        lambda params, tokens, positions, segments: Transformer(config).apply(
            params, tokens, Placement(positions, segments)
        )[0]
    )


@functools.lru_cache(maxsize=64)
def decoder(config: ModelConfig):
    """Returns the compiled (params, tokens, positions, cache) -> (logits, cache)."""
    return jax.jit(
        lambda params, tokens, positions, cache: Transformer(config).apply(params, tokens, Placement(positions), cache)
    )


@functools.lru_cache(maxsize=64)
def gradient(config: ModelConfig):
    """Returns the compiled (params, tokens) -> (variance of the logits, its gradient)."""
    return jax.jit(jax.value_and_grad(lambda params, tokens: jnp.var(Transformer(config).apply(params, tokens)[0])))
