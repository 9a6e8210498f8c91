"""The planner's decisions, and that one device and eight compute the same."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from foundry_jax import compilation, forecast
from foundry_jax.config import load
from foundry_jax.errors import UserError
from foundry_jax.model.layers import constrain
from foundry_jax.optimizer import abstract_hyperparameters, hyperparameters
from foundry_jax.sharding import plan
from foundry_jax.train_step import Program, init_state
from tests.variants import VARIANTS, often, tiny

AUTO = load("configs/tiny.py").sharding
# every axis that fsdp may cut is a multiple of 8
SIZES = {"vocab_size": 40, "num_layers": 2, "model_dim": 32, "num_heads": 8, "num_kv_heads": 2, "head_dim": 8,
         "mlp_dim": 48, "kv_lora_rank": 16, "q_lora_rank": 8}  # fmt: skip


def sized(variant, **changes):
    """Returns a variant whose axes divide by 8, with its own choice of heads and ranks."""
    own = {"mha": {"num_kv_heads": 8}, "mqa": {"num_kv_heads": 1}, "mla": {"q_lora_rank": 0}}
    return tiny(variant, **SIZES | own.get(variant, {}) | changes)


def layout(**changes):
    return dataclasses.replace(AUTO, **changes)


@pytest.mark.parametrize(
    ("num_params", "num_devices", "config", "strategy", "mesh"),
    [
        (10**6, 1, AUTO, "none", (1, 1, 1)),
        (10**10, 1, AUTO, "none", (1, 1, 1)),
        (10**6, 8, AUTO, "ddp", (8, 1, 1)),
        (10**9 - 1, 8, AUTO, "ddp", (8, 1, 1)),
        (10**9, 8, AUTO, "fsdp", (1, 8, 1)),
        (10**10, 512, AUTO, "fsdp", (1, 512, 1)),
        (10**6, 8, layout(fsdp_min_params=10), "fsdp", (1, 8, 1)),
        (10**6, 8, layout(strategy="none"), "none", (1, 1, 1)),
        (10**6, 8, layout(strategy="fsdp"), "fsdp", (1, 8, 1)),
        (10**10, 8, layout(strategy="ddp"), "ddp", (8, 1, 1)),
        (10**10, 512, layout(strategy="fsdp", data=8, tensor=4), "fsdp", (8, 16, 4)),
        (10**6, 8, layout(tensor=2), "ddp", (4, 1, 2)),
        (10**6, 8, layout(fsdp=4, data=2), "fsdp", (2, 4, 1)),
    ],
)
def test_the_decision(num_params, num_devices, config, strategy, mesh):
    decision = plan(num_params, num_devices, config)
    assert (decision.strategy, (decision.data, decision.fsdp, decision.tensor)) == (strategy, mesh)
    assert decision.reason


@pytest.mark.parametrize(
    ("num_devices", "config", "message"),
    [
        (8, layout(strategy="fsdp", fsdp=16), "data=1, fsdp=16, tensor=1 needs 16 devices, but 8 are present"),
        (8, layout(tensor=3), "data=2, fsdp=1, tensor=3 needs 6 devices, but 8 are present"),
        (1, layout(strategy="fsdp", data=4), "needs 4 devices, but 1 are present"),
        (8, layout(strategy="none", tensor=2), "strategy=none uses one device, but a mesh of .*tensor=2 is asked for"),
        (8, layout(strategy="ddp", fsdp=2), "strategy=ddp has no fsdp axis, but fsdp=2; use fsdp"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(num_devices, config, message):
    with pytest.raises(UserError, match=message):
        plan(10**6, num_devices, config)


def test_where_a_parameter_goes():
    both = plan(1, 8, layout(fsdp=4, tensor=2))
    assert both.param_spec((32, 8, 4), ("embed", "heads", "head_dim")) == P("fsdp", "tensor", None)
    assert both.param_spec((8, 4, 32), ("heads", "head_dim", "embed")) == P("tensor", None, "fsdp")
    assert both.param_spec((32,), ("embed",)) == P("fsdp")
    assert both.param_spec((30, 7, 16), ("embed", "heads", "head_dim")) == P(None, None, "fsdp")  # neither divides
    assert both.param_spec((30, 7, 5), ("embed", "heads", "head_dim")) == P(None, None, None)
    assert plan(1, 8, AUTO).param_spec((32, 8), ("embed", "mlp")) == P(None, None)


def test_a_logical_axis_without_a_rule_is_an_error_not_a_silent_copy():
    with pytest.raises(UserError, match="Unknown logical axis 'embedd'. Did you mean 'embed'"):
        plan(1, 8, AUTO).param_spec((32,), ("embedd",))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_every_parameter_of_every_variant_has_a_rule_and_is_cut_by_fsdp(variant, scan_layers):
    config = sized(variant, scan_layers=scan_layers)
    program = Program.of(dataclasses.replace(load("configs/tiny.py"), model=config))
    boxed = jax.eval_shape(functools.partial(init_state, program), abstract_hyperparameters())
    specs = plan(1, 8, layout(strategy="fsdp")).specs(boxed.params)
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, P)):
        assert "fsdp" in spec, path


def test_the_models_constraints_are_not_no_ops():
    with plan(1, 8, AUTO).context():
        text = jax.jit(lambda x: constrain(x, "activation_batch", None)).lower(jnp.ones((8, 2))).as_text()
        assert "sharding" in text and "data" in text
    outside = jax.jit(lambda x: constrain(x, "activation_batch", None)).lower(jnp.ones((8, 2))).as_text()
    assert "sharding_constraint" not in outside


def losses_of(config, decision, num_steps):
    """Returns (losses, final state) of a few steps under a plan."""
    program, hyper = Program.of(config), hyperparameters(config)
    rng = np.random.default_rng(0)
    with decision.context():
        state = compilation.compile_init(program, decision)(hyper)
        step = compilation.compile_train_step(program, decision, (8, 8))
        losses = []
        for _ in range(num_steps):
            tokens = rng.integers(0, 40, (8, 9)).astype(np.int32)
            batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((8, 8), np.float32)}
            state, metrics = step(state, jax.device_put(batch, decision.batch_sharding()), hyper, {})
            losses.append(float(metrics["loss"]))
    return np.array(losses), state


@pytest.mark.parametrize("variant", often(VARIANTS, ["gqa"]))
def test_eight_devices_follow_the_loss_of_one(variant):
    config = load("configs/tiny.py:warmup=2,lr=3e-3")
    config = dataclasses.replace(config, model=sized(variant), num_steps=20)
    alone, state = losses_of(config, plan(1, 1, AUTO), 20)
    assert len(state.params["embed"]["embedding"].sharding.device_set) == 1
    for chosen in (AUTO, layout(strategy="fsdp"), layout(strategy="fsdp", data=2, tensor=2)):
        losses, _ = losses_of(config, plan(1, 8, chosen), 20)
        np.testing.assert_allclose(losses, alone, rtol=1e-5)


def bytes_per_device(tree):
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def test_under_fsdp_every_device_holds_an_eighth_of_parameters_moments_and_averages():
    config = dataclasses.replace(load("configs/tiny.py"), model=tiny("gqa", **SIZES))
    decision = plan(1, 8, layout(strategy="fsdp"))
    with decision.context():
        state = compilation.compile_init(Program.of(config), decision)(hyperparameters(config))
    for part in (state.params, state.ema_params, state.opt_state):
        assert bytes_per_device(part) == pytest.approx(sum(x.nbytes for x in jax.tree.leaves(part)) / 8, rel=0.001)


def test_under_ddp_every_device_holds_a_copy():
    config = dataclasses.replace(load("configs/tiny.py"), model=tiny("gqa", **SIZES))
    decision = plan(1, 8, AUTO)
    with decision.context():
        state = compilation.compile_init(Program.of(config), decision)(hyperparameters(config))
    assert bytes_per_device(state.params) == sum(x.nbytes for x in jax.tree.leaves(state.params))


def test_the_forecast_of_parameter_bytes_is_what_devices_hold():
    config = dataclasses.replace(load("configs/tiny.py"), model=tiny("gqa", **SIZES))
    for chosen in (AUTO, layout(strategy="fsdp")):
        config = dataclasses.replace(config, sharding=chosen)
        decision = forecast.plan_of(config, 8)
        with decision.context():
            state = compilation.compile_init(Program.of(config), decision)(hyperparameters(config))
        table = sum(row.bytes_per_device for row in forecast.param_table(config, decision))
        assert table == bytes_per_device(state.params) == forecast.memory(config, decision).params


def test_the_forecast_names_the_strategies_that_fit():
    config = dataclasses.replace(load("configs/baseline.py"), model=tiny(vocab_size=1000, model_dim=1024))
    everything = forecast.memory(config, forecast.plan_of(config, 8)).total
    assert set(forecast.strategies_that_fit(config, 8, everything)) == {"ddp", "fsdp"}
    assert set(forecast.strategies_that_fit(config, 8, everything - 1)) == {"fsdp"}
    assert forecast.strategies_that_fit(config, 8, 1000) == {}


@pytest.mark.parametrize("remat", often(["none", "dots", "full"], ["full"]))
def test_the_activation_estimate_is_within_a_factor_of_two_of_xlas(remat):
    # Recomputation is checked with scanned layers: unrolled, XLA:CPU recomputes every layer before it needs the first.
    base = load("configs/baseline.py")
    sizes = {"vocab_size": 512, "model_dim": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "mlp_dim": 320,
             "context_length": 128, "num_layers": 6, "remat": remat, "scan_layers": remat != "none"}  # fmt: skip
    data = dataclasses.replace(base.data, batch_size=8)
    config = dataclasses.replace(base, model=tiny("gqa", **sizes), data=data)
    decision = forecast.plan_of(config, 1)
    estimate = forecast.memory(config, decision)
    temporary = forecast.compiled_step(config, decision)["temporary_bytes"]
    assert 0.5 < temporary / (estimate.activations + estimate.gradients) < 2


def test_params_are_boxed_once():
    program = Program.of(dataclasses.replace(load("configs/tiny.py"), model=tiny()))
    boxed = jax.eval_shape(functools.partial(init_state, program), abstract_hyperparameters())
    for leaf in jax.tree.leaves(boxed.params, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        assert isinstance(leaf, nn.LogicallyPartitioned)
