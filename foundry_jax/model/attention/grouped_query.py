"""Grouped-query attention; multi-head and multi-query attention are its two ends."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from foundry_jax.model.attention import cache as cache_lib
from foundry_jax.model.attention.core import attend
from foundry_jax.model.config import ModelConfig, divisors
from foundry_jax.model.layers import Linear, constrain, output_std
from foundry_jax.model.mask import Mask
from foundry_jax.model.position import rope
from foundry_jax.schema import require


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention: N query heads share K key/value heads.

    Ainslie et al. 2023, 2305.13245. K == N is multi-head attention (Vaswani 2017), K == 1 multi-query
    attention (Shazeer 2019, 1911.02150).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array, mask: Mask, cache: dict | None, slots_BL: jax.Array | None):
        """Returns (y_BLD, cache); with a cache, new keys and values are stored at slots_BL and all are read."""
        c = self.config
        heads = (c.num_heads, c.head_dim)
        kv_heads = (c.num_kv_heads, c.head_dim)
        q_BLNH = Linear((c.model_dim,), heads, ("embed", "heads", "head_dim"), c.dtype, name="query")(x_BLD)
        k_BLKH = Linear((c.model_dim,), kv_heads, ("embed", "kv_heads", "head_dim"), c.dtype, name="key")(x_BLD)
        v_BLKH = Linear((c.model_dim,), kv_heads, ("embed", "kv_heads", "head_dim"), c.dtype, name="value")(x_BLD)
        q_BLNH = rope(q_BLNH, mask.queries.positions_BL, c.rope_theta)
        k_BLKH = rope(k_BLKH, mask.queries.positions_BL, c.rope_theta)
        q_BLNH = constrain(q_BLNH, "activation_batch", "activation_length", "activation_heads", None)
        if cache is not None:
            cache = {
                "key": cache_lib.write(cache["key"], k_BLKH, slots_BL),
                "value": cache_lib.write(cache["value"], v_BLKH, slots_BL),
            }
            k_BLKH, v_BLKH = cache["key"], cache["value"]
        y_BLNH = attend(q_BLNH, k_BLKH, v_BLKH, mask, scale=c.head_dim**-0.5)
        out = Linear(
            heads, (c.model_dim,), ("heads", "head_dim", "embed"), c.dtype, output_std(c.num_layers), name="out"
        )
        return out(y_BLNH), cache

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raises UserError unless heads divide into groups and the head dim can rotate."""
        c = config
        require(
            c.num_heads % c.num_kv_heads == 0,
            f"model.num_heads={c.num_heads} must be a multiple of model.num_kv_heads={c.num_kv_heads}; "
            f"try num_kv_heads in {divisors(c.num_heads)}.",
        )
        require(c.head_dim % 2 == 0, f"model.head_dim={c.head_dim} must be even for RoPE; try {c.head_dim + 1}.")

    @staticmethod
    def init_cache(config: ModelConfig, batch_size: int, length: int, dtype: str) -> dict:
        """Returns an empty cache of one layer: keys and values [B, S, K, H]."""
        shape = (batch_size, length, config.num_kv_heads, config.head_dim)
        return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}

    @staticmethod
    def num_params(config: ModelConfig) -> int:
        """Returns the number of parameters of one layer."""
        return config.model_dim * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)

    @staticmethod
    def flops_per_token(config: ModelConfig, num_keys: float) -> float:
        """Returns the forward FLOPs of one layer for one token that sees num_keys keys."""
        pairs = 4 * config.num_heads * config.head_dim * num_keys
        return 2 * GroupedQueryAttention.num_params(config) + pairs

    @staticmethod
    def cache_size_per_token(config: ModelConfig) -> int:
        """Returns how many numbers one layer caches for one token."""
        return 2 * config.num_kv_heads * config.head_dim
