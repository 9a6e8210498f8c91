"""ATTENTIONS: how queries, keys and values are made. All of them hand those to core.attend."""

from foundry_jax.model.attention.grouped_query import GroupedQueryAttention
from foundry_jax.model.attention.latent import MultiHeadLatentAttention

ATTENTIONS = {
    "gqa": GroupedQueryAttention,
    "mla": MultiHeadLatentAttention,
}
