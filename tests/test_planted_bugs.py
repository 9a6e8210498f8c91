"""The contract suite catches what it is there for: each bug is planted, and the contracts named must fail."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from foundry_jax.model import mask, position, transformer
from foundry_jax.model.attention import cache, core, grouped_query
from foundry_jax.model.layers import Linear
from foundry_jax.model.mlp import router
from foundry_jax.model.norm import RMSNorm
from tests import contract, variants
from tests.variants import tiny


@pytest.fixture
def fresh_programs():
    """Programs compiled of the sound model must not stand in for the broken one, nor the other way round."""

    def clear():
        for cached in (variants.forward, variants.placed, variants.decoder, variants.gradient):
            cached.cache_clear()

    clear()
    yield
    clear()


def leak_one_token(patch):
    patch.setattr(mask.Causal, "visible", lambda self, query, key: key <= query + 1)


def add_the_mask_as_zeros_and_ones(patch):
    patch.setattr(core, "HIDDEN", -1.0)


def widen_the_window_by_one(patch):
    patch.setitem(transformer.LAYER_MASKS, "S", lambda config: mask.Window(config.window + 1))


def forget_the_scale(patch):
    attend = core.attend
    patch.setattr(
        grouped_query, "attend", lambda q, k, v, mask, *, scale, **rest: attend(q, k, v, mask, scale=1.0, **rest)
    )


def tile_key_heads_instead_of_repeating_them(patch):
    attend = core.attend

    def tiled(q, k, v, mask, **rest):
        groups = q.shape[2] // k.shape[2]
        return attend(q, jnp.tile(k, (1, 1, groups, 1)), jnp.tile(v, (1, 1, groups, 1)), mask, **rest)

    patch.setattr(grouped_query, "attend", tiled)


def rotate_pairs_instead_of_halves(patch):
    rope = position.rope
    patch.setattr(position, "rope", lambda *args, interleaved: rope(*args, interleaved=not interleaved))


def restart_positions_with_every_call(patch):
    rope = position.rope

    def restarting(x, positions_BL, *args, **kwargs):
        return rope(x, jnp.arange(positions_BL.shape[1])[None, :], *args, **kwargs)

    patch.setattr(position, "rope", restarting)


def forget_positions(patch):
    patch.setattr(position, "rope", lambda x, *args, **kwargs: x)


def turn_alibi_around(patch):
    slopes = position.Alibi.slopes
    patch.setattr(position.Alibi, "slopes", staticmethod(lambda num_heads: -slopes(num_heads)))


def see_other_documents(patch):
    hidden = transformer.Transformer.hidden

    def without_segments(self, tokens, placement=None, *args):
        placement = placement and dataclasses.replace(placement, segments_BL=None)
        return hidden(self, tokens, placement, *args)

    patch.setattr(transformer.Transformer, "hidden", without_segments)


def see_padding(patch):
    hidden = transformer.Transformer.hidden

    def with_padding(self, tokens, placement=None, *args):
        if placement is not None:
            placement = dataclasses.replace(placement, positions_BL=jnp.maximum(placement.positions_BL, 0))
        return hidden(self, tokens, placement, *args)

    patch.setattr(transformer.Transformer, "hidden", with_padding)


def roll_the_cache_too_early(patch):
    rolling_slots = cache.rolling_slots

    def early(cached_BS, new_BL):
        slots, size = rolling_slots(cached_BS, new_BL), cached_BS.shape[1]
        return slots.replace(slots_BL=jnp.where(slots.slots_BL < size, new_BL % (size - 2), size))

    patch.setattr(transformer, "rolling_slots", early)


def read_a_token_twice_when_it_is_fed_twice(patch):
    rolling_slots = cache.rolling_slots

    def stale(cached_BS, new_BL):
        return rolling_slots(cached_BS, new_BL).replace(fresh_BS=cached_BS != mask.EMPTY)

    patch.setattr(transformer, "rolling_slots", stale)


def cut_the_gradient_of_every_kernel(patch):
    kernel = Linear._kernel
    patch.setattr(Linear, "_kernel", lambda self: jax.lax.stop_gradient(kernel(self)))


def norm_over_the_batch(patch):
    norm = RMSNorm.__call__
    patch.setattr(RMSNorm, "__call__", lambda self, x: norm(self, x) * (1 + jnp.mean(x, axis=0, keepdims=True)))


def let_the_balancing_bias_into_the_weights(patch):
    route = router.Sigmoid.route
    patch.setattr(router.Sigmoid, "route", lambda self, logits, bias: route(self, logits + bias[None, None], bias))


def forget_a_norm(patch):
    patch.setattr(transformer, "_norms_per_layer", lambda config: 1)


BUGS = [
    (leak_one_token, "gqa", "no_token_sees_the_future"),
    (leak_one_token, "mla", "no_token_sees_the_future"),
    (add_the_mask_as_zeros_and_ones, "gqa", "no_token_sees_the_future"),
    (add_the_mask_as_zeros_and_ones, "window", "logits_equal_the_reference"),
    (widen_the_window_by_one, "window", "logits_equal_the_reference"),
    (forget_the_scale, "gqa", "logits_equal_the_reference"),
    (tile_key_heads_instead_of_repeating_them, "gqa", "logits_equal_the_reference"),
    (rotate_pairs_instead_of_halves, "gqa", "logits_equal_the_reference"),
    (rotate_pairs_instead_of_halves, "mla", "logits_equal_the_reference"),
    (restart_positions_with_every_call, "gqa", "cached_decoding_equals_the_full_forward_pass"),
    (forget_positions, "gqa", "logits_equal_the_reference"),
    (turn_alibi_around, "alibi", "logits_equal_the_reference"),
    (see_other_documents, "gqa", "packed_documents_equal_separate_ones"),
    (see_other_documents, "fixed", "packed_documents_equal_separate_ones"),
    (see_padding, "gqa", "padding_changes_nothing"),
    (roll_the_cache_too_early, "window", "cached_decoding_equals_the_full_forward_pass"),
    (read_a_token_twice_when_it_is_fed_twice, "window", "rows_may_stand_at_different_positions_in_the_cache"),
    (cut_the_gradient_of_every_kernel, "gqa", "every_parameter_has_a_finite_gradient_and_none_is_zero"),
    (norm_over_the_batch, "gqa", "rows_of_a_batch_do_not_see_each_other"),
    (let_the_balancing_bias_into_the_weights, "moe_sigmoid", "logits_equal_the_reference"),
    (forget_a_norm, "gqa", "the_number_of_parameters_is_known_from_the_config"),
]


@pytest.mark.parametrize(("bug", "variant", "name"), BUGS, ids=[f"{bug.__name__}-{v}-{name}" for bug, v, name in BUGS])
def test_the_suite_catches(bug, variant, name, monkeypatch, fresh_programs):
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        getattr(contract, name)(tiny(variant))
