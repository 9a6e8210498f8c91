"""Losses against numbers computed by hand and against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from foundry_jax.losses import LOSSES, LossScales, token_statistics

LOGITS = jnp.array([[[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]]])
TARGETS = jnp.array([[2, 1]])


def test_statistics_equal_numbers_computed_by_hand():
    found = token_statistics(LOGITS, TARGETS)
    log_z = np.log(np.exp(1) + np.exp(2) + np.exp(4))
    np.testing.assert_allclose(found.log_z, [[log_z, np.log(3)]], rtol=1e-6)
    np.testing.assert_allclose(found.nll, [[log_z - 4, np.log(3)]], rtol=1e-5)
    np.testing.assert_allclose(found.uniform_nll, [[log_z - 7 / 3, np.log(3)]], rtol=1e-6)


def test_cross_entropy_smoothing_and_z_loss_equal_optax_in_value_and_gradient():
    logits = jax.random.normal(jax.random.key(0), (3, 5, 11)) * 3
    targets = jax.random.randint(jax.random.key(1), (3, 5), 0, 11)
    epsilon, z = 0.13, 0.02

    def ours(x):
        losses = LOSSES["cross_entropy"](token_statistics(x, targets), LossScales(epsilon, z))
        return jnp.mean(losses * jnp.arange(1, 6, dtype=jnp.float32)[None])

    def oracle(x):
        smoothed = optax.smooth_labels(jax.nn.one_hot(targets, 11), epsilon)
        losses = optax.softmax_cross_entropy(x, smoothed) + z * jnp.square(jax.nn.logsumexp(x, axis=-1))
        return jnp.mean(losses * jnp.arange(1, 6, dtype=jnp.float32)[None])

    for mine, theirs in zip(jax.value_and_grad(ours)(logits), jax.value_and_grad(oracle)(logits), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-6)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_huge_logits_stay_finite(scale):
    value, grad = jax.value_and_grad(lambda x: jnp.sum(token_statistics(x, TARGETS).nll))(LOGITS * scale)
    assert jnp.isfinite(value) and jnp.isfinite(grad).all()
