"""The one place where queries meet keys."""

import functools

import jax
import jax.numpy as jnp

from foundry_jax.model.mask import Mask

HIDDEN = -1e30  # logit of a masked key: exp(HIDDEN - max) is exactly 0, and no row of it becomes NaN


def attend(q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, *, scale: float) -> jax.Array:
    """Returns softmax(scale q k^T where the mask allows) v as y_BLNH; the softmax is float32.

    N is a multiple of K: query head n reads key/value head n // (N // K). v may have another head dim than q, k.
    """
    if _fits_flash_attention(q_BLNH, v_BSKH, mask):
        return jax.nn.dot_product_attention(q_BLNH, k_BSKH, v_BSKH, scale=scale, is_causal=True, implementation="cudnn")
    B, L, N, H = q_BLNH.shape
    K = k_BSKH.shape[2]
    # Queries of one key/value head are stacked along L, so that each head is one plain matrix product.
    q = jnp.swapaxes(q_BLNH.reshape(B, L, K, N // K, H), 1, 3).swapaxes(1, 2).reshape(B, K, N // K * L, H)
    k, v = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    y = _attend(q, k, v, mask.matrix(), scale)
    y = y.reshape(B, K, N // K, L, v.shape[-1]).transpose(0, 3, 1, 2, 4)
    return y.reshape(B, L, N, v.shape[-1])


def _fits_flash_attention(q: jax.Array, v: jax.Array, mask: Mask) -> bool:
    """Returns whether cuDNN's fused kernel computes this: a GPU, half precision, whole causal sequences."""
    return (
        jax.default_backend() == "gpu"
        and mask.contiguous
        and q.dtype == jnp.bfloat16
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and q.shape[1] > 1
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BKTH, k_BKSH, v_BKSH, mask_BLS, scale):
    """Attention of T = G*L stacked queries per key/value head.

    The backward pass is written out: with the probabilities kept and plain batched products it takes half
    the time on XLA:CPU of differentiating the einsum (31 ms against 61 ms at 8x256x6x64, jax 0.10.2).
    """
    return _attend_forward(q_BKTH, k_BKSH, v_BKSH, mask_BLS, scale)[0]


def _attend_forward(q, k, v, mask_BLS, scale):
    probs = _probabilities(q, k, mask_BLS, scale)
    return probs.astype(v.dtype) @ v, (q, k, v, probs)


def _attend_backward(scale, residuals, dy):
    q, k, v, probs = residuals
    dv = jnp.swapaxes(probs.astype(v.dtype), 2, 3) @ dy
    dprobs = (dy @ jnp.swapaxes(v, 2, 3)).astype(jnp.float32)
    dlogits = probs * (dprobs - jnp.sum(dprobs * probs, axis=-1, keepdims=True))
    dlogits = (dlogits * scale).astype(q.dtype)
    return dlogits @ k, jnp.swapaxes(dlogits, 2, 3) @ q, dv, None


def _probabilities(q, k, mask_BLS, scale):
    """Returns float32 probs_BKTS; a masked key gets exactly 0."""
    B, K, T, _ = q.shape
    L, S = mask_BLS.shape[1:]
    logits = (q @ jnp.swapaxes(k, 2, 3)).astype(jnp.float32) * scale
    logits = logits.reshape(B, K, T // L, L, S)
    logits = jnp.where(mask_BLS[:, None, None], logits, HIDDEN).reshape(B, K, T, S)
    logits = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


_attend.defvjp(_attend_forward, _attend_backward)
