"""The one place where queries meet keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from foundry_jax.model.layout import Layout
from foundry_jax.model.mask import EMPTY, Causal, Mask, Placement, Window

HIDDEN = -1e30  # logit of a masked key: exp(HIDDEN - max) is exactly 0, and no row of it becomes NaN
BLOCK = 256  # slots of a cache that are read at a time


def attend(
    q_BLNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    *,
    scale: float,
    softcap: float = 0.0,
    slopes_N: np.ndarray | None = None,
) -> jax.Array:
    """Returns softmax(scale q k^T where the mask allows) v as y_BLNH; the softmax is float32.

    N is a multiple of K: query head n reads key/value head n // (N // K). v may have another head dim than q, k.
    A query at position EMPTY gets 0. Of an aligned mask only the pairs of its spec's arrangement are computed.

    Args:
        softcap: c > 0 turns the scaled products x into c tanh(x / c).
        slopes_N: ALiBi: each head adds its slope times (key position - query position) to those.
    """
    if _fits_flash_attention(q_BLNH, k_BSKH, v_BSKH, mask, softcap, slopes_N):
        return _flash_attention(q_BLNH, k_BSKH, v_BSKH, mask.spec, scale)
    if _reads_in_blocks(k_BSKH, mask):
        return _attend_in_blocks(q_BLNH, k_BSKH, v_BSKH, mask, scale, softcap, slopes_N)
    parts = mask.spec.arrangement(q_BLNH.shape[1]) if mask.aligned else ((mask.spec, Layout()),)
    results = [
        _attend_part(q_BLNH, k_BSKH, v_BSKH, mask.replace(spec=spec), layout, scale, softcap, slopes_N)
        for spec, layout in parts
    ]
    y_BLNH = results[0][0] if len(results) == 1 else _merge(results)
    if mask.contiguous:
        return y_BLNH
    return jnp.where((mask.queries.positions_BL != EMPTY)[:, :, None, None], y_BLNH, 0)


def _fits_flash_attention(q, k, v, mask: Mask, softcap, slopes_N) -> bool:
    """Returns whether cuDNN's fused kernel computes this: a GPU, half precision, whole causal sequences."""
    return (
        jax.default_backend() == "gpu"
        and mask.contiguous
        and isinstance(mask.spec, (Causal, Window))
        and not softcap
        and slopes_N is None
        and q.dtype == k.dtype == v.dtype == jnp.bfloat16
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and q.shape[1] > 1
    )


def _flash_attention(q_BLNH, k_BLKH, v_BLKH, spec: Causal | Window, scale):
    narrow = isinstance(spec, Window) and spec.size < q_BLNH.shape[1]
    window = (spec.size - 1, 0) if narrow else None  # how many keys before the query's own, and how many after
    return jax.nn.dot_product_attention(
        q_BLNH, k_BLKH, v_BLKH, scale=scale, is_causal=True, local_window_size=window, implementation="cudnn"
    )


def _reads_in_blocks(k_BSKH, mask: Mask) -> bool:
    """Returns whether a cache is read block by block: not on a GPU, where each turn of a loop waits for the host."""
    return not mask.aligned and k_BSKH.shape[1] >= BLOCK and jax.default_backend() != "gpu"


