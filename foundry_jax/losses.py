"""LOSSES: training objectives, all of them functions of three numbers per token.

Validation never uses these: it is always the plain cross-entropy of `token_statistics`.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TokenStatistics:
    """What the logits say of each target, in nats, float32 [B, L]."""

    nll: jax.Array  # -log p(target)
    uniform_nll: jax.Array  # mean over the vocabulary of -log p
    log_z: jax.Array  # logsumexp of the logits


@flax.struct.dataclass
class LossScales:
    """The traced numbers of every loss, so that changing one does not recompile."""

    label_smoothing: jax.Array
    z_loss: jax.Array


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


def cross_entropy(statistics: TokenStatistics, scales: LossScales) -> jax.Array:
    """Returns the label-smoothed cross-entropy per token plus z_loss * log_z^2, in nats.

    Smoothing spreads its mass evenly over the whole vocabulary, target included (Szegedy et al. 2015,
    1512.00567); z-loss keeps the logits' scale in place (PaLM, 2204.02311, section 5).
    """
    smoothed = (1 - scales.label_smoothing) * statistics.nll + scales.label_smoothing * statistics.uniform_nll
    return smoothed + scales.z_loss * jnp.square(statistics.log_z)


LOSSES = {"cross_entropy": cross_entropy}
