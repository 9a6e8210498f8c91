"""One step: what it may change, what recompiles it, what accumulation and averaging mean."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundry_jax import compilation, sharding
from foundry_jax.config import load
from foundry_jax.losses import LOSSES
from foundry_jax.model.transformer import unstack_layers
from foundry_jax.optimizer import OPTIMIZERS, hyperparameters
from foundry_jax.train_step import Program, eval_step, init_state, noise_scale, train_step, unbox
from tests.variants import VOCAB, tiny

ROWS, LENGTH = 4, 8


def config_of(argument="", **model):
    """Returns tiny.py with a much smaller model."""
    return dataclasses.replace(load(f"configs/tiny.py:{argument}"), model=tiny(**model))


def batch_of(seed=0, rows=ROWS):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, LENGTH + 1)).astype(np.int32)
    weights = (rng.random((rows, LENGTH)) < 0.7).astype(np.float32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


@functools.cache
def step_of(program):
    return jax.jit(functools.partial(train_step, program))


@functools.cache
def init_of(program):
    return jax.jit(lambda hyper: unbox(init_state(program, hyper)))


def begin(config):
    program, hyper = Program.of(config), hyperparameters(config)
    return step_of(program), init_of(program)(hyper), hyper


def test_training_lowers_the_loss_on_a_batch_it_sees_again_and_again():
    step, state, hyper = begin(config_of("warmup=1,lr=1e-2"))
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch_of(), hyper)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(VOCAB), abs=0.1)
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 30


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_optimizer_and_loss_changes_every_parameter(name, loss):
    config = config_of(f"optimizer={name},warmup=0")
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, name=loss))
    step, state, hyper = begin(config)
    new, _ = step(state, batch_of(), hyper)
    for path, change in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: a != b, new.params, state.params)
    ):
        assert change.any(), path


def test_a_target_of_weight_zero_changes_nothing():
    step, state, hyper = begin(config_of())
    batch = batch_of()
    other = dict(batch, targets=np.where(batch["weights"] == 0, (batch["targets"] + 1) % VOCAB, batch["targets"]))
    one, two = step(state, batch, hyper), step(state, other, hyper)
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_equal_those_of_the_whole_batch(parts):
    """Rows have different numbers of counted tokens, so a mean of means would differ."""
    whole, split = config_of("warmup=0"), config_of("warmup=0")
    split = dataclasses.replace(split, optimizer=dataclasses.replace(split.optimizer, accumulation_steps=parts))
    step, state, hyper = begin(whole)
    step_in_parts, _, _ = begin(split)
    (one, metrics), (two, metrics_in_parts) = step(state, batch_of(), hyper), step_in_parts(state, batch_of(), hyper)
    for name in ("loss", "cross_entropy", "grad_norm", "tokens"):
        assert float(metrics[name]) == pytest.approx(float(metrics_in_parts[name]), rel=1e-5), name
    # Adam's first moment after one step is proportional to the gradient
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), one.opt_state[1].mu, two.opt_state[1].mu)


def test_gradient_noise_scale_recovers_the_variance_of_known_gradients():
    """Gradients of single sequences are drawn around G; the estimates must be |G|^2 and tr(Sigma) on average."""
    rng = np.random.default_rng(0)
    G, sigma, rows, parts = np.array([3.0, -1.0, 2.0]), np.array([1.0, 2.0, 0.5]), 8, 4
    found = []
    for _ in range(20_000):
        per_row = G + sigma * rng.standard_normal((rows, 3))
        small = np.mean(np.sum(per_row.reshape(parts, rows // parts, 3).mean(axis=1) ** 2, axis=1))
        big = np.sum(per_row.mean(axis=0) ** 2)
        estimate = noise_scale(small, big, parts, rows)
        found.append((estimate["gradient_signal"], estimate["gradient_noise"]))
    signal, noise = np.mean(found, axis=0)
    assert signal == pytest.approx(np.sum(G**2), rel=0.02)
    assert noise == pytest.approx(np.sum(sigma**2), rel=0.03)


def test_accumulation_reports_the_noise_of_its_micro_batches():
    config = config_of()
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, accumulation_steps=2))
    step, state, hyper = begin(config)
    same = batch_of(rows=1)
    repeated = {name: np.repeat(x, ROWS, axis=0) for name, x in same.items()}
    _, metrics = step(state, repeated, hyper)
    assert abs(float(metrics["gradient_noise"])) < 1e-4 * float(metrics["gradient_signal"])
    _, metrics = step(state, batch_of(), hyper)
    assert float(metrics["gradient_noise"]) > 0


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e38])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(poison):
    step, state, hyper = begin(config_of())
    state, _ = step(state, batch_of(), hyper)
    bad = dict(batch_of(), weights=batch_of()["weights"] * np.float32(poison))
    after, metrics = step(state, bad, hyper)
    assert (int(after.step), int(after.skips), int(after.total_skips)) == (2, 1, 1)
    assert not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["grad_norm"])
    for name in ("params", "opt_state", "ema_params"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
    recovered, _ = step(after, batch_of(1), hyper)
    assert (int(recovered.skips), int(recovered.total_skips)) == (0, 1)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(recovered))


def test_averaged_weights_are_the_weighted_mean_of_all_weights_so_far():
    step, state, hyper = begin(config_of("warmup=0,ema=0.5"))
    expected = np.asarray(state.params["embed"]["embedding"])
    for t in range(4):
        state, _ = step(state, batch_of(t), hyper)
        decay = min(0.5, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["embed"]["embedding"])
    np.testing.assert_allclose(state.ema_params["embed"]["embedding"], expected, atol=1e-6)


def test_no_averaging_leaves_the_averaged_weights_equal_to_the_raw_ones():
    step, state, hyper = begin(config_of("ema=0"))
    state, _ = step(state, batch_of(), hyper)
    jax.tree.map(np.testing.assert_array_equal, state.params, state.ema_params)


def test_validation_is_plain_cross_entropy_whatever_the_training_loss():
    config = config_of("label_smoothing=0.3")
    step, state, hyper = begin(config)
    _, metrics = step(state, batch_of(), hyper)
    nats, count = eval_step(Program.of(config), state.params, batch_of())
    assert float(count) == batch_of()["weights"].sum()
    assert float(nats / count) == pytest.approx(float(metrics["cross_entropy"]), rel=1e-6)
    assert float(metrics["loss"]) != pytest.approx(float(metrics["cross_entropy"]), rel=1e-6)


RECIPES = ["", "lr=1e-4", "warmup=9", "weight_decay=0.3", "adam_betas=0.8:0.99", "grad_clip=0.1", "label_smoothing=0.1",
           "ema=0.9", "schedule=wsd", "steps=77"]  # fmt: skip


def test_no_number_of_the_recipe_recompiles_the_step():
    plan = sharding.plan(1, 1, load("configs/tiny.py").sharding)
    before = None
    for recipe in RECIPES:
        config = dataclasses.replace(config_of(recipe), seed=len(recipe))
        step = compilation.compile_train_step(Program.of(config), plan, (ROWS, LENGTH))
        state = compilation.compile_init(Program.of(config), plan)(hyperparameters(config))
        step(state, batch_of(), hyperparameters(config))
        if before is None:
            before = compilation.counts()["compiles"]
    assert compilation.counts()["compiles"] == before


def test_dropout_rates_share_a_program_but_no_dropout_is_another():
    programs = {rate: Program.of(config_of(f"dropout={rate}", dropout=rate)) for rate in (0.0, 0.1, 0.2)}
    assert programs[0.1] == programs[0.2] != programs[0.0]


def test_seeds_give_different_weights_and_the_same_seed_the_same():
    config = config_of()
    init = init_of(Program.of(config))
    one, again, two = (init(hyperparameters(dataclasses.replace(config, seed=seed))).params for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert (one["embed"]["embedding"] != two["embed"]["embedding"]).all()


def test_scanned_layers_start_from_the_same_weights_and_compute_the_same_step():
    """Switching scan_layers is a choice of compilation, not of experiment."""
    (step, state, hyper), (scan_step, scan_state, _) = begin(config_of()), begin(config_of(scan_layers=True))
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(scan_state.params, 2), state.params)
    after, scan_after = step(state, batch_of(), hyper)[0], scan_step(scan_state, batch_of(), hyper)[0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7),
        unstack_layers(scan_after.opt_state[1].mu, 2),
        after.opt_state[1].mu,
    )
