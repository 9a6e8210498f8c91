"""Experts in training: their losses, their figures, and the bias that balances them outside the gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundry_jax.config import load
from foundry_jax.model import stacking, transformer
from foundry_jax.model.mlp.moe import router_losses
from foundry_jax.model.transformer import Transformer
from foundry_jax.optimizer import hyperparameters
from foundry_jax.train_step import Program, init_state, train_step, unbox
from tests.variants import VOCAB, often, tiny

SOFTMAX = "softmax(experts=4, top_k=2, expert_dim=8, balance={balance}, z={z})"
SIGMOID = "sigmoid(experts=4, top_k=2, expert_dim=8, dense_layers=1, bias_rate={rate})"


def config_of(moe, **changes):
    model = tiny(moe=moe, **{name: x for name, x in changes.items() if name == "scan_layers"})
    config = dataclasses.replace(load("configs/tiny.py:warmup=0"), model=model)
    parts = changes.get("accumulation_steps", 1)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, accumulation_steps=parts))


@functools.cache
def programs(program):
    step_fn = jax.jit(functools.partial(train_step, program, base={}))
    return step_fn, jax.jit(lambda hyper: unbox(init_state(program, hyper)))


def step(config, batch):
    step_fn, init_fn = programs(Program.of(config))
    state = init_fn(hyperparameters(config))
    return state, *step_fn(state, batch, hyperparameters(config))


def batch_of(rows=4):
    tokens = np.random.default_rng(0).integers(0, VOCAB, (rows, 9)).astype(np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((rows, 8), np.float32)}


def test_the_training_loss_is_the_cross_entropy_and_the_weighted_router_losses():
    config = config_of(SOFTMAX.format(balance=0.5, z=0.25))
    state, _, metrics = step(config, batch_of())
    _, sown = Transformer(config.model).apply({"params": state.params}, batch_of()["inputs"], mutable=["router"])
    balance, z = router_losses(transformer.router_stats(sown["router"]))
    assert float(metrics["load_balance"]) == pytest.approx(float(balance), rel=1e-5)
    assert float(metrics["router_z"]) == pytest.approx(float(z), rel=1e-5)
    expected = float(metrics["cross_entropy"]) + 0.5 * float(balance) + 0.25 * float(z)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-6)


def test_router_losses_reach_the_router():
    def kernel(balance):
        _, after, _ = step(config_of(SOFTMAX.format(balance=balance, z=0)), batch_of())
        return after.opt_state[1].mu["block_0"]["mlp"]["router"]["kernel"]

    assert (kernel(0.0) != kernel(10.0)).any()


def test_figures_of_the_routers_add_up():
    _, _, metrics = step(config_of(SOFTMAX.format(balance=0, z=0)), batch_of())
    shares = [float(metrics[f"router_load_{expert}"]) for expert in range(4)]
    assert sum(shares) == pytest.approx(1)
    assert float(metrics["router_load_max"]) == pytest.approx(4 * max(shares), rel=1e-6)
    assert 0 < float(metrics["router_entropy"]) <= np.log(4) + 1e-6
    assert float(metrics["router_dropped"]) == 0


def test_rates_of_routers_share_a_program():
    one, two = (Program.of(config_of(SOFTMAX.format(balance=b, z=b))) for b in (0.1, 0.2))
    assert one == two == Program.of(config_of("softmax(4, 2, expert_dim=8)"))
    assert one != Program.of(config_of("softmax(4, 1, expert_dim=8)"))
    assert Program.of(config_of(SIGMOID.format(rate=0.1))) == Program.of(config_of(SIGMOID.format(rate=0.2)))


@pytest.mark.parametrize("scan_layers", often([False, True], [False]))
@pytest.mark.parametrize("parts", often([1, 2], [1]))
def test_a_balancing_bias_moves_against_the_load_by_its_rate(scan_layers, parts):
    config = config_of(SIGMOID.format(rate=0.25), scan_layers=scan_layers, accumulation_steps=parts)
    state, after, _ = step(config, batch_of())
    apply = functools.partial(Transformer(config.model).apply, mutable=["router"])
    _, sown = apply({"params": state.params}, batch_of()["inputs"])

    def bias(state, layer):
        params = state.params
        if scan_layers:
            params = stacking.restack(params, config.model, dataclasses.replace(config.model, scan_layers=False))
        return params[f"block_{layer}"]["mlp"]["router"]["balance_bias"]

    loads = transformer.router_stats(sown["router"]).load
    assert loads.shape == (2, 4)  # of three layers the first is dense
    for layer, load_E in zip((1, 2), loads, strict=True):
        expected = 0.25 * np.sign(np.mean(load_E) - load_E)
        np.testing.assert_array_equal(bias(after, layer) - bias(state, layer), expected)


def test_a_step_that_is_not_finite_leaves_the_bias_where_it_was():
    config = config_of(SIGMOID.format(rate=0.25))
    bad = batch_of() | {"weights": np.full((4, 8), np.nan, np.float32)}
    state, after, _ = step(config, bad)
    jax.tree.map(np.testing.assert_array_equal, state.params, after.params)


def test_experts_learn():
    config = config_of(SIGMOID.format(rate=0.01))
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-2))
    step_fn, init_fn = programs(Program.of(config))
    state = init_fn(hyperparameters(config))
    losses = []
    for _ in range(30):
        state, metrics = step_fn(state, batch_of(), hyperparameters(config))
        losses.append(float(metrics["cross_entropy"]))
    assert losses[-1] < 0.5 * losses[0]
    assert jnp.abs(state.params["block_1"]["mlp"]["router"]["balance_bias"]).max() > 0
