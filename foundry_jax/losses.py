"""LOSSES: training objectives, functions of a few numbers per token or per pair of completions.

Validation never uses these: it is always the plain cross-entropy of `token_statistics`.
"""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

# Elements of one device. Up to WHOLE_LOGITS (512 MiB) all logits exist at once, above it PIECE_LOGITS at a time. CPU
# time of value and gradients in pieces, against at once: 1.24 at 2^24 logits, 0.80 at 2^27, 0.89 at 2^28, and within
# 0.1 of that for pieces of 2^23 to 2^26 (vocabularies of 8,192 and 128,256; 2 busy cores, jax 0.10.2, 2026-11).
WHOLE_LOGITS = 2**27
PIECE_LOGITS = 2**25

# Rows of the kernel's gradient that are summed at a time. With 2048 at once, a step over a kernel of [2048, 128256]
# takes three times the memory (0.30 of that of all logits, against 0.11; XLA:CPU, 2026-11).
KERNEL_ROWS = 512

SMALLEST_MISS = 1e-7  # of 1 - p in the focal loss: the gradient of its power is infinite at 0


@flax.struct.dataclass
class TokenStatistics:
    """What the logits say of each target, in nats, float32 [B, L]."""

    nll: jax.Array  # -log p(target)
    uniform_nll: jax.Array  # mean over the vocabulary of -log p
    log_z: jax.Array  # logsumexp of the logits


@flax.struct.dataclass
class PairStatistics:
    """What the model says of P pairs of completions, [P, 2]: the chosen one, the rejected one."""

    log_ratio: jax.Array  # log pi(completion | prompt) - log reference(completion | prompt), in nats
    length: jax.Array  # tokens of the completion

    @property
    def margin(self) -> jax.Array:
        """How much more the chosen one gained on the reference than the rejected one, in nats, [P]."""
        return self.log_ratio[:, 0] - self.log_ratio[:, 1]


@flax.struct.dataclass
class LossScales:
    """The traced numbers of every loss, so that changing one does not recompile."""

    label_smoothing: jax.Array
    z_loss: jax.Array
    focal_gamma: jax.Array
    dpo_beta: jax.Array


def token_statistics(logits_BLV: jax.Array, targets_BL: jax.Array) -> TokenStatistics:
    """Returns the statistics of float32 logits."""
    return TokenStatistics(*_statistics(logits_BLV, targets_BL))


@jax.custom_vjp
def _statistics(logits_BLV, targets_BL):
    return _statistics_forward(logits_BLV, targets_BL)[0]


def _statistics_forward(logits_BLV, targets_BL):
    log_z = jax.nn.logsumexp(logits_BLV, axis=-1)
    target_logit = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    statistics = (log_z - target_logit, log_z - jnp.mean(logits_BLV, axis=-1), log_z)
    return statistics, (logits_BLV, targets_BL, log_z)


def _statistics_backward(residuals, cotangents):
    """d nll = p - onehot, d uniform_nll = p - 1/V, d log_z = p: one fused pass over the logits."""
    logits_BLV, targets_BL, log_z = residuals
    d_nll, d_uniform, d_log_z = (c[..., None] for c in cotangents)
    V = logits_BLV.shape[-1]
    probs = jnp.exp(logits_BLV - log_z[..., None])
    onehot = jnp.arange(V, dtype=targets_BL.dtype)[None, None, :] == targets_BL[..., None]
    return (d_nll + d_uniform + d_log_z) * probs - jnp.where(onehot, d_nll, 0.0) - d_uniform / V, None


_statistics.defvjp(_statistics_forward, _statistics_backward)


