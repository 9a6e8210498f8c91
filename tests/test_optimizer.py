"""Schedules against hand-computed rates; the chain against optax.adamw."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from foundry_jax import optimizer
from foundry_jax.config import SCHEDULES, load
from foundry_jax.optimizer import hyperparameters, learning_rate_at


def recipe(**changes):
    config = load("configs/tiny.py")
    numbers = {"learning_rate": 1.0, "min_learning_rate": 0.1, "warmup_steps": 4} | changes
    return dataclasses.replace(config, num_steps=11, optimizer=dataclasses.replace(config.optimizer, **numbers))


def rates(schedule):
    hyper = hyperparameters(recipe(schedule=schedule))
    return [float(learning_rate_at(jnp.int32(step), hyper)) for step in range(11)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, 0.93971, 0.775, 0.55, 0.325, 0.16029, 0.1]),
        # 5.5 of 11 steps decay, and the last of them is at the minimum
        ("wsd(decay_fraction=0.5)", [0.25, 0.5, 0.75, 1, 1, 0.91818, 0.75455, 0.59091, 0.42727, 0.26364, 0.1]),
        # 2.2 of 11 steps
        ("wsd", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.91818, 0.50909, 0.1]),
        ("wsd(0)", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 0.1]),
    ],
)
def test_the_rate_of_each_step(schedule, expected):
    np.testing.assert_allclose(rates(schedule), expected, atol=1e-5)


def test_the_numbers_of_a_schedule_come_in_order_or_by_name():
    for schedule, share in (("wsd", 0.2), ("wsd(0.3)", 0.3), (" wsd ( decay_fraction = 0.4 )", 0.4), ("cosine()", 0)):
        hyper = hyperparameters(recipe(schedule=schedule))
        assert hyper.decay_fraction == np.float32(share)
        assert list(SCHEDULES)[hyper.schedule] == schedule.strip().partition("(")[0].strip()


def test_every_schedule_has_a_test_and_no_warm_up_starts_at_the_peak():
    assert set(SCHEDULES) == {"constant", "linear", "cosine", "wsd"}
    assert float(learning_rate_at(jnp.int32(0), hyperparameters(recipe(warmup_steps=0)))) == 1.0


PARAMS = {
    "embed": {"embedding": jnp.ones((5, 3))},
    "unembed": {"kernel": jnp.ones((3, 5))},
    "block_0": {"norm": {"scale": jnp.ones(3)}, "mlp": {"up": {"kernel": jnp.full((3, 3), 2.0), "bias": jnp.ones(3)}}},
}


@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_weight_decay_spares_norms_biases_and_if_asked_embeddings(decay_embeddings):
    mask = optimizer.decay_mask(PARAMS, decay_embeddings=decay_embeddings)
    assert mask == {
        "embed": {"embedding": decay_embeddings},
        "unembed": {"kernel": decay_embeddings},
        "block_0": {"norm": {"scale": False}, "mlp": {"up": {"kernel": True, "bias": False}}},
    }


def gradients(params, step):
    """Returns gradients that differ between entries and steps."""
    return jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32) + step).reshape(x.shape), params)


def run_chain(name, config, num_steps=3):
    """Returns the parameters after a few steps whose hyperparameters are traced."""

    @jax.jit
    def update(params, state, grads, hyper, step):
        chain = optimizer.build(name, hyper, step, decay_embeddings=True)
        updates, state = chain.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    hyper = hyperparameters(config)
    params, state = PARAMS, optimizer.build(name, hyper, jnp.int32(0), decay_embeddings=True).init(PARAMS)
    for step in range(num_steps):
        params, state = update(params, state, gradients(params, step), hyper, jnp.int32(step))
    return params, update


def reference(transform, num_steps=3):
    params, state = PARAMS, transform.init(PARAMS)
    for step in range(num_steps):
        updates, state = transform.update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params


def mask(params):
    return optimizer.decay_mask(params, decay_embeddings=True)


@pytest.mark.parametrize("clip_norm", [0.0, 1.5])
def test_adamw_equals_optax_adamw_after_clipping(clip_norm):
    config = recipe(schedule="constant", warmup_steps=0, weight_decay=0.2, beta1=0.8, beta2=0.9, clip_norm=clip_norm)
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    oracle = optax.chain(clip, optax.adamw(1.0, 0.8, 0.9, 1e-8, weight_decay=0.2, mask=mask))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run_chain("adamw", config)[0], reference(oracle)
    )


def test_lion_equals_optax_lion():
    config = recipe(schedule="constant", warmup_steps=0, weight_decay=0.2, beta1=0.8, beta2=0.9, clip_norm=0.0)
    oracle = optax.lion(1.0, 0.8, 0.9, weight_decay=0.2, mask=mask)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run_chain("lion", config)[0], reference(oracle)
    )
