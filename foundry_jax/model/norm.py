"""NORMS: how activations are rescaled around each sub-layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from foundry_jax.model.layers import logical


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale, computed in float32. Zhang & Sennrich 2019, 1910.07467."""

    dim: int
    epsilon: float
    dtype: str
    axis: str = "embed"  # logical name of the normalised axis

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., dim] to [..., dim] in the compute dtype."""
        scale = self.param("scale", logical(nn.initializers.ones, self.axis), (self.dim,), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        # Llama casts before it multiplies.
        return x.astype(self.dtype) * _lift(scale, x.ndim).astype(self.dtype)

    @staticmethod
    def num_params(dim: int) -> int:
        """Returns the number of parameters of one norm over `dim` entries."""
        return dim


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, in float32. Ba et al. 2016, 1607.06450."""

    dim: int
    epsilon: float
    dtype: str
    axis: str = "embed"
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., dim] to [..., dim] in the compute dtype."""
        scale = self.param("scale", logical(nn.initializers.ones, self.axis), (self.dim,), jnp.float32)
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        x = x * _lift(scale, x.ndim)
        if self.use_bias:
            bias = self.param("bias", logical(nn.initializers.zeros, self.axis), (self.dim,), jnp.float32)
            x = x + _lift(bias, x.ndim)
        return x.astype(self.dtype)

    @staticmethod
    def num_params(dim: int) -> int:
        """Returns the number of parameters of one norm over `dim` entries."""
        return 2 * dim


class LayerNormWithoutBias(LayerNorm):
    """LayerNorm with a scale alone, as in MPT and PaLM."""

    use_bias: bool = False

    @staticmethod
    def num_params(dim: int) -> int:
        """Returns the number of parameters of one norm over `dim` entries."""
        return dim


def _lift(vector: jax.Array, ndim: int) -> jax.Array:
    """Returns the vector as [1, ..., 1, dim]: ranks must be equal under rank_promotion="raise"."""
    return jnp.expand_dims(vector, range(ndim - 1))


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm, "layernorm_nobias": LayerNormWithoutBias}
