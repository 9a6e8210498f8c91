"""A model of one architecture started from a trained one of another: exact where it says so, and honest where not."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from foundry_jax import sharding
from foundry_jax.config import ShardingConfig
from foundry_jax.errors import UserError
from foundry_jax.model import stacking
from foundry_jax.model.transformer import init_params
from foundry_jax.train_step import unbox
from foundry_jax.zoo.graft import Copy, graft, start
from foundry_jax.zoo.load import abstract_params
from foundry_jax.zoo.source import Source, param_shapes, path_of
from tests.variants import forward, often, params_of, tiny, tokens_of

EXACT = 3e-6  # at logits up to 6: sums in another order differ by 1.2e-6, a wrong head by 1


class InMemory(Source):
    """A source of random parameters; keeps what was read of it."""

    def __init__(self, model, dtype=np.float32):
        self.name, self.model, self.asked = "tiny", model, []
        leaves = jax.tree_util.tree_leaves_with_path(params_of(model)["params"])
        self.params = {path_of(keys): np.asarray(leaf).astype(dtype) for keys, leaf in leaves}

    def read(self, path, index=None):
        part = self.params[path][index or ...]
        self.asked.append((path, part.size))
        return part

    fingerprint = ""
    stop_ids = ()

    def tokenizer(self):
        return None

    def texts(self):
        return {}


def started(source, model, *, fresh=False, seed=0, devices=1):
    """Returns the parameters of the model, on one device or cut over several."""
    strategy = "none" if devices == 1 else "fsdp"
    layout = ShardingConfig(strategy=strategy, fsdp_min_params=0, data=0, fsdp=0, tensor=0)
    plan = sharding.plan(1, devices, layout)
    with plan.context():
        return start(source, model, plan.shardings(abstract_params(model)), fresh=fresh, seed=seed)


def logits(model, params):
    return forward(model)({"params": params}, tokens_of())


def leaves(params):
    return {path_of(keys): np.asarray(x) for keys, x in jax.tree_util.tree_leaves_with_path(params)}


def assert_computes_the_same(before, after, **options):
    source = InMemory(before)
    params = started(source, after, **options)
    np.testing.assert_allclose(logits(after, params), logits(before, params_of(before)["params"]), atol=EXACT)


# ------------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize(
    "variant",
    often(
        ["bias_all", "mla", "moe_unnormalized", "layernorm", "post_norm", "sandwich_norm", "post_norm+layernorm",
         "window_and_full"],
        {"moe_unnormalized", "sandwich_norm", "post_norm+layernorm"},
    ),
)  # fmt: skip
def test_layers_that_are_added_change_nothing(variant):
    before, after = tiny(variant), tiny(variant, num_layers=5)
    assert_computes_the_same(before, after)
    (note,) = graft(before, after).notes
    assert "2 layers follow the source's 3" in note and "exact" in note


def test_what_an_added_layer_does_not_output_is_that_of_the_last():
    before, after = tiny("bias_all"), tiny("bias_all", num_layers=5)
    source = InMemory(before)
    found = leaves(started(source, after))
    zero = {path.partition("/")[2] for path, x in found.items() if path.startswith("block_4/") and not x.any()}
    assert zero == {f"{name}/{leaf}" for name in ("attention/out", "mlp/down") for leaf in ("kernel", "bias")}
    np.testing.assert_array_equal(found["block_4/mlp/up/kernel"], source.params["block_2/mlp/up/kernel"])


def test_a_norm_after_the_sub_layer_holds_an_added_layer_at_zero_beyond_the_first_step():
    """A kernel that is zero, followed by a norm, makes an output of full size as soon as it is not quite zero."""
    found = leaves(started(InMemory(tiny("post_norm")), tiny("post_norm", num_layers=4)))
    zero = {path for path, x in found.items() if not x.any()}
    assert zero == {"block_3/attention_post_norm/scale", "block_3/mlp_post_norm/scale"}


@pytest.mark.parametrize(
    ("variant", "have", "want"),
    [("gqa", 1, 2), ("bias_qkv", 2, 6), ("qk_norm_whole+layernorm", 2, 6), ("qk_norm_head", 2, 6)],
)
def test_repeated_heads_compute_the_same(variant, have, want):
    assert_computes_the_same(tiny(variant, num_kv_heads=have), tiny(variant, num_kv_heads=want))


def test_an_output_map_of_its_own_begins_as_the_embedding():
    assert_computes_the_same(tiny("scaled"), tiny("scaled+untied"))


@pytest.mark.parametrize("where", ["qkv", "attention", "all"])
def test_biases_begin_at_zero(where):
    assert_computes_the_same(tiny(), tiny(bias=where))


@pytest.mark.parametrize(("variant", "width"), [("gqa", 29), ("relu2", 70), ("bias_all", 70)])
def test_a_wider_mlp_computes_the_same(variant, width):
    assert_computes_the_same(tiny(variant), tiny(variant, mlp_dim=width))


def test_new_hidden_units_get_a_gradient():
    after = tiny(mlp_dim=40)
    params = started(InMemory(tiny()), after)
    grads = jax.grad(lambda p: jnp.var(forward(after)({"params": p}, tokens_of())))(params)
    assert (jnp.abs(grads["block_0"]["mlp"]["down"]["kernel"][28:]).max(axis=1) > 0).all()


def test_all_at_once_on_eight_devices_with_scanned_layers():
    before, after = tiny("bias_qkv"), tiny("bias_all+untied", num_layers=6, num_kv_heads=6, mlp_dim=40)
    scanned = dataclasses.replace(after, scan_layers=True)
    source = InMemory(before)
    params = jax.device_get(started(source, scanned, devices=8))
    back = stacking.restack(params, scanned, after)
    np.testing.assert_allclose(logits(after, back), logits(before, params_of(before)["params"]), atol=EXACT)
    assert leaves(back).keys() == leaves(started(InMemory(before), after)).keys()
    jax.tree.map(np.testing.assert_array_equal, back, started(InMemory(before), after))


def test_a_device_reads_no_more_than_its_part_needs():
    before, after = tiny(model_dim=16), tiny(model_dim=16, num_kv_heads=6)
    source = InMemory(before)
    params = started(source, after, devices=8)
    assert params["block_0"]["attention"]["key"]["kernel"].addressable_shards[0].data.shape == (2, 6, 4)
    sizes = [size for path, size in source.asked if path == "block_0/attention/key/kernel"]
    assert sizes == [2 * 2 * 4] * 8


# ------------------------------------------------------------------------------------------------ approximate


@pytest.mark.parametrize("want", [1, 2, 3])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_fewer_heads_are_the_means_of_groups(want, dtype):
    before, after = tiny("bias_qkv+mha"), tiny("bias_qkv+mha", num_kv_heads=want)
    source = InMemory(before, dtype)
    found = leaves(started(source, after))
    for name in ("key", "value"):
        for leaf, axis in (("kernel", 1), ("bias", 0)):
            theirs = np.moveaxis(source.params[f"block_1/attention/{name}/{leaf}"].astype(np.float32), axis, 0)
            each = 6 // want
            means = [sum(theirs[each * group + i] for i in range(each)) / each for group in range(want)]
            expected = np.moveaxis(np.stack(means), 0, axis)
            np.testing.assert_allclose(found[f"block_1/attention/{name}/{leaf}"], expected, atol=1e-6)
    np.testing.assert_array_equal(
        found["block_1/attention/query/kernel"], source.params["block_1/attention/query/kernel"]
    )
    (note,) = graft(before, after).notes
    assert f"num_kv_heads={want}" in note and "approximate" in note and "2305.13245" in note


def test_pooling_undoes_repeating():
    few, many = tiny("qk_norm_whole"), tiny("qk_norm_whole", num_kv_heads=6)
    source = InMemory(many)
    source.params = leaves(started(InMemory(few), many))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), started(source, few), params_of(few)["params"]
    )


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"pattern": "S", "window": 4}, "model.pattern=S (source: L)"),
        ({"rope_theta": 500.0}, "model.rope_theta=500.0 (source: 10000.0)"),
        ({"mlp": "geglu", "attention_softcap": 3.0}, "model.attention_softcap=3.0 (source: 0.0), model.mlp=geglu"),
        ({"rope_scaling": "linear(factor=2)"}, "model.rope_scaling=linear(factor=2) (source: none)"),
    ],
)
def test_settings_that_shape_no_parameter_are_noted(changes, note, caplog):
    source = InMemory(tiny())
    with caplog.at_level(logging.INFO, "foundry_jax"):
        found = started(source, tiny(**changes))
    jax.tree.map(np.testing.assert_array_equal, found, params_of(source.model)["params"])
    assert f"tiny: computes differently from the source: {note}" in caplog.messages[0]
    assert len(caplog.messages) == 1


def test_the_same_architecture_is_copied_and_nothing_is_noted():
    source, same = tiny(), tiny(window=5, scan_layers=True, remat="full", dtype="bfloat16", context_length=99)
    found = graft(source, same)
    assert found.moves == {path: Copy(path) for path in param_shapes(source)}
    assert (found.missing, found.unused, found.notes) == ((), (), ())


# ------------------------------------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            tiny(),
            tiny("qk_norm_head"),
            r"tiny has no block_\*/attention/key_norm/scale \(3 layers\), .*query_norm/scale",
        ),
        (
            tiny(),
            tiny("mla"),
            r"has no .*attention/kv_up/kernel .*, and has .*attention/key/kernel \(3 layers\), .*drops",
        ),
        (tiny("untied"), tiny(), "tiny has unembed/kernel, which this model has no use for; init.fresh=true drops"),
        (
            tiny(),
            tiny(num_layers=2),
            r"tiny has block_2/attention/key/kernel, .*, 1 more, which this model has no use for",
        ),
        (tiny(), tiny(vocab_size=41), r"has no embed/embedding \[41, 20\], only \[37, 20\]; init.fresh=true draws"),
        (tiny("mha"), tiny(num_kv_heads=4, num_heads=4), r"key/kernel \[20, 4, 4\], only \[20, 6, 4\] \(3 layers\)"),
        (tiny(mlp_dim=30), tiny(), r"has no block_\*/mlp/down/kernel \[28, 20\], only \[30, 20\] \(3 layers\), block_"),
        (tiny(), tiny("moe_softmax"), r"has no block_\*/mlp/experts/down/kernel \(3 layers\)"),
    ],
)
def test_what_does_not_fit_is_refused(before, after, message):
    with pytest.raises(UserError, match=message) as error:
        started(InMemory(before), after)
    assert "\n" not in str(error.value)
    assert str(error.value).count("init.fresh=true") == 1


def test_heads_that_do_not_divide_are_missing():
    found = graft(tiny("mha", num_kv_heads=6), tiny(num_kv_heads=3, num_heads=3))
    assert "block_0/attention/key/kernel" in found.missing
    found = graft(tiny(num_heads=12, num_kv_heads=4), tiny(num_heads=12, num_kv_heads=6))
    assert "block_0/attention/key/kernel" in found.missing and "block_0/attention/key/kernel" in found.unused


def test_every_parameter_is_accounted_for_once():
    for before, after in ((tiny(), tiny("mla+untied")), (tiny("moe_softmax"), tiny("post_norm", num_layers=5))):
        found = graft(before, after)
        assert set(found.moves) | set(found.missing) == set(param_shapes(after))
        assert not set(found.moves) & set(found.missing)
        used = {move.source for move in found.moves.values()}
        assert used - {None} | set(found.unused) == set(param_shapes(before))
        assert not used & set(found.unused)


# ------------------------------------------------------------------------------------------------ fresh


@functools.cache
def drawn(model, seed):
    """Returns the parameters of a run from scratch."""
    return leaves(unbox(jax.jit(lambda: init_params(model, jax.random.fold_in(jax.random.key(seed), 0)))()))


@pytest.mark.parametrize("devices", [1, 8])
def test_what_is_missing_is_what_a_run_from_scratch_draws(devices, caplog):
    before, after = tiny(num_layers=4), tiny("qk_norm_head", num_layers=2, vocab_size=40)
    source = InMemory(before)
    with caplog.at_level(logging.INFO, "foundry_jax"):
        found = leaves(started(source, after, fresh=True, seed=3, devices=devices))
    missing = {path for path in found if "_norm/scale" in path and "attention/" in path} | {"embed/embedding"}
    assert missing == set(graft(before, after).missing)
    for path, x in found.items():
        np.testing.assert_array_equal(x, drawn(after, 3)[path] if path in missing else source.params[path], path)
    assert any(
        "tiny: dropped: " in message and "block_*/mlp/up/kernel (2 layers)" in message for message in caplog.messages
    )
    assert any("tiny: drawn from seed 3: " in message and "embed/embedding" in message for message in caplog.messages)
    again = leaves(started(source, after, fresh=True, seed=4, devices=devices))
    assert (again["embed/embedding"] != found["embed/embedding"]).any()


@pytest.mark.exhaustive
def test_some_layers_of_a_stacked_parameter_may_be_drawn():
    before, after = tiny("moe_unnormalized"), tiny("moe_unnormalized")
    after = dataclasses.replace(after, moe=before.moe.replace("dense_layers=1", "dense_layers=0"))
    scanned = dataclasses.replace(after, scan_layers=True)
    source = InMemory(before)
    with pytest.raises(UserError, match="has no block_0/mlp/experts/down/kernel, "):
        started(source, after)
    alone = started(source, after, fresh=True, seed=5)
    stacked = jax.device_get(started(source, scanned, fresh=True, seed=5, devices=8))
    jax.tree.map(np.testing.assert_array_equal, stacking.restack(stacked, scanned, after), alone)
    up = leaves(alone)
    np.testing.assert_array_equal(up["block_0/mlp/experts/up/kernel"], drawn(after, 5)["block_0/mlp/experts/up/kernel"])
    np.testing.assert_array_equal(up["block_1/mlp/experts/up/kernel"], source.params["block_1/mlp/experts/up/kernel"])
