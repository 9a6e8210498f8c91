"""Mutations of the architecture."""

import re

from foundry_jax.errors import UserError
from foundry_jax.registry import unknown

ATTENTION_VARIANTS = {
    "mha": "one key/value head per query head",
    "gqa": "the config's own number of key/value heads",
    "mqa": "one key/value head for all query heads",
    "gqa_1kv": "one key/value head",
    "gqa_2kv": "two key/value heads (any count works: gqa_3kv, ...)",
    "mla": "multi-head latent attention",
}


def attention(config, variant: str):
    """How queries, keys and values are made: mha, gqa, mqa, gqa_<count>kv or mla."""
    if variant == "mla":
        return {"model.attention": "mla"}
    if match := re.fullmatch(r"gqa_(\d+)kv", variant):
        return {"model.attention": "gqa", "model.num_kv_heads": int(match[1])}
    counts = {"mha": config.model.num_heads, "mqa": 1, "gqa": config.model.num_kv_heads}
    if variant not in counts:
        raise UserError(unknown(variant, ATTENTION_VARIANTS, "attention variant"))
    return {"model.attention": "gqa", "model.num_kv_heads": counts[variant]}


def dropout(config, rate: str):
    """Probability of zeroing an activation in the embedding and residual branches."""
    return {"model.dropout": rate}
