"""The MLPs of dense layers, against formulas written out by hand."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundry_jax.errors import UserError
from foundry_jax.model.config import default_mlp_dim, is_gated
from foundry_jax.model.layers import INIT_STD
from foundry_jax.model.mlp import MLPS
from foundry_jax.model.mlp.dense import MLP
from tests.variants import tiny

erf = np.vectorize(math.erf)
FORMULAS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "glu": "sigmoid"}
PLAIN = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "relu2": "relu2"}


def fill(params, seed: int = 0):
    """Returns parameters of the same shapes, biases included, all of them far from zero."""
    leaves, tree = jax.tree.flatten(nn.meta.unbox(params))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype) for x in leaves])


def test_every_mlp_has_a_formula():
    assert set(GATED) | set(PLAIN) == set(MLPS)


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("mlp", MLPS)
def test_an_mlp_is_its_formula(mlp, bias):
    config = tiny(mlp=mlp, bias=bias)
    x_BLD = jax.random.normal(jax.random.key(1), (2, 3, config.model_dim))
    params = fill(jax.eval_shape(MLP(config).init, jax.random.key(0), x_BLD)["params"])
    found = jax.jit(MLP(config).apply)({"params": params}, x_BLD)
    x = np.asarray(x_BLD, np.float64)
    part = {
        name: lambda x, w=w: x @ np.asarray(w["kernel"], np.float64) + np.asarray(w.get("bias", 0), np.float64)
        for name, w in params.items()
    }
    if mlp in GATED:
        hidden = FORMULAS[GATED[mlp]](part["gate"](x)) * part["up"](x)
    else:
        hidden = FORMULAS[PLAIN[mlp]](part["up"](x))
    # Float32 rounds to 1e-6 of values up to 20; the two kinds of GELU differ by 1e-3 here.
    np.testing.assert_allclose(found, part["down"](hidden), atol=5e-5)
    assert sum(x.size for x in jax.tree.leaves(params)) == MLP.num_params(config)


def test_the_two_kinds_of_gelu_are_not_one():
    x = jnp.linspace(-3, 3, 61)
    assert 1e-4 < jnp.abs(MLPS["gelu"].function(x) - MLPS["gelu_tanh"].function(x)).max() < 1e-3


def test_default_widths_give_every_mlp_the_same_number_of_parameters():
    for model_dim in (20, 96, 384, 768, 1000):
        sizes = {MLPS[mlp].num_params(model_dim, default_mlp_dim(model_dim, mlp)) for mlp in MLPS}
        assert len(sizes) == 1


def test_the_config_and_the_table_agree_on_what_is_gated():
    assert {mlp: is_gated(mlp) for mlp in MLPS} == {mlp: activation.gated for mlp, activation in MLPS.items()}


def test_flops_are_those_of_the_matrix_products():
    config = tiny(mlp="gelu", mlp_dim=28, bias="all")
    assert MLP.flops_per_token(config) == 2 * 2 * 20 * 28


def test_the_output_matrix_starts_smaller_by_the_root_of_twice_the_depth():
    config = tiny(model_dim=64, mlp_dim=96, mlp="relu2", num_layers=2)
    params = nn.meta.unbox(MLP(config).init(jax.random.key(0), jnp.zeros((1, 1, 64))))["params"]
    assert jnp.std(params["down"]["kernel"]) == pytest.approx(INIT_STD / 2, rel=0.05)
    assert jnp.std(params["up"]["kernel"]) == pytest.approx(INIT_STD, rel=0.05)


def test_an_unknown_mlp_is_named_with_the_nearest_one():
    with pytest.raises(UserError, match=r"Unknown mlp 'swiglue'. Did you mean 'swiglu'"):
        MLP.check(tiny(mlp="swiglue"))
