"""Writing new tokens into a key/value cache."""

import jax
import jax.numpy as jnp


def write(cache_BSx: jax.Array, new_BLx: jax.Array, slots_BL: jax.Array) -> jax.Array:
    """Returns the cache with new_BLx stored at slots_BL of each row; the cache's dtype is kept."""
    rows = jnp.arange(cache_BSx.shape[0])[:, None]
    return cache_BSx.at[rows, slots_BL].set(new_BLx.astype(cache_BSx.dtype))
