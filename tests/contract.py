"""What every architecture must satisfy, whatever it is: each function takes a config and asserts one property.

The suites in test_model_contract.py run them over all variants and their pairs; test_planted_bugs.py breaks the model
on purpose and wants to see them fail.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from foundry_jax.model import stacking, transformer
from foundry_jax.model.config import ModelConfig
from tests import reference
from tests.variants import BATCH, LENGTH, VOCAB, decoder, forward, gradient, params_of, placed, tokens_of

# Two orders of summation differ by 5e-6 at these sizes.
ATOL = 5e-5


def logits_have_one_row_per_token_in_float32(config: ModelConfig) -> None:
    logits = forward(config)(params_of(config), tokens_of())
    assert logits.shape == (BATCH, LENGTH, VOCAB)
    assert logits.dtype == jnp.float32


def logits_equal_the_reference(config: ModelConfig) -> None:
    """tests/reference.py says the same in plain numpy, in float64."""
    params, tokens = params_of(config), tokens_of()
    expected = reference.logits(config, params, np.asarray(tokens))
    np.testing.assert_allclose(forward(config)(params, tokens), expected, atol=ATOL)


def no_token_sees_the_future(config: ModelConfig) -> None:
    params, tokens = params_of(config), tokens_of()
    before = forward(config)(params, tokens)
    for changed in (1, 4, LENGTH - 1):
        after = forward(config)(params, tokens.at[:, changed].add(1) % VOCAB)
        np.testing.assert_array_equal(before[:, :changed], after[:, :changed])
        assert (before[:, changed] != after[:, changed]).any(axis=-1).all()


def the_order_of_the_prefix_matters(config: ModelConfig) -> None:
    params, tokens = params_of(config), tokens_of()
    swapped = tokens.at[:, [-3, -2]].set(tokens[:, [-2, -3]])
    difference = forward(config)(params, tokens)[:, -1] - forward(config)(params, swapped)[:, -1]
    assert jnp.abs(difference).max() > 1e-2


def rows_of_a_batch_do_not_see_each_other(config: ModelConfig) -> None:
    params, tokens = params_of(config), tokens_of()
    other = tokens.at[1:].set(tokens_of(seed=9)[1:])
    np.testing.assert_array_equal(forward(config)(params, tokens)[0], forward(config)(params, other)[0])


def packed_documents_equal_separate_ones(config: ModelConfig) -> None:
    params, tokens = params_of(config), tokens_of()
    positions = jnp.broadcast_to(jnp.array([0, 1, 2, 0, 1, 2, 3, 4]), tokens.shape)
    segments = jnp.broadcast_to(jnp.array([1, 1, 1, 2, 2, 2, 2, 2]), tokens.shape)
    packed = placed(config)(params, tokens, positions, segments)
    np.testing.assert_allclose(packed[:, :3], forward(config)(params, tokens)[:, :3], atol=ATOL)
    second = forward(config)(params, jnp.roll(tokens, -3, axis=1))
    np.testing.assert_allclose(packed[:, 3:], second[:, :5], atol=ATOL)
    changed = placed(config)(params, tokens.at[:, 1].add(1) % VOCAB, positions, segments)
    np.testing.assert_array_equal(packed[:, 3:], changed[:, 3:])


def padding_changes_nothing(config: ModelConfig) -> None:
    params, tokens = params_of(config), tokens_of()
    expected = forward(config)(params, tokens)[:, : LENGTH - 2]
    text, segments, empty = tokens[:, : LENGTH - 2], jnp.ones_like(tokens), jnp.full((BATCH, 2), -1)
    order = jnp.broadcast_to(jnp.arange(LENGTH - 2), text.shape)
    for pad in (0, 5):
        padding = jnp.full((BATCH, 2), pad)
        left = placed(config)(params, jnp.concatenate([padding, text], 1), jnp.concatenate([empty, order], 1), segments)
        right = placed(config)(
            params, jnp.concatenate([text, padding], 1), jnp.concatenate([order, empty], 1), segments
        )
        np.testing.assert_allclose(left[:, 2:], expected, atol=ATOL)
        np.testing.assert_allclose(right[:, :-2], expected, atol=ATOL)
        assert jnp.isfinite(left).all() and jnp.isfinite(right).all()


def cached_decoding_equals_the_full_forward_pass(config: ModelConfig) -> None:
    params, tokens = params_of(config), tokens_of()
    cache = transformer.init_cache(config, BATCH, LENGTH)
    logits, start = [], 0
    for length in (5, 1, 1, 1):
        positions = jnp.broadcast_to(jnp.arange(start, start + length), (BATCH, length))
        part, cache = decoder(config)(params, tokens[:, start : start + length], positions, cache)
        logits.append(part)
        start += length
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), forward(config)(params, tokens), atol=ATOL)


def rows_may_stand_at_different_positions_in_the_cache(config: ModelConfig) -> None:
    """The prompts of a batch are left-padded, and rows that are done feed their last token again and again."""
    params, tokens = params_of(config), tokens_of()
    full = forward(config)(params, tokens)
    cache = transformer.init_cache(config, BATCH, LENGTH)
    prompts, ends = np.array([2, 5, 4])[:, None], np.array([3, 8, 6])[:, None]
    positions = np.arange(5)[None, :] - (5 - prompts)
    positions = jnp.asarray(np.where(positions < 0, -1, positions))
    prompt = jnp.take_along_axis(tokens, jnp.maximum(positions, 0), axis=1)
    logits, cache = decoder(config)(params, prompt, positions, cache)
    for row in range(BATCH):
        np.testing.assert_allclose(logits[row, -1], full[row, prompts[row, 0] - 1], atol=ATOL)
    for t in range(3):
        at = jnp.asarray(np.minimum(prompts + t, ends - 1))
        logits, cache = decoder(config)(params, jnp.take_along_axis(tokens, at, axis=1), at, cache)
        for row in range(BATCH):
            np.testing.assert_allclose(logits[row, 0], full[row, at[row, 0]], atol=ATOL)


def every_parameter_has_a_finite_gradient_and_none_is_zero(config: ModelConfig) -> None:
    _, grads = gradient(config)(params_of(config), tokens_of())
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(grad).all(), path
        # The balancing bias of a router is set outside the gradient, and must not have one.
        assert (jnp.abs(grad).max() > 0) == (path[-1].key != "balance_bias"), path


def bfloat16_stays_close_to_float32(config: ModelConfig) -> None:
    half = dataclasses.replace(config, dtype="bfloat16")
    params, tokens = params_of(config), tokens_of()
    exact, rounded = forward(config)(params, tokens), forward(half)(params, tokens)
    assert rounded.dtype == jnp.float32
    assert jnp.isfinite(rounded).all()
    error = jnp.abs(exact - rounded)
    # Rounding may send a token to another expert: then its row, and what sees it, differs by more.
    close = jnp.quantile(error, 0.5) if config.moe != "none" else error.max()
    assert close < 0.1 * jnp.abs(exact).max()


def the_number_of_parameters_is_known_from_the_config(config: ModelConfig) -> None:
    built = sum(x.size for x in jax.tree.leaves(params_of(config)))
    assert transformer.num_params(config) == built


def the_size_of_the_cache_is_known_from_the_config(config: ModelConfig) -> None:
    cache = transformer.init_cache(config, 1, config.context_length)
    built = sum(x.nbytes for x in jax.tree.leaves(cache.layers)) / config.context_length
    assert transformer.kv_bytes_per_token(config) == built


def scanned_layers_compute_the_same(config: ModelConfig) -> None:
    """Loss, gradient and cached decoding."""
    scanned = dataclasses.replace(config, scan_layers=True)
    params, tokens = params_of(config), tokens_of()
    stacked = {"params": stacking.restack(params["params"], config, scanned)}
    (value, grads), (other, other_grads) = gradient(config)(params, tokens), gradient(scanned)(stacked, tokens)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    back = stacking.restack(other_grads["params"], scanned, config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), back, grads["params"])
    cache = transformer.init_cache(scanned, BATCH, LENGTH)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    logits, cache = decoder(scanned)(stacked, tokens[:, :5], positions[:, :5], cache)
    more, _ = decoder(scanned)(stacked, tokens[:, 5:6], positions[:, 5:6], cache)
    expected = forward(config)(params, tokens)
    np.testing.assert_allclose(jnp.concatenate([logits, more], axis=1), expected[:, :6], atol=ATOL)


def recomputation_changes_neither_loss_nor_gradient(config: ModelConfig, remat: str = "full") -> None:
    params, tokens = params_of(config), tokens_of()
    (value, grads), (other, other_grads) = (
        gradient(c)(params, tokens) for c in (config, dataclasses.replace(config, remat=remat))
    )
    np.testing.assert_allclose(other, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), other_grads, grads)


# For each variant. What compiles a program of its own comes last.
CONTRACTS = (
    logits_have_one_row_per_token_in_float32,
    logits_equal_the_reference,
    no_token_sees_the_future,
    the_order_of_the_prefix_matters,
    rows_of_a_batch_do_not_see_each_other,
    the_number_of_parameters_is_known_from_the_config,
    the_size_of_the_cache_is_known_from_the_config,
    packed_documents_equal_separate_ones,
    padding_changes_nothing,
    cached_decoding_equals_the_full_forward_pass,
    rows_may_stand_at_different_positions_in_the_cache,
    every_parameter_has_a_finite_gradient_and_none_is_zero,
    bfloat16_stays_close_to_float32,
    scanned_layers_compute_the_same,
    recomputation_changes_neither_loss_nor_gradient,
)

# For each pair of variants, what neither shows alone.
OF_PAIRS = (
    logits_equal_the_reference,
    no_token_sees_the_future,
    the_number_of_parameters_is_known_from_the_config,
    the_size_of_the_cache_is_known_from_the_config,
    packed_documents_equal_separate_ones,
    padding_changes_nothing,
    cached_decoding_equals_the_full_forward_pass,
    every_parameter_has_a_finite_gradient_and_none_is_zero,
)
