"""Multi-head latent attention: keys and values are read from one small latent per token."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from foundry_jax.model.attention.cache import Slots
from foundry_jax.model.attention.core import attend
from foundry_jax.model.config import ModelConfig
from foundry_jax.model.layers import Linear, constrain, output_std
from foundry_jax.model.mask import Mask
from foundry_jax.model.norm import RMSNorm
from foundry_jax.model.position import logit_temperature, position_of

LATENT_NORM_EPSILON = 1e-6  # DeepSeek's latent norms use it whatever the model's own epsilon


class MultiHeadLatentAttention(nn.Module):
    """Multi-head latent attention: low-rank queries and key/values, and a decoupled rotary key shared by all heads.

    DeepSeek-V2, 2405.04434, section 2.1; DeepSeek-V3, 2412.19437. R is kv_lora_rank. Only the latent and the
    rotary key are cached; decoding absorbs the up-projections into query and output, so keys and values
    are never materialised for the cached tokens. No norm stands between latent and up-projection: it is exact.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array, mask: Mask, cache: dict | None, slots: Slots | None):
        """Returns (y_BLD, cache); with a cache, new latents go to their slots."""
        c = self.config
        position, positions_BL = position_of(c), mask.queries.positions_BL
        q_nope_BLNH, q_rope_BLNH = jnp.split(self._queries(x_BLD), [c.qk_nope_head_dim], axis=-1)
        q_rope_BLNH = position.rotate(c, q_rope_BLNH, positions_BL, interleaved=True)
        down = Linear(
            (c.model_dim,), (c.kv_lora_rank + c.qk_rope_head_dim,), ("embed", "kv_lora"), c.dtype, name="kv_down"
        )
        latent_BLR, k_rope_BLH = jnp.split(down(x_BLD), [c.kv_lora_rank], axis=-1)
        latent_BLR = self._norm("kv_norm", c.kv_lora_rank, "kv_lora")(latent_BLR)
        k_rope_BLH = position.rotate(c, k_rope_BLH[:, :, None], positions_BL, interleaved=True)[:, :, 0]
        up_shape = (c.num_heads, c.qk_nope_head_dim + c.v_head_dim)
        up = Linear((c.kv_lora_rank,), up_shape, ("kv_lora", "heads", "head_dim"), c.dtype, name="kv_up")
        scale = (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5 * logit_temperature(c)
        options = {"scale": scale, "softcap": c.attention_softcap, "slopes_N": position.slopes(c.num_heads)}
        if cache is None:
            k_nope_BLNH, v_BLNH = jnp.split(up(latent_BLR), [c.qk_nope_head_dim], axis=-1)
            k_rope_BLNH = jnp.broadcast_to(k_rope_BLH[:, :, None], (*k_nope_BLNH.shape[:3], c.qk_rope_head_dim))
            q_BLNH = jnp.concatenate([q_nope_BLNH, q_rope_BLNH], axis=-1)
            k_BLNH = jnp.concatenate([k_nope_BLNH, k_rope_BLNH], axis=-1)
            q_BLNH = constrain(q_BLNH, "activation_batch", "activation_length", "activation_heads", None)
            y_BLNH = attend(q_BLNH, k_BLNH, v_BLNH, mask, **options)
        else:
            latent, latent_BSR = slots.update(cache["latent"], latent_BLR)
            key_rope, k_rope_BSH = slots.update(cache["key_rope"], k_rope_BLH)
            cache = {"latent": latent, "key_rope": key_rope}
            key_up_RNH, value_up_RNH = jnp.split(up.kernel(), [c.qk_nope_head_dim], axis=-1)
            q_BLNR = jnp.einsum("BLNH,RNH->BLNR", q_nope_BLNH, key_up_RNH)
            q_BLNH = jnp.concatenate([q_BLNR, q_rope_BLNH], axis=-1)
            k_BSH = jnp.concatenate([latent_BSR, k_rope_BSH], axis=-1)
            y_BLNR = attend(q_BLNH, k_BSH[:, :, None], latent_BSR[:, :, None], mask, **options)
            y_BLNH = jnp.einsum("BLNR,RNH->BLNH", y_BLNR, value_up_RNH)
        out_axes = ("heads", "head_dim", "embed")
        heads = (c.num_heads, c.v_head_dim)
        out = Linear(heads, (c.model_dim,), out_axes, c.dtype, output_std(c.num_layers), name="out")
        return out(y_BLNH), cache

    def _queries(self, x_BLD):
        """Returns queries [B, L, N, nope + rope], through a normed low-rank latent if q_lora_rank is set."""
        c = self.config
        out_shape = (c.num_heads, c.qk_nope_head_dim + c.qk_rope_head_dim)
        if c.q_lora_rank == 0:
            return Linear((c.model_dim,), out_shape, ("embed", "heads", "head_dim"), c.dtype, name="query")(x_BLD)
        latent = Linear((c.model_dim,), (c.q_lora_rank,), ("embed", "q_lora"), c.dtype, name="query_down")(x_BLD)
        latent = self._norm("query_norm", c.q_lora_rank, "q_lora")(latent)
        return Linear((c.q_lora_rank,), out_shape, ("q_lora", "heads", "head_dim"), c.dtype, name="query_up")(latent)

    def _norm(self, name: str, dim: int, axis: str) -> RMSNorm:
        return RMSNorm(dim, LATENT_NORM_EPSILON, self.config.dtype, axis, name=name)

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raises nothing: every size fits."""

    @staticmethod
    def init_cache(config: ModelConfig, batch_size: int, length: int, dtype: str) -> dict:
        """Returns an empty cache of one layer: the latent [B, S, R] and the rotary key [B, S, H]."""
        return {
            "latent": jnp.zeros((batch_size, length, config.kv_lora_rank), dtype),
            "key_rope": jnp.zeros((batch_size, length, config.qk_rope_head_dim), dtype),
        }

    @staticmethod
    def num_params(config: ModelConfig) -> int:
        """Returns the number of parameters of one layer, latent norms included."""
        norms = RMSNorm.num_params(config.kv_lora_rank)
        if config.q_lora_rank:
            norms += RMSNorm.num_params(config.q_lora_rank)
        return _num_kernel_params(config) + norms

    @staticmethod
    def flops_per_token(config: ModelConfig, num_keys: float) -> float:
        """Returns the forward FLOPs of one layer for one token that sees num_keys keys, without a cache."""
        dims = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        return 2 * _num_kernel_params(config) + 2 * config.num_heads * dims * num_keys

    @staticmethod
    def cache_size_per_token(config: ModelConfig) -> int:
        """Returns how many numbers one layer caches for one token."""
        return config.kv_lora_rank + config.qk_rope_head_dim


def _num_kernel_params(c: ModelConfig) -> int:
    query_out = c.num_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    query = c.q_lora_rank * (c.model_dim + query_out) if c.q_lora_rank else c.model_dim * query_out
    down = c.model_dim * (c.kv_lora_rank + c.qk_rope_head_dim)
    up = c.kv_lora_rank * c.num_heads * (c.qk_nope_head_dim + c.v_head_dim)
    return query + down + up + c.num_heads * c.v_head_dim * c.model_dim
