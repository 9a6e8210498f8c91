"""NORMS: how activations are rescaled before each sub-layer."""

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
        # Llama casts before it multiplies; scale has rank 1, so it is lifted for rank_promotion="raise".
        return x.astype(self.dtype) * jnp.expand_dims(scale, range(x.ndim - 1)).astype(self.dtype)

    @staticmethod
    def num_params(dim: int) -> int:
        """Returns the number of parameters of one norm over `dim` entries."""
        return dim


NORMS = {"rmsnorm": RMSNorm}
