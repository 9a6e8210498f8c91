"""Grouped-query attention; multi-head and multi-query attention are its two ends."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from foundry_jax.model.attention.cache import Slots
from foundry_jax.model.attention.core import attend
from foundry_jax.model.config import ModelConfig, divisors
from foundry_jax.model.layers import Linear, constrain, output_std
from foundry_jax.model.mask import Mask
from foundry_jax.model.norm import NORMS
from foundry_jax.model.position import position_of
from foundry_jax.schema import require


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention: N query heads share K key/value heads.

    Ainslie et al. 2023, 2305.13245. K == N is multi-head attention (Vaswani 2017), K == 1 multi-query
    attention (Shazeer 2019, 1911.02150).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array, mask: Mask, cache: dict | None, slots: Slots | None):
        """Returns (y_BLD, cache); with a cache, new keys and values go to their slots."""
        c = self.config
        position, positions_BL = position_of(c), mask.queries.positions_BL
        q_BLNH = position.rotate(
            c, self._normed("query_norm", self._project("query", c.num_heads, x_BLD)), positions_BL
        )
        k_BLKH = position.rotate(c, self._normed("key_norm", self._project("key", c.num_kv_heads, x_BLD)), positions_BL)
        v_BLKH = self._project("value", c.num_kv_heads, x_BLD)
        q_BLNH = constrain(q_BLNH, "activation_batch", "activation_length", "activation_heads", None)
        if cache is not None:
            (key, k_BLKH), (value, v_BLKH) = slots.update(cache["key"], k_BLKH), slots.update(cache["value"], v_BLKH)
            cache = {"key": key, "value": value}
        y_BLNH = attend(
            q_BLNH, k_BLKH, v_BLKH, mask,
            scale=c.head_dim**-0.5, softcap=c.attention_softcap, slopes_N=position.slopes(c.num_heads),
        )  # fmt: skip
        out = Linear(
            (c.num_heads, c.head_dim), (c.model_dim,), ("heads", "head_dim", "embed"), c.dtype,
            output_std(c.num_layers), use_bias=c.bias in ("attention", "all"), name="out",
        )  # fmt: skip
        return out(y_BLNH), cache

    def _project(self, name: str, num_heads: int, x_BLD: jax.Array) -> jax.Array:
        c = self.config
        axes = ("embed", "heads" if name == "query" else "kv_heads", "head_dim")
        shape = (num_heads, c.head_dim)
        return Linear((c.model_dim,), shape, axes, c.dtype, use_bias=c.bias != "none", name=name)(x_BLD)

    def _normed(self, name: str, x_BLNH: jax.Array) -> jax.Array:
        """Returns x normed over each head's dims, or over all heads at once (QK-norm), before positions are added.

        Each head: Dehghani et al. 2023 (ViT-22B), 2302.05442, and Qwen3; all heads: OLMo 2, 2501.00656.
        """
        c = self.config
        if c.qk_norm == "none":
            return x_BLNH
        B, L, N, H = x_BLNH.shape
        if c.qk_norm == "head":
            return NORMS[c.norm](H, c.norm_epsilon, c.dtype, "head_dim", name=name)(x_BLNH)
        norm = NORMS[c.norm](N * H, c.norm_epsilon, c.dtype, "qk_norm", name=name)
        return norm(x_BLNH.reshape(B, L, N * H)).reshape(B, L, N, H)

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raises UserError unless heads divide into groups."""
        c = config
        require(
            c.num_heads % c.num_kv_heads == 0,
            f"model.num_heads={c.num_heads} must be a multiple of model.num_kv_heads={c.num_kv_heads}; "
            f"try num_kv_heads in {divisors(c.num_heads)}.",
        )

    @staticmethod
    def init_cache(config: ModelConfig, batch_size: int, length: int, dtype: str) -> dict:
        """Returns an empty cache of one layer: keys and values [B, S, K, H]."""
        shape = (batch_size, length, config.num_kv_heads, config.head_dim)
        return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}

    @staticmethod
    def num_params(config: ModelConfig) -> int:
        """Returns the number of parameters of one layer."""
        c = config
        queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        params = _num_kernel_params(c)
        if c.bias != "none":
            params += queries + 2 * keys
        if c.bias in ("attention", "all"):
            params += c.model_dim
        sizes = {"none": (), "head": (c.head_dim, c.head_dim), "whole": (queries, keys)}[c.qk_norm]
        return params + sum(NORMS[c.norm].num_params(size) for size in sizes)

    @staticmethod
    def flops_per_token(config: ModelConfig, num_keys: float) -> float:
        """Returns the forward FLOPs of one layer for one token that sees num_keys keys."""
        pairs = 4 * config.num_heads * config.head_dim * num_keys
        return 2 * _num_kernel_params(config) + pairs

    @staticmethod
    def cache_size_per_token(config: ModelConfig) -> int:
        """Returns how many numbers one layer caches for one token."""
        return 2 * config.num_kv_heads * config.head_dim


def _num_kernel_params(c: ModelConfig) -> int:
    return c.model_dim * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
