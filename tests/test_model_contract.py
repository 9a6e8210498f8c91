"""The contract of tests/contract.py over all variants, and what is left to say of single ones."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundry_jax.errors import UserError
from foundry_jax.model import stacking, transformer
from foundry_jax.model.attention import ATTENTIONS
from foundry_jax.model.combinations import REFUSALS
from foundry_jax.model.config import BIASES, EMBEDDINGS, PLACEMENTS, QK_NORMS, is_gated
from foundry_jax.model.layers import Dropout
from foundry_jax.model.mask import SPARSE
from foundry_jax.model.mlp import MLPS, ROUTERS
from foundry_jax.model.mlp.moe import moe_of
from foundry_jax.model.norm import NORMS
from foundry_jax.model.position import POSITIONS, ROPE_SCALINGS
from foundry_jax.model.transformer import LAYER_MASKS, Transformer
from tests import contract
from tests.variants import AXES, LENGTH, VARIANTS, forward, often, pairs, params_of, tiny, tokens_of

variants = pytest.mark.parametrize("variant", VARIANTS)
exhaustive = pytest.mark.exhaustive

# Contracts that compile a program of their own run in `make test` for variants that could break them; for the others,
# which share that code with one of those, in `make test-all`.
SEEN_BY_THE_CACHE = {"gqa", "mla_q_lora", "qk_norm_whole", *AXES["pattern"], *AXES["position"],
                     "rope_yarn", "moe_sigmoid"}  # fmt: skip
OFTEN = {
    "cached_decoding_equals_the_full_forward_pass": SEEN_BY_THE_CACHE,
    "rows_may_stand_at_different_positions_in_the_cache": SEEN_BY_THE_CACHE,
    "packed_documents_equal_separate_ones": SEEN_BY_THE_CACHE,
    "padding_changes_nothing": SEEN_BY_THE_CACHE,
    "every_parameter_has_a_finite_gradient_and_none_is_zero": {
        "gqa",
        "mla_q_lora",
        "qk_norm_head",
        "window_and_full",
        "fixed",
        "moe_sigmoid",
        "layernorm",
        "alibi",
        "normed",
    },
    "bfloat16_stays_close_to_float32": {"gqa", "mla", "fixed", "alibi", "layernorm", "moe_softmax"},
    "scanned_layers_compute_the_same": {"window_and_full"},
    "recomputation_changes_neither_loss_nor_gradient": {"mla_q_lora"},
}


def contracts():
    """Yields every contract of every variant; those of a variant follow each other and share compiled programs."""
    for variant in VARIANTS:
        for check in contract.CONTRACTS:
            name = check.__name__
            marks = [exhaustive] if variant not in OFTEN.get(name, VARIANTS) else []
            yield pytest.param(variant, check, id=f"{variant}-{name}", marks=marks)


@pytest.mark.parametrize(("variant", "check"), list(contracts()))
def test_every_variant_keeps_the_contract(variant, check):
    check(tiny(variant))


# One pair of every two axes that meet in code runs in `make test`.
COMMON_PAIRS = {
    "mla+window", "strided+alibi", "mla+rope_yarn", "mla+moe_sigmoid", "layernorm+sandwich_norm",
}  # fmt: skip


@pytest.mark.parametrize(
    "pair", [pytest.param(pair, marks=[] if pair in COMMON_PAIRS else [exhaustive]) for pair in pairs()]
)
def test_every_pair_of_variants_keeps_the_contract(pair):
    for check in contract.OF_PAIRS:
        check(tiny(pair, num_layers=2))


def test_the_common_pairs_are_pairs():
    assert set(pairs()) >= COMMON_PAIRS


@pytest.mark.parametrize(
    ("table", "field"),
    [
        (ATTENTIONS, "attention"),
        (MLPS, "mlp"),
        (ROUTERS, "moe"),
        (NORMS, "norm"),
        (POSITIONS, "position"),
        (ROPE_SCALINGS, "rope_scaling"),
        (BIASES, "bias"),
        (QK_NORMS, "qk_norm"),
        (PLACEMENTS, "norm_placement"),
        (EMBEDDINGS, "embedding"),
    ],
)
def test_every_entry_of_every_table_is_in_the_suite(table, field):
    assert {getattr(tiny(variant), field).partition("(")[0] for variant in VARIANTS} >= set(table) - {"none"}


def test_every_mask_is_in_the_suite():
    configs = [tiny(variant) for variant in VARIANTS]
    assert {letter for config in configs for letter in config.pattern} == set(LAYER_MASKS)
    assert {config.sparse.partition("(")[0] for config in configs if config.pattern == "P"} == set(SPARSE)


def test_every_refusal_is_of_two_variants_and_names_both_and_the_reason():
    names = [name for group in AXES.values() for name in group]
    for refusal in REFUSALS:
        found = [f"{a}+{b}" for a in names for b in names if refusal.applies(tiny(f"{a}+{b}"))]
        assert found, refusal
        with pytest.raises(UserError) as caught:
            transformer.check(tiny(found[0]))
        message = str(caught.value)
        assert refusal.reason in message and refusal.advice in message
        assert all(f"model.{field}=" in message for field, _ in (refusal.first, refusal.second))


def test_every_pair_that_is_not_refused_passes_the_check():
    for pair in [*VARIANTS, *pairs()]:
        transformer.check(tiny(pair))


@variants
@pytest.mark.parametrize("scan_layers", [False, True])
def test_parameters_drawn_for_training_have_the_models_own_shapes_and_names(variant, scan_layers):
    config = tiny(variant, scan_layers=scan_layers)
    drawn = jax.eval_shape(lambda key: transformer.init_params(config, key), jax.random.key(0))
    built = jax.eval_shape(
        lambda key: Transformer(config).init(key, jnp.zeros((1, 1), int))["params"], jax.random.key(0)
    )
    jax.tree.map(
        lambda a, b: pytest.fail(f"{a} {b}") if a.shape != b.shape else None, nn.meta.unbox(drawn), nn.meta.unbox(built)
    )
    names = jax.tree.leaves(jax.tree.map(lambda x: x.names, (drawn, built), is_leaf=stacking.is_boxed))
    assert names[: len(names) // 2] == names[len(names) // 2 :]


def test_layers_that_repeat_are_scanned_and_the_others_stand_alone():
    config = tiny("window_and_full", scan_layers=True, num_layers=7, moe="softmax(experts=4, top_k=2, dense_layers=1)")
    params = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
    assert {name for name in params if name.startswith("block")} == {"block_0", "blocks"}
    assert set(params["blocks"]) == {"layer_0", "layer_1"}
    assert nn.meta.unbox(params)["blocks"]["layer_0"]["attention_norm"]["scale"].shape == (3, 20)
    config = dataclasses.replace(config, num_layers=8)
    params = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
    assert {name for name in params if name.startswith("block")} == {"block_0", "blocks", "block_7"}


@pytest.mark.parametrize(
    "variant",
    often(
        [name for name in VARIANTS if name not in AXES["moe"]],
        {"gqa", "mla", "mla_q_lora", "bias_all", "window_and_full", "strided", "fixed", "relu2", "untied"},
    ),
)
def test_flops_from_the_config_equal_xlas_count_of_the_matrix_products(variant):
    # Large enough for products to dominate; XLA also counts norms, softmax and the rest, which stay under 8 %.
    config = tiny(variant, num_layers=2, model_dim=160, head_dim=32, mlp_dim=416, context_length=64, kv_lora_rank=48,
                  qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=28, vocab_size=512)  # fmt: skip
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    params = jax.eval_shape(lambda: nn.meta.unbox(Transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), int))))
    compiled = jax.jit(lambda p, t: Transformer(config).apply(p, t)[0]).lower(params, tokens).compile()
    counted = compiled.cost_analysis()["flops"] / (2 * 64)
    formula = transformer.flops_per_token(config, computed=True)
    assert formula <= counted <= 1.08 * formula


@pytest.mark.parametrize("variant", AXES["moe"])
def test_flops_of_experts_are_those_of_the_matrices_a_token_meets(variant):
    """XLA counts the body of a loop once, so its count says nothing of a loop over experts."""
    config = tiny(variant)
    moe = moe_of(config)
    matrices = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params_of(config)["params"]):
        names = [key.key for key in path]
        share = moe.top_k / moe.experts if "experts" in names else 1
        matrices += share * leaf.size if names[-1] in ("kernel", "embedding") else 0
    pairs = 4 * config.num_layers * config.num_heads * config.head_dim * LENGTH
    assert transformer.flops_per_token(config, num_keys=LENGTH) == pytest.approx(2 * matrices + pairs)


def test_a_causal_token_sees_half_the_context_on_average():
    config = tiny(context_length=LENGTH)
    assert transformer.flops_per_token(config) == transformer.flops_per_token(config, num_keys=(LENGTH + 1) / 2)


def test_a_token_of_a_window_sees_no_more_than_the_window():
    config = tiny("window", context_length=LENGTH)
    assert transformer.flops_per_token(config) == transformer.flops_per_token(config, num_keys=(1 + 2 + 6 * 3) / 8)


def test_mla_caches_the_latent_and_one_rotary_key():
    config = tiny("mla", dtype="bfloat16")
    assert transformer.kv_bytes_per_token(config) == 3 * (10 + 4) * 2  # layers * (rank + rope dims) * bytes


def test_a_rolling_cache_holds_the_window():
    config = tiny("window_and_full", num_layers=2)
    whole = transformer.kv_bytes_per_token(tiny(num_layers=2))
    assert transformer.kv_bytes_per_token(config) == whole / 2 * (1 + 3 / LENGTH)
    cache = transformer.init_cache(config, 1, LENGTH)
    assert cache.layers["block_0"]["key"].shape[1] == 3 and cache.layers["block_1"]["key"].shape[1] == LENGTH


def test_output_projections_start_smaller_by_the_root_of_twice_the_depth():
    config = tiny(model_dim=64, head_dim=16, mlp_dim=96)
    params = nn.meta.unbox(Transformer(config).init(jax.random.key(0), tokens_of()))["params"]["block_0"]
    for kernel in (params["attention"]["out"]["kernel"], params["mlp"]["down"]["kernel"]):
        assert jnp.std(kernel) == pytest.approx(0.02 / 6**0.5, rel=0.05)
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
        ({"pattern": "LX"}, "Unknown letter of model.pattern 'X'.*Choose from: L, P, S"),
        ({"pattern": ""}, "Unknown letter of model.pattern ' '.*Choose from: L, P, S"),
        ({"pattern": "P", "sparse": "stride(4)"}, "Unknown model.sparse 'stride'. Did you mean 'strided'"),
        ({"pattern": "P", "sparse": "strided(stride=0)"}, "stride must be at least 1; try strided"),
        ({"pattern": "P", "sparse": "fixed(stride=4, summary=5)"}, "summary must be between 1 and stride=4"),
        ({"rope_scaling": "yarm(4)"}, "Unknown model.rope_scaling 'yarm'. Did you mean 'yarn'"),
        ({"rope_scaling": "llama3(low=4)"}, "low=4.0 must be smaller than high=4.0"),
        ({"rope_scaling": "linear(factor=0.5)"}, "factor=0.5 must be a finite number at least 1"),
        ({"position": "alibi", "rope_scaling": "linear(factor=2)"}, "model.position=alibi with model.rope_scaling=lin"),
        ({"moe": "softmax(experts=2, top_k=3)"}, "top_k=3.*experts=2"),
        ({"moe": "softmx(experts=2)"}, "Unknown model.moe 'softmx'. Did you mean 'softmax'"),
    ],
)
def test_an_architecture_that_does_not_fit_is_refused_before_anything_is_built(changes, message):
    with pytest.raises(UserError, match=message):
        transformer.check(tiny(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "model.window=0 must be a finite number at least 1"),
        ({"bias": "kv"}, "model.bias='kv' must be one of none, qkv, attention, all"),
        ({"qk_norm": "heads"}, "model.qk_norm='heads' must be one of none, head, whole"),
        ({"norm_placement": "mid"}, "model.norm_placement='mid' must be one of pre, post, sandwich"),
        ({"embedding": "big"}, "model.embedding='big' must be one of plain, scaled, normed"),
        ({"attention_softcap": -1.0}, "model.attention_softcap=-1.0 must be a finite number at least 0"),
    ],
)
def test_a_field_out_of_range_is_refused_as_soon_as_it_is_set(changes, message):
    with pytest.raises(UserError, match=message):
        tiny(**changes)


def test_text_longer_than_the_learned_positions_is_refused():
    config = tiny("learned")
    with pytest.raises(
        UserError, match="9 tokens are more than the model.context_length=8 positions that were learned"
    ):
        forward(config)(params_of(config), tokens_of(length=LENGTH + 1))
    with pytest.raises(UserError, match="A cache of 9 tokens needs model.context_length=9, not 8"):
        transformer.init_cache(config, 1, LENGTH + 1)


def test_mlps_with_a_gate_are_named_after_the_gated_linear_unit():
    assert {name: is_gated(name) for name in MLPS} == {name: mlp.gated for name, mlp in MLPS.items()}


def test_swapping_the_mlp_keeps_the_number_of_parameters():
    sizes = {name: transformer.num_params(tiny(mlp=name, mlp_dim=0)) for name in MLPS}
    assert len(set(sizes.values())) == 1
