"""Mixture of experts, against plain loops over tokens and experts, and against losses computed by hand."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundry_jax import sharding
from foundry_jax.config import ShardingConfig
from foundry_jax.errors import UserError
from foundry_jax.model.mlp import MLPS, ROUTERS, grouped, moe
from foundry_jax.model.mlp.dense import MLP
from foundry_jax.model.mlp.moe import (
    MixtureOfExperts,
    RouterStats,
    balance_bias_update,
    moe_of,
    router_losses,
    router_metrics,
)
from tests.variants import tiny

SOFTMAX = "softmax(experts=5, top_k=2, expert_dim=12)"
CALLS = {
    "softmax": SOFTMAX,
    "softmax_unnormalized": "softmax_unnormalized(6, top_k=2, expert_dim=12, scale=1.5, groups=3, top_groups=2)",
    "sigmoid": "sigmoid(experts=8, top_k=3, expert_dim=12, shared=2, scale=2.5, groups=4, top_groups=2)",
}
ONE_MATRIX = {"mlp": "relu2"}  # fewer programs to compile where the activation does not matter
B, L, D = 3, 8, 20
routers = pytest.mark.parametrize("router", CALLS)


def inputs(seed: int = 0, shape=(B, L, D)):
    return jax.random.normal(jax.random.key(seed), shape)


@functools.cache
def params_of(config, seed: int = 0):
    """Returns parameters far from zero and from each other, the balance bias large enough to change choices."""
    x_BLD = jnp.zeros((1, 1, config.model_dim))
    shapes = jax.eval_shape(MixtureOfExperts(config).init, jax.random.key(0), x_BLD, jnp.ones((1, 1), bool))
    leaves, tree = jax.tree.flatten(nn.meta.unbox(shapes)["params"])
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) for x in leaves])


@functools.cache
def program(config):
    """Returns the compiled (params, x_BLD, real_BL) -> (y_BLD, RouterStats)."""

    def run(params, x_BLD, real_BL):
        y_BLD, variables = MixtureOfExperts(config).apply({"params": params}, x_BLD, real_BL, mutable=["router"])
        return y_BLD, variables["router"]["stats"]

    return jax.jit(run)


def run(config, x_BLD, real_BL=None, params=None):
    real_BL = jnp.ones((1, x_BLD.shape[1]), bool) if real_BL is None else real_BL
    return program(config)(params_of(config) if params is None else params, x_BLD, real_BL)


def route_one(router, logits, bias):
    """Returns {expert: weight} of one token, in numpy, as the papers say it."""
    E, k = router.experts, router.top_k
    if type(router) is ROUTERS["sigmoid"]:
        scores = 1 / (1 + np.exp(-logits))
        choice = scores + bias
    else:
        scores = choice = np.exp(logits) / np.exp(logits).sum()
    groups = getattr(router, "groups", 1)
    members = np.split(np.arange(E), groups)
    best = 2 if type(router) is ROUTERS["sigmoid"] else 1
    value = [np.sort(choice[group])[::-1][:best].sum() for group in members]
    allowed = np.concatenate([members[g] for g in np.argsort(value)[::-1][: getattr(router, "top_groups", 1)]])
    chosen = sorted(allowed, key=lambda e: -choice[e])[:k]
    weights = scores[chosen] * router.scale
    if type(router) is not ROUTERS["softmax_unnormalized"]:
        weights = weights / scores[chosen].sum()
    return dict(zip(chosen, weights, strict=True))


def loop_over_tokens(config, params, x_BLD):
    """Returns (y_BLD, chosen experts of each token) with nothing but loops, in float64."""
    router, activation = moe_of(config), MLPS[config.mlp]
    params = jax.tree.map(lambda w: np.asarray(w, np.float64), params)

    def mlp(kernels, x):
        hidden = activation(*[jnp.asarray(x @ kernels[name]["kernel"]) for name in activation.names])
        return np.asarray(hidden, np.float64) @ kernels["down"]["kernel"]

    y_ND, chosen = [], []
    for x in np.asarray(x_BLD, np.float64).reshape(-1, D):
        logits = x @ params["router"]["kernel"]
        weights = route_one(router, logits, params["router"].get("balance_bias", np.zeros(router.experts)))
        one = [w * mlp(jax.tree.map(lambda p, e=e: p[e], params["experts"]), x) for e, w in weights.items()]
        y_ND.append(sum(one) + (mlp(params["shared"], x) if router.shared else 0))
        chosen.append(set(weights))
    return np.stack(y_ND).reshape(x_BLD.shape), chosen


def all_experts(config, params, x_BLD):
    """Returns y_BLD by computing every expert for every token, weighted by zero where it was not chosen."""
    router, activation = moe_of(config), MLPS[config.mlp]
    logits = jnp.einsum("BLD,DE->BLE", x_BLD, params["router"]["kernel"])
    routing = router.route(logits, params["router"].get("balance_bias"))
    weights_BLE = jnp.sum(jax.nn.one_hot(routing.experts, router.experts) * routing.weights[..., None], axis=-2)
    kernels = params["experts"]
    hidden = activation(*[jnp.einsum("BLD,EDF->BLEF", x_BLD, kernels[name]["kernel"]) for name in activation.names])
    y_BLD = jnp.einsum("BLEF,EFD,BLE->BLD", hidden, kernels["down"]["kernel"], weights_BLE)
    if router.shared:
        shared = params["shared"]
        y_BLD += activation(*[x_BLD @ shared[name]["kernel"] for name in activation.names]) @ shared["down"]["kernel"]
    return y_BLD


@routers
def test_output_and_counts_equal_a_loop_over_tokens_and_experts(router):
    config = tiny(moe=CALLS[router], mlp="geglu_tanh" if router == "softmax" else "swiglu")
    x_BLD = inputs()
    y_BLD, stats = run(config, x_BLD)
    expected, chosen = loop_over_tokens(config, params_of(config), x_BLD)
    np.testing.assert_allclose(y_BLD, expected, atol=2e-5)  # |y| is about 10, float32 rounds to 1e-6 of it
    counts = [sum(e in experts for experts in chosen) for e in range(moe_of(config).experts)]
    np.testing.assert_array_equal(stats.load, counts)
    assert (stats.tokens, stats.dropped) == (B * L, 0)


def test_the_balance_bias_moves_choices_but_not_weights():
    config = tiny(moe="sigmoid(experts=4, top_k=4, expert_dim=12)", **ONE_MATRIX)
    moved = params_of(config) | {"router": params_of(config)["router"] | {"balance_bias": jnp.array([3.0, -9, 0, 5])}}
    before, after = run(config, inputs())[0], run(config, inputs(), params=moved)[0]
    np.testing.assert_allclose(before, after, atol=1e-5)  # all four are chosen either way, in another order
    config = tiny(moe="sigmoid(experts=4, top_k=1, expert_dim=12)", **ONE_MATRIX)
    _, stats = run(config, inputs(), params=moved)
    np.testing.assert_array_equal(stats.load, [0, 0, 0, B * L])


@routers
def test_gradients_equal_those_of_computing_every_expert(router):
    config = tiny(moe=CALLS[router], mlp="gelu")
    params, x_BLD = params_of(config), inputs()
    real_BL, cotangent = jnp.ones((1, L), bool), inputs(7)

    def loss(function):
        return jax.jit(jax.grad(lambda p, x: jnp.sum(function(p, x) * cotangent), argnums=(0, 1)))

    found = loss(lambda p, x: MixtureOfExperts(config).apply({"params": p}, x, real_BL))(params, x_BLD)
    expected = loss(functools.partial(all_experts, config))(params, x_BLD)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(jnp.abs(b).max())), err_msg=str(path))
    if router == "sigmoid":
        np.testing.assert_array_equal(found[0]["router"]["balance_bias"], 0.0)


@pytest.mark.parametrize("implementation", grouped.IMPLEMENTATIONS)
def test_grouped_products_equal_one_product_a_group(implementation, monkeypatch):
    monkeypatch.setattr(grouped, "window_size", lambda *_: 8)
    sizes = [11, 0, 1, 16, 0]  # two windows, none, one row, exactly two windows, none
    E, M, F = len(sizes), sum(sizes), 6
    rng = np.random.default_rng(0)
    x_PD, w_EDF, dy_PF = (rng.normal(size=s).astype(np.float32) for s in ((M + 8, D), (E, D, F), (M + 8, F)))

    @jax.jit
    def both(x_PD, w_EDF, dy_PF, sizes_E):
        groups = grouped.arrange(sizes_E, M)
        y, vjp = jax.vjp(lambda x, w: grouped.grouped_matmul(x, w, groups, implementation), x_PD, w_EDF)
        return y, *vjp(dy_PF)

    if implementation == "ragged":
        dy_PF[M:] = 0.0  # only windows know where the last group ends
    y, dx, dw = both(x_PD, w_EDF, dy_PF, jnp.array(sizes))
    start = 0
    for e, size in enumerate(sizes):
        rows = slice(start, start + size)
        np.testing.assert_allclose(y[rows], x_PD[rows] @ w_EDF[e], atol=1e-5)
        np.testing.assert_allclose(dx[rows], dy_PF[rows] @ w_EDF[e].T, atol=1e-5)
        np.testing.assert_allclose(dw[e], x_PD[rows].T @ dy_PF[rows], atol=1e-5)
        start += size


@pytest.mark.parametrize(("num_rows", "num_groups", "window"), [(48, 4, 8), (2, 8, 8), (100, 7, 16), (64, 1, 64)])
def test_windows_suffice_for_any_division_into_groups(num_rows, num_groups, window):
    rng = np.random.default_rng(0)
    needed = 0
    for _ in range(200):
        cuts = np.sort(rng.integers(0, num_rows + 1, num_groups - 1))
        sizes = np.diff([0, *cuts, num_rows])
        needed = max(needed, sum(-(-size // window) for size in sizes))
    ones = min(num_groups, num_rows) - 1  # the worst case: as many groups of one row as there can be
    needed = max(needed, ones + -(-(num_rows - ones) // window))
    assert needed <= grouped.num_windows(num_rows, num_groups, window) <= needed + 1


def test_wrong_window_counts_show_up_as_dropped_assignments(monkeypatch):
    config = tiny(moe=SOFTMAX, num_layers=1, **ONE_MATRIX)  # another config than in other tests: its own program
    monkeypatch.setattr(grouped, "window_size", lambda *_: 8)
    monkeypatch.setattr(grouped, "num_windows", lambda *_: 3)
    _, stats = run(config, inputs())
    sizes = [int(size) for size in stats.load]
    covered, windows = 0, 3
    for size in sizes:  # windows go to the experts in order
        used = min(windows, -(-size // 8))
        covered, windows = covered + min(size, 8 * used), windows - used
    assert covered < sum(sizes) == 2 * B * L
    assert stats.dropped == sum(sizes) - covered
    assert router_metrics(stats)["dropped"] == pytest.approx(1 - covered / sum(sizes))


@routers
def test_a_token_does_not_depend_on_any_other_token_bit_for_bit(router):
    config = tiny(moe=CALLS[router], **ONE_MATRIX)
    x_BLD = inputs()
    before, _ = run(config, x_BLD)
    for seed, t in enumerate((1, 4, L - 1)):
        after, _ = run(config, x_BLD.at[:, t:].set(inputs(seed + 1)[:, t:]))
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        after, _ = run(config, inputs(seed + 1).at[1].set(x_BLD[1]))
        np.testing.assert_array_equal(before[1], after[1])


def test_a_token_does_not_depend_on_any_other_token_in_several_large_windows():
    config = tiny(model_dim=64, moe="softmax(experts=4, top_k=2, expert_dim=96)", mlp="swiglu")
    x_BLD = inputs(shape=(2, 300, 64))
    before, stats = run(config, x_BLD)
    changed = x_BLD.at[:, 150:].set(x_BLD[:1, :1])  # they all go to the same two experts
    after, changed_stats = run(config, changed)
    assert jnp.abs(stats.load - changed_stats.load).max() > grouped.window_size(1200, 4, "cpu")
    np.testing.assert_array_equal(before[:, :150], after[:, :150])


def test_padding_is_left_out_of_statistics_and_losses():
    config = tiny(moe=CALLS["sigmoid"], **ONE_MATRIX)
    x_BLD = inputs()
    real_BL = jnp.arange(L)[None, :] < jnp.array([8, 3, 5])[:, None]
    _, stats = run(config, x_BLD, real_BL)
    _, other = run(config, jnp.where(real_BL[..., None], x_BLD, 10 * inputs(3)), real_BL)
    jax.tree.map(np.testing.assert_array_equal, stats, other)
    tokens = jnp.concatenate([x_BLD[b, :n] for b, n in enumerate((8, 3, 5))])  # 16 of them, as two rows
    _, alone = run(config, tokens.reshape(2, 8, D))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), stats, alone)
    assert stats.tokens == 16
    assert jnp.sum(stats.load) == 16 * 3


def test_probabilities_sum_to_one_and_carry_the_gradient_of_the_balance_loss():
    for router in CALLS:
        config = tiny(moe=CALLS[router], **ONE_MATRIX)
        _, stats = run(config, inputs())
        assert jnp.sum(stats.prob) == pytest.approx(B * L, rel=1e-5)
    real_BL = jnp.ones((1, L), bool)

    @jax.jit
    @jax.grad
    def gradient(params):
        stats = MixtureOfExperts(config).apply({"params": params}, inputs(), real_BL, mutable=["router"])[1]
        return sum(router_losses(stats["router"]["stats"]))

    grads = gradient(params_of(config))
    assert jnp.abs(grads["router"]["kernel"]).max() > 1e-4
    assert jnp.abs(grads["experts"]["up"]["kernel"]).max() == 0


def test_losses_and_figures_of_a_router_that_knows_nothing():
    config = tiny(moe=SOFTMAX, **ONE_MATRIX)
    params = params_of(config)
    params = params | {"router": {"kernel": jnp.zeros((D, 5))}}
    _, stats = run(config, inputs(), params=params)
    balance, z = router_losses(stats)
    figures = router_metrics(stats)
    # P_e = 1/5 whatever is chosen: 5 * sum_e f_e / 5 = top_k. Ties go to the first two experts.
    assert balance == pytest.approx(2.0, rel=1e-6)
    assert z == pytest.approx(math.log(5) ** 2, rel=1e-6)
    assert figures["entropy"] == pytest.approx(math.log(5), rel=1e-6)
    np.testing.assert_allclose(figures["load"], [0.5, 0.5, 0, 0, 0])
    assert figures["load_max"] == pytest.approx(2.5)
    assert figures["dropped"] == 0


def test_losses_pool_the_tokens_of_all_layers():
    # Two layers of 10 tokens, top-1 of 2 experts; by hand: f = (12, 8) / 20, P = (11, 9) / 20.
    stats = RouterStats(
        load=jnp.array([[10.0, 0], [2, 8]]), prob=jnp.array([[8.0, 2], [3, 7]]), z=jnp.array([30.0, 10]),
        entropy=jnp.array([5.0, 1]), tokens=jnp.array([10.0, 10]), dropped=jnp.array([0.0, 5]),
    )  # fmt: skip
    balance, z = router_losses(stats)
    assert balance == pytest.approx(2 * (0.6 * 0.55 + 0.4 * 0.45))
    assert z == pytest.approx(2.0)
    figures = router_metrics(stats)
    assert figures["entropy"] == pytest.approx(0.3)
    assert figures["load_max"] == pytest.approx(1.2)
    assert figures["dropped"] == pytest.approx(0.25)
    one = RouterStats(**{name: x[0] for name, x in dataclasses.asdict(stats).items()})
    assert router_losses(one)[0] == pytest.approx(2 * 1.0 * 0.8)


def test_balance_bias_moves_towards_the_mean_load():
    update = balance_bias_update(jnp.array([[4.0, 0, 2, 2], [1, 1, 1, 1]]), 0.01)
    np.testing.assert_allclose(update, [[-0.01, 0.01, 0, 0], [0, 0, 0, 0]])


def test_balance_bias_evens_out_the_load_of_a_skewed_router():
    router = ROUTERS["sigmoid"](experts=8, top_k=2)
    logits = jax.random.normal(jax.random.key(0), (512, 8)) + jnp.linspace(-2, 2, 8)[None, :]

    def load(bias_E):
        return jnp.sum(jax.nn.one_hot(router.route(logits, bias_E).experts, 8), axis=(0, 1))

    def step(bias_E, _):
        return bias_E + balance_bias_update(load(bias_E), 0.01), None

    bias_E = jax.jit(lambda: jax.lax.scan(step, jnp.zeros(8), length=200)[0])()
    assert load(jnp.zeros(8)).max() > 2 * 128
    assert load(bias_E).max() < 1.2 * 128


@routers
def test_bfloat16_experts_keep_a_float32_router(router):
    config = tiny(moe=CALLS[router], **ONE_MATRIX)
    half = dataclasses.replace(config, dtype="bfloat16")
    x_BLD = inputs().astype(jnp.bfloat16)
    exact, stats = run(config, x_BLD.astype(jnp.float32))
    rounded, half_stats = run(half, x_BLD, params=params_of(config))
    assert rounded.dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, stats, half_stats)
    assert jnp.abs(exact - rounded).max() < 0.03 * jnp.abs(exact).max()


def test_scanned_rematerialised_layers_equal_a_loop_and_stack_their_statistics():
    config = tiny(moe=SOFTMAX, **ONE_MATRIX)
    real_BL = jnp.ones((1, L), bool)
    layers = [params_of(config, seed) for seed in range(2)]

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x_BLD, real_BL):
            return x_BLD + nn.remat(MixtureOfExperts)(config, name="mlp")(x_BLD, real_BL), None

    scanned = nn.scan(
        Layer, variable_axes={"params": 0, "router": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=2
    )()

    def through_scan(params):
        (y, _), variables = scanned.apply({"params": {"mlp": params}}, inputs(), real_BL, mutable=["router"])
        return jnp.sum(jnp.sin(y)), variables["router"]["mlp"]["stats"]

    def through_loop(params):
        y, found = inputs(), []
        for i in range(2):
            layer = jax.tree.map(lambda w, i=i: w[i], params)
            part, variables = MixtureOfExperts(config).apply({"params": layer}, y, real_BL, mutable=["router"])
            y, found = y + part, [*found, variables["router"]["stats"]]
        return jnp.sum(jnp.sin(y)), jax.tree.map(lambda *x: jnp.stack(x), *found)

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    (_, stats), grads = jax.jit(jax.value_and_grad(through_scan, has_aux=True))(stacked)
    (_, expected_stats), expected = jax.jit(jax.value_and_grad(through_loop, has_aux=True))(stacked)
    assert stats.load.shape == (2, 5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), stats, expected_stats)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads, expected)


def test_a_population_of_seeds_is_one_vmapped_program():
    config = tiny(moe=SOFTMAX, **ONE_MATRIX)
    seeds = [params_of(config, seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *seeds)
    real_BL = jnp.ones((1, L), bool)

    def loss(params):
        return jnp.sum(jnp.sin(MixtureOfExperts(config).apply({"params": params}, inputs(), real_BL)))

    found = jax.jit(jax.vmap(jax.value_and_grad(loss)))(stacked)
    one = jax.jit(jax.value_and_grad(loss))
    expected = jax.tree.map(lambda *x: jnp.stack(x), *[one(params) for params in seeds])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


@pytest.mark.parametrize(("strategy", "tensor"), [("ddp", 1), ("fsdp", 1), ("ddp", 2)])
def test_eight_devices_compute_the_same_and_gather_no_tokens(strategy, tensor):
    config = tiny(moe=SOFTMAX, **ONE_MATRIX)
    x_BLD = inputs(shape=(8, 3, D))
    real_BL = jnp.arange(3)[None, :] < jnp.arange(1, 9)[:, None]

    def loss(params, x_BLD):
        y, variables = MixtureOfExperts(config).apply({"params": params}, x_BLD, real_BL, mutable=["router"])
        balance, z = router_losses(variables["router"]["stats"])
        return jnp.sum(jnp.sin(y)) + balance + z

    step = lambda *args: jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*args).compile()  # noqa: E731
    params = params_of(config)
    expected = step(params, x_BLD)(params, x_BLD)
    plan = sharding.plan(1, 8, ShardingConfig(strategy=strategy, data=0, fsdp=0, tensor=tensor, fsdp_min_params=1))
    with plan.context():
        boxed = jax.eval_shape(MixtureOfExperts(config).init, jax.random.key(0), x_BLD, real_BL)["params"]
        params = jax.device_put(params, plan.shardings(boxed))
        x_BLD = jax.device_put(x_BLD, plan.batch_sharding())
        compiled = step(params, x_BLD)
        found = compiled(params, x_BLD)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)
    moves = ("all-gather", "all-to-all", "collective-permute")
    moved = [line for line in compiled.as_text().splitlines() if any(f" {move}(" in line for move in moves)]
    assert not moved if strategy == "ddp" else all("[8," not in line for line in moved), moved


def test_a_batch_that_the_devices_do_not_divide_is_one_part(monkeypatch):
    config = tiny(moe=SOFTMAX, **ONE_MATRIX)
    expected, _ = run(config, inputs())
    monkeypatch.setattr(moe, "batch_shards", lambda: 2)
    apply = jax.jit(lambda x, real: MixtureOfExperts(config).apply({"params": params_of(config)}, x, real))
    np.testing.assert_array_equal(apply(inputs(), jnp.ones((1, L), bool)), expected)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_by_default_a_token_uses_as_many_parameters_as_in_the_dense_model(top_k, shared, mlp):
    config = tiny(model_dim=96, mlp_dim=240, mlp=mlp, moe=f"softmax(top_k={top_k}, shared={shared})")
    router = 96 * 8
    rounding = (top_k + shared) * 4 * 96 * 3  # a width is at most 4 from the exact one
    assert abs(MixtureOfExperts.num_active_params(config) - router - MLP.num_params(config)) <= rounding
    assert moe_of(config).width(config.mlp_dim) % 8 == 0
    assert MixtureOfExperts.flops_per_token(config) == 2 * MixtureOfExperts.num_active_params(config)


def test_a_derived_width_is_the_nearest_multiple_of_8_and_a_given_one_stays():
    assert ROUTERS["softmax"](top_k=2).width(1024) == 512
    assert ROUTERS["softmax"](top_k=3).width(1024) == 344  # 341.3
    assert ROUTERS["softmax"](top_k=2, shared=1).width(20) == 8
    assert ROUTERS["softmax"](top_k=2, expert_dim=100).width(1024) == 100


@routers
def test_num_params_equals_the_built_layer(router):
    config = tiny(moe=CALLS[router])
    assert sum(x.size for x in jax.tree.leaves(params_of(config))) == MixtureOfExperts.num_params(config)


def test_experts_start_as_dense_layers_do_and_each_differently():
    config = tiny(model_dim=64, moe="softmax(experts=4, top_k=2, expert_dim=96)", num_layers=2)
    x_BLD = jnp.zeros((1, 1, 64))
    params = nn.meta.unbox(jax.jit(MixtureOfExperts(config).init)(jax.random.key(0), x_BLD, jnp.ones((1, 1), bool)))
    assert set(params) == {"params"}  # nothing is sown while initialising
    kernels = {name: part["kernel"] for name, part in params["params"]["experts"].items()}
    for name, std in {"gate": 0.02, "up": 0.02, "down": 0.01}.items():
        assert jnp.std(kernels[name], axis=(1, 2)) == pytest.approx(np.full(4, std), rel=0.05)
        assert len({float(kernel[0, 0]) for kernel in kernels[name]}) == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("softmax(experts=4, top_k=5)", r"top_k=5 must be at most experts=4; try top_k=4, or experts=5"),
        ("softmax(top_k=0)", r"top_k=0 must be a finite number at least 1"),
        ("softmax(scale=0)", r"scale=0 must be greater than 0"),
        ("softmax(dense_layers=4)", r"dense_layers=4 must be a finite number between 0 and 3"),
        ("softmax(balance=-0.1)", r"balance=-0.1 must be a finite number at least 0"),
        ("sigmoid(experts=8, groups=3)", r"groups=3 must divide experts=8; try groups in \[1, 2, 4, 8\]"),
        ("sigmoid(groups=2, top_groups=4)", r"top_groups=4 must be at most groups=2; try top_groups=2"),
        (
            "softmax_unnormalized(experts=8, top_k=3, groups=4, top_groups=1)",
            r"top_k=3 must be at most the 2 experts of top_groups=1 of 4 groups; try top_k=2, or top_groups=2",
        ),
        ("sigmoid(bias_rate=-1)", r"bias_rate=-1.0 must be a finite number at least 0"),
        ("softmx(experts=4)", r"Unknown model.moe 'softmx'. Did you mean 'softmax'"),
        ("softmax(bias_rate=1)", r"bias_rate"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        MixtureOfExperts.check(tiny(moe=call))


def test_numbers_at_their_limits_are_accepted():
    for call in (
        "softmax(experts=2, top_k=2, dense_layers=3)",
        "sigmoid(top_k=4, groups=2)",
        "sigmoid(top_k=1, groups=8)",
    ):
        MixtureOfExperts.check(tiny(moe=call))
