"""Low-rank adapters in the model: where they are, how they begin, and that merging them changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundry_jax.errors import UserError
from foundry_jax.model import lora, transformer
from foundry_jax.model.stacking import is_boxed, restack
from foundry_jax.model.transformer import Transformer
from foundry_jax.train_step import unbox
from tests import reference
from tests.contract import ATOL
from tests.variants import BATCH, LENGTH, decoder, forward, often, params_of, tiny, tokens_of

RANK, SCALE = 3, 0.7
MOE = "moe_unnormalized"  # a dense layer first, then experts beside an MLP that all tokens share


@functools.cache
def boxed(config, rank=RANK, targets=".*", seed=0):
    return jax.jit(lambda key: lora.init(config, rank, targets, key))(jax.random.key(seed))


def drawn(config, **options):
    """Returns adapters as a run begins with them."""
    return unbox(boxed(config, **options))


@functools.cache
def adapters_of(config, targets=".*"):
    """Returns adapters whose numbers are all well away from zero."""
    rng = np.random.default_rng(1)
    shapes = drawn(dataclasses.replace(config, scan_layers=False), targets=targets)
    filled = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), shapes)
    return lora.restack(filled, dataclasses.replace(config, scan_layers=False), config)


def adapted(config, adapters=None, **options):
    """Returns the variables of a model with adapters."""
    return params_of(config) | {"lora": lora.scaled(adapters or adapters_of(config), SCALE, **options)}


def merged(config):
    return {"params": lora.merge(params_of(config)["params"], adapters_of(config), SCALE)}


def paths_of(tree):
    """Returns {"block_0/attention/query/a": leaf}."""
    return {"/".join(key.key for key in path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


GQA = {"attention/query", "attention/key", "attention/value", "attention/out", "mlp/gate", "mlp/up", "mlp/down"}
MLA = {"attention/query_down", "attention/query_up", "attention/kv_down", "attention/kv_up", "attention/out"}
SHARED = {"mlp/shared/gate", "mlp/shared/up", "mlp/shared/down"}
ATTENTION = {name for name in GQA if name.startswith("attention")}


@pytest.mark.parametrize(
    ("variant", "per_layer"),
    [
        ("gqa", [GQA, GQA, GQA]),
        ("untied+gelu", [GQA - {"mlp/gate"}] * 3),
        ("mla_q_lora", [MLA | {"mlp/gate", "mlp/up", "mlp/down"}] * 3),
        (MOE, [GQA, ATTENTION | SHARED, ATTENTION | SHARED]),
    ],
)
def test_every_linear_map_of_a_block_is_a_target_but_no_expert_router_or_embedding(variant, per_layer):
    expected = {f"block_{layer}/{name}" for layer, names in enumerate(per_layer) for name in names}
    assert set(lora.target_paths(tiny(variant), ".*")) == expected
    assert set(lora.target_paths(tiny(variant, scan_layers=True), ".*")) == expected
    found = paths_of(drawn(tiny(variant)))
    assert set(found) == {f"{path}/{factor}" for path in expected for factor in "ab"}
    assert sum(x.size for x in found.values()) == lora.num_params(tiny(variant), RANK, ".*")


def test_targets_are_searched_within_the_block():
    paths = functools.partial(lora.target_paths, tiny())
    assert paths("query") == [f"block_{i}/attention/query" for i in range(3)]
    assert len(paths("attention/(query|value)$")) == 6
    assert paths("^mlp/down") == [f"block_{i}/mlp/down" for i in range(3)]
    assert lora.num_params(tiny(), 2, "query") == 3 * 2 * (20 + 6 * 4)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_proj", r"lora.targets='q_proj' is found in none of attention/query, attention/key, .*mlp/down; '\.\*' is"),
        ("block_1", "lora.targets='block_1' is found in none of"),
        ("(query", r"lora.targets='\(query' is no regular expression: missing \), unterminated subpattern"),
    ],
)
def test_targets_that_name_nothing_are_refused(targets, message):
    with pytest.raises(UserError, match=message) as caught:
        lora.target_paths(tiny(), targets)
    assert "\n" not in str(caught.value)


def test_a_is_uniform_within_the_root_of_its_inputs_and_b_is_zero():
    config = tiny(model_dim=60, num_heads=6, head_dim=10, mlp_dim=50)
    for path, x in paths_of(drawn(config, rank=40)).items():
        if path.endswith("/b"):
            assert not x.any(), path
            continue
        bound = np.prod(x.shape[:-1]) ** -0.5
        assert 0.95 * bound < np.abs(x).max() <= bound, path
        assert x.std() == pytest.approx(bound / 3**0.5, rel=0.1), path
    assert drawn(config)["block_0"]["attention"]["out"]["a"].shape == (6, 10, RANK)
    assert drawn(config)["block_0"]["attention"]["query"]["b"].shape == (RANK, 6, 10)


def test_adapters_differ_between_layers_and_seeds_but_not_with_what_else_is_a_target_or_scanned():
    config = tiny(MOE, pattern="SL", num_layers=6)
    scanned = dataclasses.replace(config, scan_layers=True)
    whole, some = drawn(config), drawn(config, targets="down")
    for path, x in paths_of(some).items():
        np.testing.assert_array_equal(paths_of(whole)[path], x)
    jax.tree.map(np.testing.assert_array_equal, lora.restack(drawn(scanned), scanned, config), whole)
    shared = lora.restack(drawn(scanned, targets="shared"), scanned, config)  # the dense first layer has none
    assert "block_0" not in shared
    jax.tree.map(np.testing.assert_array_equal, shared, drawn(config, targets="shared"))
    first = whole["block_0"]["attention"]["query"]["a"]
    others = (whole["block_1"], drawn(config, seed=1)["block_0"])
    assert all((other["attention"]["query"]["a"] != first).all() for other in others)
    assert (whole["block_0"]["attention"]["key"]["a"] != first).all()


@pytest.mark.parametrize("scan_layers", [False, True])
def test_adapters_carry_the_logical_axes_of_their_kernels(scan_layers):
    tree = boxed(tiny(scan_layers=scan_layers))
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_boxed)
    names = {"/".join(key.key for key in path): x.names for path, x in leaves}
    block, stack = ("blocks/layer_0", ("layers",)) if scan_layers else ("block_0", ())
    assert names[f"{block}/attention/query/a"] == (*stack, "embed", "lora")
    assert names[f"{block}/attention/query/b"] == (*stack, "lora", "heads", "head_dim")
    assert names[f"{block}/attention/out/a"] == (*stack, "heads", "head_dim", "lora")
    assert names[f"{block}/mlp/down/b"] == (*stack, "lora", "embed")


@pytest.mark.parametrize("variant", often(["gqa", "mla", "bias_all+gelu", MOE], {"gqa", "mla"}))
@pytest.mark.parametrize("scan_layers", [False, True])
def test_new_adapters_change_no_bit_of_the_logits(variant, scan_layers):
    config = tiny(variant, scan_layers=scan_layers)
    with_adapters = adapted(config, drawn(config))
    np.testing.assert_array_equal(
        forward(config)(with_adapters, tokens_of()), forward(config)(params_of(config), tokens_of())
    )


@pytest.mark.parametrize("variant", ["gqa", "mla_q_lora", "bias_all+gelu", MOE])
def test_merged_weights_compute_what_the_adapters_do(variant):
    config = tiny(variant)
    unmerged = forward(config)(adapted(config), tokens_of())
    np.testing.assert_allclose(forward(config)(merged(config), tokens_of()), unmerged, atol=1e-5)
    np.testing.assert_allclose(reference.logits(config, merged(config), np.asarray(tokens_of())), unmerged, atol=ATOL)
    assert jnp.abs(unmerged - forward(config)(params_of(config), tokens_of())).max() > 0.1


def test_merging_adds_the_scaled_product_and_unmerging_takes_it_away():
    config = tiny()
    before, after = params_of(config)["params"], merged(config)["params"]
    adapter, kernel = (
        adapters_of(config)["block_1"]["attention"]["out"],
        before["block_1"]["attention"]["out"]["kernel"],
    )
    expected = kernel + SCALE * np.einsum("NHR,RD->NHD", adapter["a"], adapter["b"])
    np.testing.assert_allclose(after["block_1"]["attention"]["out"]["kernel"], expected, atol=1e-6)
    np.testing.assert_array_equal(after["embed"]["embedding"], before["embed"]["embedding"])
    restored = lora.unmerge(after, adapters_of(config), SCALE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), restored, before)


def test_merging_stacked_layers_is_merging_each():
    config = tiny(pattern="SL", num_layers=5)
    scanned = dataclasses.replace(config, scan_layers=True)
    params = restack(params_of(config)["params"], config, scanned)
    stacked = lora.merge(params, adapters_of(scanned), SCALE)
    jax.tree.map(
        np.testing.assert_array_equal, adapters_of(config), lora.restack(adapters_of(scanned), scanned, config)
    )
    back = restack(stacked, scanned, config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), back, merged(config)["params"])


def gradient_of(config):
    """Returns the compiled (collection, params) -> (variance of the logits, its gradient by the collection)."""

    def loss(collection, params):
        return jnp.var(Transformer(config).apply(params | {"lora": collection}, tokens_of())[0])

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.exhaustive
@pytest.mark.parametrize("variant", often(["window_and_full", "mla", MOE], {"mla"}))
def test_scanned_or_recomputed_layers_give_the_same_gradients_to_adapters(variant):
    config = tiny(variant, num_layers=5)
    value, grads = gradient_of(config)(adapted(config)["lora"], params_of(config))
    for path, grad in paths_of(grads).items():
        assert jnp.isfinite(grad).all() and jnp.abs(grad).max() > 0, path
    for changes in ({"scan_layers": True}, {"scan_layers": True, "remat": "full"}, {"remat": "dots"}):
        other = dataclasses.replace(config, **changes)
        params = {"params": restack(params_of(config)["params"], config, other)}
        found, other_grads = gradient_of(other)(lora.scaled(adapters_of(other), SCALE), params)
        assert float(found) == pytest.approx(float(value), rel=1e-5)
        back = lora.restack(other_grads, other, config)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), back, grads)


@pytest.mark.parametrize("variant", ["gqa", "mla", "mla_q_lora", "window"])
def test_cached_decoding_with_adapters_equals_the_full_forward_pass(variant):
    """MLA decodes with its up-projection absorbed: the adapter must be in the kernel that is absorbed."""
    config = tiny(variant)
    variables, tokens = adapted(config), tokens_of()
    cache, found, start = transformer.init_cache(config, BATCH, LENGTH), [], 0
    for length in (5, 1, 1, 1):
        positions = jnp.broadcast_to(jnp.arange(start, start + length), (BATCH, length))
        part, cache = decoder(config)(variables, tokens[:, start : start + length], positions, cache)
        found.append(part)
        start += length
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), forward(config)(variables, tokens), atol=ATOL)


def test_bfloat16_stays_close_to_float32():
    config = tiny()
    exact = forward(config)(adapted(config), tokens_of())
    half = dataclasses.replace(config, dtype="bfloat16")
    rounded = forward(half)(adapted(config), tokens_of())
    assert jnp.abs(exact - rounded).max() < 0.1 * jnp.abs(exact).max()


@pytest.mark.parametrize("scan_layers", [False, True])
def test_dropout_falls_on_what_goes_into_the_adapters_alone(scan_layers):
    config = tiny(scan_layers=scan_layers)

    @jax.jit
    def run(rate, scale, seed):
        variables = params_of(config) | {"lora": lora.scaled(adapters_of(config), scale, rate)}
        return Transformer(config).apply(variables, tokens_of(), rngs={"dropout": jax.random.key(seed)})[0]

    expected = forward(config)(adapted(config), tokens_of())
    np.testing.assert_allclose(run(0.0, SCALE, 0), expected, atol=1e-5)
    one, again, two = run(0.3, SCALE, 0), run(0.3, SCALE, 0), run(0.3, SCALE, 1)
    np.testing.assert_array_equal(one, again)
    assert (one != two).any() and jnp.abs(one - expected).max() > 1e-3
    np.testing.assert_allclose(run(0.3, 0.0, 0), forward(config)(params_of(config), tokens_of()), atol=1e-5)