def _attend_in_blocks(q_BLNH, k_BSKH, v_BSKH, mask: Mask, scale, softcap, slopes_N):
    """Returns y_BLNH of queries that read a cache block by block, from the first to the last key that one may see.

    So a cache costs what is in it and not what would fit; and as a block of hidden keys adds exactly 0, no bit of the
    result depends on the cache's length, or on how far the other rows have come. It cannot be differentiated.
    """
    B, L, N, H = q_BLNH.shape
    S, K, G = k_BSKH.shape[1], k_BSKH.shape[2], N // k_BSKH.shape[2]
    q = q_BLNH.reshape(B, L, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * L, H)
    slopes_KG = None if slopes_N is None else jnp.asarray(slopes_N, jnp.float32).reshape(K, G)

    def block(i, state):
        start = jnp.minimum(i * BLOCK, S - BLOCK)
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=BLOCK, axis=1)
        k, v = (cut(x).swapaxes(1, 2) for x in (k_BSKH, v_BSKH))
        part = mask.replace(keys=Placement(cut(mask.keys.positions_BL)))
        is_new_S = start + jnp.arange(BLOCK) >= i * BLOCK  # the last block reaches back where S is no multiple
        bias = None if slopes_KG is None else (slopes_KG, part.distance())
        return _add_block(state, q, k, v, part.matrix() & is_new_S[None, None], bias, scale, softcap)

    shape = (B, K, G * L)
    state = jnp.full(shape, HIDDEN), jnp.zeros(shape), jnp.zeros((*shape, v_BSKH.shape[-1]))
    _, total, y = jax.lax.fori_loop(*_blocks_to_read(mask), block, state)
    y = (y / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]).astype(v_BSKH.dtype)
    return y.reshape(B, K, G, L, -1).transpose(0, 3, 1, 2, 4).reshape(B, L, N, -1)


