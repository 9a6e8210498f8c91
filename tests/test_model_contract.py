"""What every variant must satisfy, whatever it is."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundry_jax.errors import UserError
from foundry_jax.model import transformer
from foundry_jax.model.attention import ATTENTIONS
from foundry_jax.model.layers import Dropout
from foundry_jax.model.mask import Placement
from foundry_jax.model.transformer import Transformer
from tests.variants import BATCH, LENGTH, VARIANTS, VOCAB, forward, params_of, tiny, tokens_of

variants = pytest.mark.parametrize("variant", VARIANTS)
# Where each case compiles a gradient, the variants that share code with these run in `make test-all` only.
exhaustive = pytest.mark.exhaustive
main_variants = pytest.mark.parametrize(
    "variant", [v if v in ("gqa", "mla_q_lora") else pytest.param(v, marks=exhaustive) for v in VARIANTS]
)


def test_every_registered_attention_is_in_the_contract_suite():
    assert {tiny(variant).attention for variant in VARIANTS} == set(ATTENTIONS)


@variants
def test_logits_have_one_row_per_token_in_float32(variant):
    config = tiny(variant)
    logits = forward(config)(params_of(config), tokens_of())
    assert logits.shape == (BATCH, LENGTH, VOCAB)
    assert logits.dtype == jnp.float32


@variants
@pytest.mark.parametrize("changed", [1, 4, LENGTH - 1])
def test_changing_a_token_leaves_all_earlier_logits_bit_equal(variant, changed):
    config = tiny(variant)
    params, tokens = params_of(config), tokens_of()
    before = forward(config)(params, tokens)
    after = forward(config)(params, tokens.at[:, changed].add(1) % VOCAB)
    np.testing.assert_array_equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed:] != after[:, changed:]).any(axis=-1).all()


@variants
def test_the_order_of_the_prefix_matters(variant):
    config = tiny(variant)
    params, tokens = params_of(config), tokens_of()
    swapped = tokens.at[:, [0, 1]].set(tokens[:, [1, 0]])
    difference = forward(config)(params, tokens)[:, -1] - forward(config)(params, swapped)[:, -1]
    assert jnp.abs(difference).max() > 1e-2


@variants
@pytest.mark.parametrize(("scan_layers", "prefill"), [(False, 1), (True, 5)])
def test_cached_decoding_equals_the_full_forward_pass(variant, scan_layers, prefill):
    config = tiny(variant, scan_layers=scan_layers)
    params, tokens = params_of(config), tokens_of()
    cache = transformer.init_cache(config, BATCH, LENGTH + 2)
    decode = jax.jit(lambda tokens, placement, cache: Transformer(config).apply(params, tokens, placement, cache))
    logits, start = [], 0
    for length in [prefill] + [1] * (LENGTH - prefill):
        positions = jnp.broadcast_to(jnp.arange(start, start + length), (BATCH, length))
        part, cache = decode(tokens[:, start : start + length], Placement(positions), cache)
        logits.append(part)
        start += length
    # 5e-6 is what two orders of summation differ by at these sizes
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), forward(config)(params, tokens), atol=5e-5)


@variants
def test_rows_of_one_batch_may_stand_at_different_positions_in_the_cache(variant):
    config = tiny(variant)
    params, tokens = params_of(config), tokens_of()
    cache = transformer.init_cache(config, BATCH, LENGTH)
    decode = jax.jit(lambda tokens, placement, cache: Transformer(config).apply(params, tokens, placement, cache))
    lengths = [2, 5, 7]
    full = forward(config)(params, tokens)
    for t in range(max(lengths)):  # rows that are done write the same token to the same slot again
        at = jnp.array([min(t, n - 1) for n in lengths])[:, None]
        new = jnp.take_along_axis(tokens, at, axis=1)
        logits, cache = decode(new, Placement(at), cache)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(logits[row, 0], full[row, n - 1], atol=5e-5)


@variants
def test_rows_of_a_batch_do_not_see_each_other(variant):
    config = tiny(variant)
    params, tokens = params_of(config), tokens_of()
    other = tokens.at[1:].set(tokens_of(seed=9)[1:])
    np.testing.assert_array_equal(forward(config)(params, tokens)[0], forward(config)(params, other)[0])


@variants
def test_packed_documents_equal_separate_ones(variant):
    config = tiny(variant)
    params, tokens = params_of(config), tokens_of()
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 3, 4]])
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 2]])
    run = jax.jit(lambda tokens: Transformer(config).apply(params, tokens, Placement(positions, segments))[0])
    packed = run(tokens)
    np.testing.assert_allclose(packed[:, :3], forward(config)(params, tokens[:, :3]), atol=5e-5)
    np.testing.assert_allclose(packed[:, 3:], forward(config)(params, tokens[:, 3:]), atol=5e-5)
    changed = run(tokens.at[:, 1].add(1) % VOCAB)
    np.testing.assert_array_equal(packed[:, 3:], changed[:, 3:])


@variants
def test_every_parameter_has_a_finite_gradient_and_none_is_zero(variant):
    config = tiny(variant)
    tokens = tokens_of()
    grads = jax.jit(jax.grad(lambda p: jnp.var(Transformer(config).apply(p, tokens)[0])))(params_of(config))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(grad).all(), path
        assert jnp.abs(grad).max() > 0, path


def _stacked(params):
    """Returns the parameters of unrolled layers as the scanned model holds them."""
    params = dict(params["params"])
    blocks = [params.pop(f"block_{i}") for i in range(2)]
    return {"params": params | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}}


@main_variants
@pytest.mark.parametrize(
    ("remat", "scan_layers"),
    [("dots", False), ("full", True)]
    + [pytest.param(*case, marks=exhaustive) for case in [("none", True), ("full", False), ("dots", True)]],
)
def test_scan_and_remat_change_neither_loss_nor_gradient(variant, remat, scan_layers):
    plain = tiny(variant)
    params, tokens = params_of(plain), tokens_of()
    other = dataclasses.replace(plain, remat=remat, scan_layers=scan_layers)

    def loss(config):
        return jax.jit(jax.value_and_grad(lambda p: jnp.var(Transformer(config).apply(p, tokens)[0])))

    expected = loss(plain)(params)
    found = loss(other)(_stacked(params) if scan_layers else params)
    if scan_layers:
        expected = (expected[0], _stacked(expected[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, expected)


@variants
def test_bfloat16_stays_close_to_float32(variant):
    config = tiny(variant)
    half = dataclasses.replace(config, dtype="bfloat16")
    params, tokens = params_of(config), tokens_of()
    exact, rounded = forward(config)(params, tokens), forward(half)(params, tokens)
    assert rounded.dtype == jnp.float32
    assert jnp.abs(exact - rounded).max() < 0.1 * jnp.abs(exact).max()
    for leaf in jax.tree.leaves(params):
        assert leaf.dtype == jnp.float32


@variants
def test_num_params_from_the_config_equals_the_built_model(variant):
    for scan_layers in (False, True):
        config = tiny(variant, scan_layers=scan_layers)
        built = sum(x.size for x in jax.tree.leaves(params_of(config)))
        assert transformer.num_params(config) == built


@variants
def test_flops_from_the_config_equal_xlas_count_of_the_matrix_products(variant):
    # Large enough for products to dominate; XLA also counts norms, softmax and the rest, which stay under 8 %.
    config = tiny(variant, model_dim=160, num_heads=6, head_dim=32, mlp_dim=416, context_length=64, kv_lora_rank=48,
                  qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=28, vocab_size=512)  # fmt: skip
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    params = jax.eval_shape(lambda: nn.meta.unbox(Transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), int))))
    compiled = jax.jit(lambda p, t: Transformer(config).apply(p, t)[0]).lower(params, tokens).compile()
    counted = compiled.cost_analysis()["flops"] / (2 * 64)
    formula = transformer.flops_per_token(config, num_keys=64)  # the CPU path computes masked pairs too
    assert formula <= counted <= 1.08 * formula


def test_a_causal_token_sees_half_the_context_on_average():
    config = tiny(context_length=LENGTH)
    assert transformer.flops_per_token(config) == transformer.flops_per_token(config, num_keys=(LENGTH + 1) / 2)


@variants
def test_cache_bytes_per_token_are_those_of_the_built_cache(variant):
    config = tiny(variant)
    cache = transformer.init_cache(config, 1, 7)
    built = sum(x.nbytes for x in jax.tree.leaves(cache.layers)) / 7
    assert transformer.kv_bytes_per_token(config) == built


def test_mla_caches_the_latent_and_one_rotary_key():
    config = tiny("mla", dtype="bfloat16")
    assert transformer.kv_bytes_per_token(config) == 2 * (10 + 4) * 2  # layers * (rank + rope dims) * bytes


def test_output_projections_start_smaller_by_the_root_of_twice_the_depth():
    config = tiny(model_dim=64, head_dim=16, mlp_dim=96)
    params = nn.meta.unbox(Transformer(config).init(jax.random.key(0), tokens_of()))["params"]["block_0"]
    for kernel in (params["attention"]["out"]["kernel"], params["mlp"]["down"]["kernel"]):
        assert jnp.std(kernel) == pytest.approx(0.02 / 2, rel=0.05)
    assert jnp.std(params["attention"]["query"]["kernel"]) == pytest.approx(0.02, rel=0.05)


def test_dropout_follows_its_key_and_its_traced_rate():
    config = tiny()
    params, tokens = params_of(config), tokens_of()

    @jax.jit
    def run(rate, seed):
        rngs = {"dropout": jax.random.key(seed)}
        return Transformer(config).apply(params, tokens, dropout_rate=rate, rngs=rngs)[0]

    np.testing.assert_allclose(run(0.0, 1), forward(config)(params, tokens), atol=1e-5)
    np.testing.assert_array_equal(run(0.3, 1), run(0.3, 1))
    assert (run(0.3, 1) != run(0.3, 2)).any()


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    kept = Dropout().apply({}, jnp.ones((100, 100)), jnp.float32(0.3), rngs={"dropout": jax.random.key(0)})
    assert jnp.mean(kept == 0) == pytest.approx(0.3, abs=0.02)
    assert jnp.mean(kept) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 4}, r"num_heads=6 must be a multiple of model.num_kv_heads=4; try .* in \[1, 2, 3, 6\]"),
        ({"head_dim": 5}, "head_dim=5 must be even for RoPE; try 6"),
        ({"attention": "mla", "qk_rope_head_dim": 3}, "qk_rope_head_dim=3 must be even for RoPE; try 4"),
        ({"attention": "gqq"}, "Unknown attention 'gqq'. Did you mean 'gqa'"),
        ({"mlp": "swiglue"}, "Unknown mlp 'swiglue'. Did you mean 'swiglu'"),
        ({"norm": "rmsnrm"}, "Unknown norm 'rmsnrm'. Did you mean 'rmsnorm'"),
        ({"position": "ropes"}, "Unknown position 'ropes'. Did you mean 'rope'"),
    ],
)  # fmt: skip
def test_an_architecture_that_does_not_fit_is_refused_before_anything_is_built(changes, message):
    with pytest.raises(UserError, match=message):
        transformer.check(tiny(**changes))
