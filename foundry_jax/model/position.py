"""POSITIONS: how the order of tokens reaches attention."""

import jax
import jax.numpy as jnp

POSITIONS = {"rope": "rotary position embedding of queries and keys"}


def rope(x_BLNH: jax.Array, positions_BL: jax.Array, theta: float, *, interleaved: bool = False) -> jax.Array:
    """Returns x rotated by its position. Su et al. 2021, 2104.09864.

    Dims (i, i + H/2) turn together, as in Hugging Face's Llama; `interleaved` pairs (2i, 2i + 1), as in
    DeepSeek and Meta's own Llama files. Frequencies are computed as torch does, in float32, so that the tables
    agree to the bit (float64 rounded to float32 moves a cosine by 4.6e-4 at position 8191).
    """
    half = x_BLNH.shape[-1] // 2
    frequencies = 1.0 / theta ** (jnp.arange(0, 2 * half, 2, dtype=jnp.float32) / (2 * half))
    angles_BLH = positions_BL.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    cos, sin = jnp.cos(angles_BLH)[:, :, None, :], jnp.sin(angles_BLH)[:, :, None, :]
    x = x_BLNH.astype(jnp.float32)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = (a * cos - b * sin, b * cos + a * sin)
    y = jnp.stack(turned, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    return y.astype(x_BLNH.dtype)