def _blocks_to_read(mask: Mask) -> tuple[jax.Array, jax.Array]:
    """Returns (the first block that holds a key which a query may see, the one after the last)."""
    is_seen_S = jnp.any(mask.matrix(), axis=(0, 1))
    slots_S = jnp.arange(is_seen_S.size)
    first = jnp.min(jnp.where(is_seen_S, slots_S, is_seen_S.size)) // BLOCK
    return first, jnp.max(jnp.where(is_seen_S, slots_S // BLOCK + 1, 0))


def _add_block(state, q_BKTH, k_BKSH, v_BKSH, mask_BLS, bias, scale, softcap):
    """Returns (top, total, y) with a block of keys added: of the logits so far the largest, sum(exp(logits - top)), and
    the values weighted by that, in float32."""
    top, total, y = state
    logits = (q_BKTH @ jnp.swapaxes(k_BKSH, 2, 3)).astype(jnp.float32) * scale
    logits = _masked(softcap * jnp.tanh(logits / softcap) if softcap else logits, mask_BLS, bias)
    new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
    shift = jnp.maximum(new_top, HIDDEN / 2)  # a query that has seen no key yet: all its weights are 0
    weights, kept = jnp.exp(logits - shift[..., None]), jnp.exp(top - shift)
    added = jnp.matmul(weights.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
    return new_top, total * kept + jnp.sum(weights, axis=-1), y * kept[..., None] + added


def _attend_part(q_BLNH, k_BSKH, v_BSKH, mask: Mask, layout: Layout, scale, softcap, slopes_N):
    """Returns (y_BLNH, lse_BLN in float32) of the pairs that one layout computes; lse is log(sum(exp(logits)))."""
    length, K = q_BLNH.shape[1], k_BSKH.shape[2]
    positions_BS = mask.keys.positions_BL
    mask = mask.replace(
        queries=jax.tree.map(lambda x: layout.queries(x, EMPTY), mask.queries),
        keys=jax.tree.map(lambda x: layout.keys(x, positions_BS, EMPTY), mask.keys),
    )
    q_BCTNH = layout.queries(q_BLNH)
    B, C, T, N, H = q_BCTNH.shape
    G = N // K
    # Groups become rows of the batch, and the queries of one key/value head are stacked: each is one plain product.
    q = q_BCTNH.reshape(B * C, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B * C, K, G * T, H)
    k, v = (_as_rows(layout.keys(x, positions_BS), B).swapaxes(1, 2) for x in (k_BSKH, v_BSKH))
    bias = None
    if slopes_N is not None:
        bias = jnp.asarray(slopes_N, jnp.float32).reshape(K, G), _as_rows(mask.distance(), B)
    y, lse = _attend(q, k, v, _as_rows(mask.matrix(), B), bias, scale, softcap)
    y_BCTNH = y.reshape(B * C, K, G, T, -1).transpose(0, 3, 1, 2, 4).reshape(B, C, T, N, -1)
    lse_BCTN = lse.reshape(B * C, K, G, T).transpose(0, 3, 1, 2).reshape(B, C, T, N)
    return layout.restore(y_BCTNH, length), layout.restore(lse_BCTN, length)


def _as_rows(x_BCx, B: int):
    """Returns x with its C groups as B * C rows, or as one row if that stands for all."""
    if x_BCx.shape[:2] == (1, 1):
        return x_BCx[0]
    return jnp.broadcast_to(x_BCx, (B, *x_BCx.shape[1:])).reshape(-1, *x_BCx.shape[2:])


def _merge(results):
    """Returns y_BLNH over all keys from the (y_BLNH, lse_BLN) of parts; one that saw no key weighs exactly 0."""
    top_BLN = functools.reduce(jnp.maximum, [jax.lax.stop_gradient(lse_BLN) for _, lse_BLN in results])
    weights = [jnp.exp(lse_BLN - top_BLN) for _, lse_BLN in results]
    total_BLN = sum(weights)
    y_BLNH = sum((w / total_BLN)[..., None] * y for w, (y, _) in zip(weights, results, strict=True))
    return y_BLNH.astype(results[0][0].dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q_BKTH, k_BKSH, v_BKSH, mask_BLS, bias, scale, softcap):
    """Returns (y_BKTH, log-sum-exp of the logits) for T = G*L stacked queries per key/value head.

    The backward pass is written out: with the probabilities kept and plain batched products it takes half
    the time on XLA:CPU of differentiating the einsum (31 ms against 61 ms at 8x256x6x64, jax 0.10.2).
    """
    return _attend_forward(q_BKTH, k_BKSH, v_BKSH, mask_BLS, bias, scale, softcap)[0]


def _attend_forward(q, k, v, mask_BLS, bias, scale, softcap):
    logits = (q @ jnp.swapaxes(k, 2, 3)).astype(jnp.float32) * scale
    capped = jnp.tanh(logits / softcap) if softcap else None
    probs, lse = _probabilities(logits if capped is None else softcap * capped, mask_BLS, bias)
    return (probs.astype(v.dtype) @ v, lse), (q, k, v, probs, capped)


def _attend_backward(scale, softcap, residuals, cotangents):
    q, k, v, probs, capped = residuals
    dy, dlse = cotangents
    dv = jnp.swapaxes(probs.astype(v.dtype), 2, 3) @ dy
    dprobs = (dy @ jnp.swapaxes(v, 2, 3)).astype(jnp.float32)
    dlogits = probs * (dprobs - (jnp.sum(dprobs * probs, axis=-1) - dlse)[..., None])
    if softcap:
        dlogits *= 1 - jnp.square(capped)
    dlogits = (dlogits * scale).astype(q.dtype)
    return dlogits @ k, jnp.swapaxes(dlogits, 2, 3) @ q, dv, None, None


def _probabilities(logits_BKTS, mask_BLS, bias):
    """Returns float32 (probs_BKTS, lse_BKT); a masked key gets exactly 0."""
    logits = _masked(logits_BKTS, mask_BLS, bias)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # Where nobody reads the sum, XLA:CPU does all of this in one pass; reading it costs a tenth of the whole attention.
    return weights / total, (top + jnp.log(total))[..., 0]


def _masked(logits_BKTS, mask_BLS, bias):
    """Returns logits with ALiBi's bias, HIDDEN where the mask is False."""
    B, K, T, S = logits_BKTS.shape
    L = mask_BLS.shape[1]
    logits = logits_BKTS.reshape(B, K, T // L, L, S)
    if bias is not None:
        slopes_KG, distance_BLS = bias
        logits += slopes_KG[None, :, :, None, None] * distance_BLS[:, None, None]
    return jnp.where(mask_BLS[:, None, None], logits, HIDDEN).reshape(B, K, T, S)


_attend.defvjp(_attend_forward, _attend_backward)