def num_chunks(tokens: int, length: int, vocab_size: int) -> int:
    """Returns in how many chunks of its sequences a device should make the logits of this many tokens; 1: at once."""
    size = tokens * vocab_size
    return 1 if size <= WHOLE_LOGITS else min(-(-size // PIECE_LOGITS), length)


def unconstrained(x: jax.Array, *axes: str | None) -> jax.Array:
    """Returns x: the layout of a single device."""
    return x


def chunked_statistics(
    x_BLD: jax.Array,
    kernel_DV: jax.Array,
    targets_BL: jax.Array,
    *,
    num_chunks: int,
    shards: int = 1,
    constrain: Callable[..., jax.Array] = unconstrained,
) -> TokenStatistics:
    """Returns the statistics of the logits x @ kernel, of which only L / num_chunks tokens a row exist at a time.

    The backward pass computes them again: four matrix products instead of three.

    Args:
        x_BLD, kernel_DV: float32 or bfloat16; logits and the sum of the kernel's gradient are float32.
        shards: how many parts the batch is cut into; each sums its own gradient of the kernel, so that devices
            exchange it once and not once a chunk.
        constrain: (array, *logical axes) -> array, laid out over the mesh.
    """
    L = targets_BL.shape[1]
    padding = -L % num_chunks
    x_BLD, targets_BL = (jnp.pad(a, [(0, 0), (0, padding), (0, 0)][: a.ndim]) for a in (x_BLD, targets_BL))
    kernel_DV = constrain(kernel_DV, "activation_embed", "activation_vocab")
    statistics = _chunked(num_chunks, shards, constrain, x_BLD, kernel_DV, targets_BL)
    return TokenStatistics(*(a[:, :L] for a in statistics))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(num_chunks, shards, constrain, x_BLD, kernel_DV, targets_BL):
    return _chunked_forward(num_chunks, shards, constrain, x_BLD, kernel_DV, targets_BL)[0]


def _chunked_forward(num_chunks, shards, constrain, x_BLD, kernel_DV, targets_BL):
    def one(_, chunk):
        x_BLD, targets_BL = chunk
        return None, _statistics_forward(_logits(x_BLD, kernel_DV, constrain), targets_BL)[0]

    _, statistics = jax.lax.scan(one, None, (_cut(x_BLD, num_chunks), _cut(targets_BL, num_chunks)))
    statistics = tuple(_join(a) for a in statistics)
    return statistics, (x_BLD, kernel_DV, targets_BL, statistics[-1])


def _chunked_backward(num_chunks, shards, constrain, residuals, cotangents):
    x_BLD, kernel_DV, targets_BL, log_z_BL = residuals
    (D, V), dtype = kernel_DV.shape, kernel_DV.dtype

    def one(d_kernel_SDV, chunk):
        x_BLD, targets_BL, log_z_BL, *cotangents = chunk
        residuals = _logits(x_BLD, kernel_DV, constrain), targets_BL, log_z_BL
        d_logits_BLV = _statistics_backward(residuals, cotangents)[0].astype(dtype)
        d_x = (d_logits_BLV.reshape(-1, V) @ kernel_DV.T).reshape(x_BLD.shape)
        x_STD, d_logits_STV = x_BLD.reshape(shards, -1, D), d_logits_BLV.reshape(shards, -1, V)
        return constrain(_add_product(d_kernel_SDV, x_STD, d_logits_STV), *axes), d_x

    axes = ("activation_batch", "activation_embed", "activation_vocab")
    zeros_SDV = constrain(jnp.zeros((shards, D, V), jnp.float32), *axes)
    chunks = [_cut(a, num_chunks) for a in (x_BLD, targets_BL, log_z_BL, *cotangents)]
    d_kernel_SDV, d_x = jax.lax.scan(one, zeros_SDV, chunks)
    return _join(d_x), jnp.sum(d_kernel_SDV, axis=0).astype(dtype), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _add_product(total_SDV, x_STD, y_STV):
    """Returns total + x^T y, a few rows at a time: the product is as large as the kernel, and need not exist whole."""
    D = total_SDV.shape[1]
    size = next(size for size in range(min(D, KERNEL_ROWS), 0, -1) if D % size == 0)

    def add(i, total_SDV):
        x_STR = jax.lax.dynamic_slice_in_dim(x_STD, i * size, size, axis=2)
        product_SRV = jnp.einsum("STR,STV->SRV", x_STR, y_STV, preferred_element_type=jnp.float32)
        old_SRV = jax.lax.dynamic_slice_in_dim(total_SDV, i * size, size, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(total_SDV, old_SRV + product_SRV, i * size, axis=1)

    return jax.lax.fori_loop(0, D // size, add, total_SDV)


def _logits(x_BLD, kernel_DV, constrain):
    logits = (x_BLD.reshape(-1, x_BLD.shape[-1]) @ kernel_DV).astype(jnp.float32)
    return constrain(logits.reshape(*x_BLD.shape[:2], -1), "activation_batch", "activation_length", "activation_vocab")


def _cut(x_BL, num_chunks):
    """Returns [num_chunks, B, L / num_chunks, ...]: of every row one piece, so that a sharded batch stays in place."""
    return jnp.swapaxes(x_BL.reshape(x_BL.shape[0], num_chunks, -1, *x_BL.shape[2:]), 0, 1)


def _join(chunks):
    """Returns [B, L, ...] of what _cut cut."""
    chunks = jnp.swapaxes(chunks, 0, 1)
    return chunks.reshape(chunks.shape[0], -1, *chunks.shape[3:])


def cross_entropy(statistics: TokenStatistics, scales: LossScales) -> jax.Array:
    """Returns the label-smoothed cross-entropy per token plus z_loss * log_z^2, in nats.

    Smoothing spreads its mass evenly over the whole vocabulary, target included (Szegedy et al. 2015,
    1512.00567); z-loss keeps the logits' scale in place (PaLM, 2204.02311, section 5).
    """
    smoothed = (1 - scales.label_smoothing) * statistics.nll + scales.label_smoothing * statistics.uniform_nll
    return smoothed + _z_loss(statistics, scales)


def focal(statistics: TokenStatistics, scales: LossScales) -> jax.Array:
    """Returns (1 - p)^gamma * -log p per token plus z_loss * log_z^2, in nats: less weight on what is known already.

    Lin et al. 2017, 1708.02002. With gamma 0 it is the cross-entropy.
    """
    miss = jnp.maximum(-jnp.expm1(-statistics.nll), SMALLEST_MISS)
    return miss**scales.focal_gamma * statistics.nll + _z_loss(statistics, scales)


def _z_loss(statistics, scales):
    return scales.z_loss * jnp.square(statistics.log_z)


def dpo(statistics: PairStatistics, scales: LossScales) -> jax.Array:
    """Returns the direct preference loss per pair: Rafailov et al. 2023, 2305.18290, equation 7.

    Label smoothing e is the share of pairs that are taken to be the wrong way round (conservative DPO, Mitchell 2023).
    """
    reward, e = scales.dpo_beta * statistics.margin, scales.label_smoothing
    return -(1 - e) * jax.nn.log_sigmoid(reward) - e * jax.nn.log_sigmoid(-reward)


def ipo(statistics: PairStatistics, scales: LossScales) -> jax.Array:
    """Returns (margin - 1 / (2 beta))^2 per pair: Azar et al. 2023, 2310.12036, equation 17.

    The margin is of log-probabilities per token of the completion, as TRL has it: without that, the fixed distance
    of 1 / (2 beta) means less the longer the completions are.
    """
    per_token = statistics.log_ratio / jnp.maximum(statistics.length, 1)
    return jnp.square(per_token[:, 0] - per_token[:, 1] - 1 / (2 * scales.dpo_beta))


# Adding a loss: a function above, a line here, and a line in config.py that says what it is.
TOKEN_LOSSES: dict[str, Callable[[TokenStatistics, LossScales], jax.Array]] = {
    "cross_entropy": cross_entropy,
    "focal": focal,
}
PAIR_LOSSES: dict[str, Callable[[PairStatistics, LossScales], jax.Array]] = {
    "dpo": dpo,
    "ipo": ipo,
}
LOSSES = TOKEN_LOSSES | PAIR_LOSSES
