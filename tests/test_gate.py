"""The gate lets every sound variant through, and refuses what is planted: each leak by the check that it is for."""

import dataclasses
from unittest.mock import Mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundry_jax import compilation, losses, train_step
from foundry_jax.config import Config, load
from foundry_jax.errors import UserError
from foundry_jax.model import mask, position, transformer
from foundry_jax.model.attention import cache, core, latent
from foundry_jax.model.config import ModelConfig
from foundry_jax.model.layers import Embed, logical
from foundry_jax.model.layout import Layout
from foundry_jax.model.mlp import dense, router
from foundry_jax.model.norm import RMSNorm
from foundry_jax.search import gate
from foundry_jax.search.subject import length_of
from tests.conftest import ROOT
from tests.variants import VARIANTS, VOCAB, often, tiny

LENGTH = 32


def config_of(variant: str = "gqa", overrides=(), **changes) -> Config:
    """Returns a run of a tiny architecture (tests/variants.py) on 32 tokens, a layer for each letter of its pattern."""
    layers = len(tiny(variant).pattern)
    model = tiny(variant, **{"context_length": LENGTH, "num_layers": layers, "window": 6} | changes)
    return dataclasses.replace(load(str(ROOT / "configs" / "smoke.py"), overrides), model=model)


def batch_of(*, rows: int = 4, length: int = LENGTH) -> dict[str, np.ndarray]:
    """Returns a batch of random text."""
    tokens = np.random.default_rng(3).integers(0, VOCAB, (rows, length + 1), dtype=np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((rows, length), np.float32)}


def pairs_of(*, count: int = 3) -> dict[str, np.ndarray]:
    """Returns a batch of pairs of random completions, of different lengths, behind prompts of 5 tokens."""
    batch = {name: x.reshape(count, 2, LENGTH) for name, x in batch_of(rows=2 * count).items()}
    at = np.arange(LENGTH)[None, None]
    ends = (LENGTH - np.arange(2 * count) * 2).reshape(count, 2, 1)
    batch["positions"] = np.where(at < ends, at, -1).astype(np.int32)
    batch["weights"] = ((at >= 4) & (at < ends)).astype(np.float32)
    return batch


def outcome(config: Config, batch: dict[str, np.ndarray], name: str) -> str | None:
    """Returns the evidence with which one check fails, None if it passes."""
    try:
        gate.Gate(config, batch).parts()[name]()
    except gate.Failed as failure:
        return str(failure)
    return None


def see_one_token_ahead(patch):
    patch.setattr(mask.Causal, "visible", lambda self, query, key: key <= query + 1)


def see_ahead_at_one_position(patch):
    """As an off-by-one at the edge of a block would."""
    patch.setattr(mask.Causal, "visible", lambda self, query, key: key <= query + (query == 15))


def add_the_mask_as_zeros_and_ones(patch):
    patch.setattr(core, "HIDDEN", -1.0)


def a_window_around_the_token(patch):
    patch.setattr(mask.Window, "visible", lambda self, query, key: jnp.abs(query - key) < self.size)


def a_window_that_begins_one_late(patch):
    patch.setattr(mask.Window, "visible", lambda self, query, key: (key <= query + 1) & (query + 1 - key < self.size))


def columns_of_the_future(patch):
    visible = lambda self, query, key: (key > query) & (query % self.stride == key % self.stride)  # noqa: E731
    patch.setattr(mask._Column, "visible", visible)


def the_whole_own_block(patch):
    patch.setattr(mask._OwnBlock, "visible", lambda self, query, key: query // self.stride == key // self.stride)
    patch.setattr(mask._OwnBlock, "layout", lambda self, length: Layout())  # the sound one never makes those products


def the_summary_of_the_own_block(patch):
    def visible(self, query, key):
        own_or_earlier = key // self.stride <= query // self.stride
        return own_or_earlier & (key % self.stride >= self.stride - self.summary)

    patch.setattr(mask._Summary, "visible", visible)


def norm_over_the_sequence(patch):
    norm = RMSNorm.__call__
    patch.setattr(RMSNorm, "__call__", lambda self, x: norm(self, x) * (1 + jnp.mean(x, axis=1, keepdims=True)))


def norm_over_the_batch(patch):
    norm = RMSNorm.__call__
    patch.setattr(RMSNorm, "__call__", lambda self, x: norm(self, x) * (1 + jnp.mean(x, axis=0, keepdims=True)))


def mix_in_the_next_token(patch):
    mlp = dense.MLP.__call__
    patch.setattr(dense.MLP, "__call__", lambda self, x, *rest: mlp(self, x, *rest) + 0.01 * jnp.roll(x, -1, axis=1))


def embed_the_next_token(patch):
    embed = Embed.__call__
    patch.setattr(Embed, "__call__", lambda self, tokens: embed(self, jnp.roll(tokens, -1, axis=-1)))


class GatedLeak(nn.Module):
    """An MLP that sees the next token, by a factor that begins at zero."""

    config: ModelConfig
    num_params, flops_per_token = dense.MLP.num_params, dense.MLP.flops_per_token

    @nn.compact
    def __call__(self, x_BLD, real_BL):
        factor_D = self.param("factor", logical(nn.initializers.zeros, "embed"), (self.config.model_dim,))
        return dense.MLP(self.config, name="inner")(x_BLD, real_BL) + factor_D[None, None] * jnp.roll(x_BLD, -1, axis=1)


def a_leak_that_training_would_open(patch):
    patch.setattr(transformer, "MLP", GatedLeak)


def experts_choose_tokens(patch):
    """Zhou et al. 2022, 2202.09368: each expert takes the tokens that suit it best, of all the sequence."""

    def route(self, logits, bias=None):
        probs = jax.nn.softmax(logits, axis=-1)
        capacity = max(1, logits.shape[-2] * self.top_k // logits.shape[-1])
        best = jax.lax.top_k(jnp.swapaxes(probs, -1, -2), capacity)[0]
        taken = probs >= best[..., -1][..., None, :]
        experts = router._best(jnp.where(taken, probs, probs - 1), self.top_k)
        return router.Routing(experts, jnp.take_along_axis(jnp.where(taken, probs, 0.0), experts, axis=-1), probs)

    patch.setattr(router.Softmax, "route", route)


def drop_the_worst_tokens_of_an_expert(patch):
    """Capacity that goes to the most confident tokens first: Riquelme et al. 2021, 2106.05974."""
    sound = router.Softmax.route

    def route(self, logits, bias=None):
        routing = sound(self, logits)
        confidence = jnp.max(routing.probs, axis=-1, keepdims=True)
        return dataclasses.replace(
            routing, weights=jnp.where(confidence >= jnp.median(confidence, axis=-2, keepdims=True), routing.weights, 0)
        )

    patch.setattr(router.Softmax, "route", route)


def drop_what_comes_too_late_in_the_batch(patch):
    """Capacity in the order of the batch: it sees no future, but what other sequences sent to an expert."""
    sound = router.Softmax.route

    def route(self, logits, bias=None):
        routing = sound(self, logits)
        sent = jnp.cumsum(jax.nn.one_hot(routing.experts, logits.shape[-1]), axis=-3)
        place = jnp.take_along_axis(sent, routing.experts[..., None], axis=-1)[..., 0]
        capacity = logits.shape[-2] * self.top_k // logits.shape[-1] // 2
        return dataclasses.replace(routing, weights=jnp.where(place <= capacity, routing.weights, 0))

    patch.setattr(router.Softmax, "route", route)


def balance_over_the_sequence(patch):
    """Scores minus their mean over all tokens: the choice of one hangs on all."""
    sound = router.Sigmoid.route
    patch.setattr(
        router.Sigmoid,
        "route",
        lambda self, logits, bias: sound(self, logits - jnp.mean(logits, axis=-2, keepdims=True), bias),
    )


def give_the_model_its_labels(patch):
    def statistics(program, variables, batch, **rest):
        return sound(program, variables, batch | {"inputs": batch["targets"]}, **rest)

    sound = train_step._statistics
    patch.setattr(train_step, "_statistics", statistics)


def _labels(patch, change):
    sound = train_step.token_statistics
    patch.setattr(train_step, "token_statistics", lambda logits, targets: sound(logits, change(targets)))


def predict_the_token_after_the_next(patch):
    _labels(patch, lambda targets: jnp.roll(targets, -1, axis=1))


def predict_the_token_itself(patch):
    _labels(patch, lambda targets: jnp.roll(targets, 1, axis=1))


def predict_nothing(patch):
    _labels(patch, jnp.zeros_like)


def smooth_over_neighbours(patch):
    sound = losses.token_statistics
    patch.setattr(
        train_step,
        "token_statistics",
        lambda logits, targets: jax.tree.map(lambda x: (x + jnp.roll(x, 1, axis=1)) / 2, sound(logits, targets)),
    )


def restart_positions_with_every_call(patch):
    rope = position.rope
    patch.setattr(
        position, "rope", lambda x, positions, *args, **kw: rope(x, jnp.arange(positions.shape[1])[None], *args, **kw)
    )


def forget_the_oldest_token_of_a_window(patch):
    sound = cache.rolling_slots

    def early(cached_BS, new_BL):
        slots, size = sound(cached_BS, new_BL), cached_BS.shape[1]
        return slots.replace(slots_BL=jnp.where(slots.slots_BL < size, new_BL % (size - 2), size))

    patch.setattr(transformer, "rolling_slots", early)


def overwrite_the_last_token(patch):
    sound = cache.full_slots
    patch.setattr(transformer, "full_slots", lambda cached, new: sound(cached, jnp.where(new > 0, new - 1, new)))


def read_padding_from_the_cache(patch):
    sound = transformer.Transformer.hidden

    def seeing(self, tokens, placement=None, cache=None, *rest):
        if cache is not None:
            placement = placement.replace(positions_BL=jnp.maximum(placement.positions_BL, 0))
        return sound(self, tokens, placement, cache, *rest)

    patch.setattr(transformer.Transformer, "hidden", seeing)


def decode_latents_with_another_scale(patch):
    sound = core.attend

    def scaled(q, k, v, mask, *, scale, **rest):
        return sound(q, k, v, mask, scale=scale if mask.aligned else 0.8 * scale, **rest)

    patch.setattr(latent, "attend", scaled)


def keys_in_half_precision_in_the_cache(patch):
    sound = cache.Slots.update
    patch.setattr(
        cache.Slots,
        "update",
        lambda self, old, new: sound(self, old, new.astype(jnp.bfloat16) if new.ndim > 2 else new),
    )


def _hidden_with(patch, change):
    sound = transformer.Transformer.hidden
    patch.setattr(
        transformer.Transformer,
        "hidden",
        lambda self, tokens, placement=None, *rest: sound(self, tokens, placement and change(placement), *rest),
    )


def see_other_documents(patch):
    _hidden_with(patch, lambda placement: placement.replace(segments_BL=None))


def see_the_document_before(patch):
    _hidden_with(patch, lambda p: p.replace(segments_BL=p.segments_BL // 2, positions_BL=p.positions_BL))


def count_positions_on_over_documents(patch):
    def on(placement):
        at = jnp.arange(placement.positions_BL.shape[1], dtype=jnp.int32)[None]
        return placement.replace(positions_BL=jnp.where(placement.positions_BL < 0, -1, at))

    _hidden_with(patch, on)


def mix_over_the_edges_of_documents(patch):
    """A convolution over the last two tokens: causal, but it does not know where documents begin."""
    mlp = dense.MLP.__call__
    shifted = lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]  # noqa: E731
    patch.setattr(dense.MLP, "__call__", lambda self, x, *rest: mlp(self, x + shifted(x), *rest))


def a_root_of_zero(patch):
    sound = losses.token_statistics

    def rooted(logits, targets):
        found = sound(logits, targets)
        return found.replace(nll=found.nll + jnp.sqrt(found.log_z - jax.lax.stop_gradient(found.log_z)))

    patch.setattr(train_step, "token_statistics", rooted)


def cut_every_gradient(patch):
    sound = losses.token_statistics
    patch.setattr(train_step, "token_statistics", lambda logits, targets: sound(jax.lax.stop_gradient(logits), targets))


def train_on_other_labels_than_are_evaluated(patch):
    sound = train_step._token_sums

    def sums(program, statistics, batch, scales):
        weights = batch["weights"].at[:, ::2].set(0)
        return sound(program, statistics, batch | {"weights": weights}, scales)

    patch.setattr(train_step, "_token_sums", sums)


CAUSAL, LABELS, DECODE, PACKED, GRADIENTS = "causality", "labels", "decode", "packing", "gradients"
PLANTED = [
    (see_one_token_ahead, "gqa", CAUSAL, "the future leaks: .* position .* nats"),
    (see_one_token_ahead, "mla", CAUSAL, "the future leaks"),
    (see_one_token_ahead, "mqa", CAUSAL, "the future leaks"),
    (see_one_token_ahead, "alibi", CAUSAL, "the future leaks"),
    (see_one_token_ahead, "nope", CAUSAL, "the future leaks"),
    (see_one_token_ahead, "window_and_full", CAUSAL, "the future leaks"),
    (see_ahead_at_one_position, "gqa", CAUSAL, "the future leaks: .* at position 15, by"),
    (add_the_mask_as_zeros_and_ones, "gqa", CAUSAL, "the future leaks"),
    (add_the_mask_as_zeros_and_ones, "fixed", CAUSAL, "the future leaks"),
    (a_window_around_the_token, "window", CAUSAL, "the future leaks"),
    (a_window_that_begins_one_late, "window", CAUSAL, "the future leaks"),
    (columns_of_the_future, "strided", CAUSAL, "the future leaks"),
    (the_whole_own_block, "fixed", CAUSAL, "the future leaks"),
    (the_summary_of_the_own_block, "fixed", CAUSAL, "the future leaks"),
    (norm_over_the_sequence, "gqa", CAUSAL, "the future leaks"),
    (norm_over_the_batch, "gqa", CAUSAL, "the future leaks"),
    (mix_in_the_next_token, "gqa", CAUSAL, "the future leaks"),
    (embed_the_next_token, "gqa", CAUSAL, "the future leaks"),
    (a_leak_that_training_would_open, "gqa", CAUSAL, "the future leaks"),
    (experts_choose_tokens, "moe_softmax", CAUSAL, "the future leaks"),
    (drop_the_worst_tokens_of_an_expert, "moe_softmax", CAUSAL, "the future leaks"),
    (drop_what_comes_too_late_in_the_batch, "moe_softmax", CAUSAL, "the future leaks"),
    (balance_over_the_sequence, "moe_sigmoid", CAUSAL, "the future leaks"),
    (give_the_model_its_labels, "gqa", LABELS, "depends on other targets than its own"),
    (predict_the_token_after_the_next, "gqa", LABELS, "depends on other targets than its own"),
    (predict_the_token_itself, "gqa", LABELS, "depends on other targets than its own"),
    (predict_nothing, "gqa", LABELS, "does not depend on its target"),
    (smooth_over_neighbours, "gqa", LABELS, "depends on other targets than its own"),
    (restart_positions_with_every_call, "gqa", DECODE, "decoding differs"),
    (forget_the_oldest_token_of_a_window, "window", DECODE, "decoding differs"),
    (overwrite_the_last_token, "gqa", DECODE, "decoding differs"),
    (read_padding_from_the_cache, "window", DECODE, "decoding differs"),
    (decode_latents_with_another_scale, "mla", DECODE, "decoding differs"),
    (keys_in_half_precision_in_the_cache, "gqa", DECODE, "decoding differs"),
    (embed_the_next_token, "gqa", DECODE, "decoding differs"),
    (experts_choose_tokens, "moe_softmax", DECODE, "decoding differs"),
    (see_other_documents, "gqa", PACKED, "has other losses than alone"),
    (see_other_documents, "strided", PACKED, "has other losses than alone"),
    (see_the_document_before, "gqa", PACKED, "has other losses than alone|see each other"),
    (count_positions_on_over_documents, "learned", PACKED, "has other losses than alone"),
    (mix_over_the_edges_of_documents, "gqa", PACKED, "has other losses than alone"),
    (a_root_of_zero, "gqa", GRADIENTS, "the gradient is not finite at block_0"),
    (cut_every_gradient, "gqa", GRADIENTS, "the gradient of all parameters is zero"),
    (train_on_other_labels_than_are_evaluated, "gqa", GRADIENTS, "a cross-entropy of .* the evaluation"),
]  # fmt: skip
# The others run in `make test-all`.
OFTEN = {
    (see_ahead_at_one_position, "gqa", CAUSAL), (a_window_that_begins_one_late, "window", CAUSAL),
    (a_leak_that_training_would_open, "gqa", CAUSAL), (experts_choose_tokens, "moe_softmax", CAUSAL),
    (give_the_model_its_labels, "gqa", LABELS), (overwrite_the_last_token, "gqa", DECODE),
    (see_other_documents, "gqa", PACKED), (a_root_of_zero, "gqa", GRADIENTS),
}  # fmt: skip


@pytest.fixture
def fresh_parameters():
    """Parameters of a model with more of them must not be those of the sound one, nor the other way round."""

    def clear():
        for cached in (compilation.compile_init, compilation.abstract_inputs, compilation._boxed_init):
            cached.cache_clear()

    clear()
    yield
    clear()


@pytest.mark.parametrize(
    ("plant", "variant", "name", "evidence"),
    [
        pytest.param(*row, id=f"{row[0].__name__}-{row[1]}-{row[2]}",
                     marks=[] if row[:3] in OFTEN else [pytest.mark.exhaustive])
        for row in PLANTED
    ],
)  # fmt: skip
def test_what_is_planted_is_refused(plant, variant, name, evidence, monkeypatch, request):
    if plant is a_leak_that_training_would_open:
        request.getfixturevalue("fresh_parameters")
    plant(monkeypatch)
    with pytest.raises(gate.Failed, match=evidence):
        gate.Gate(config_of(variant), batch_of()).parts()[name]()


@pytest.mark.exhaustive
@pytest.mark.parametrize("variant", ["gqa", "moe_softmax"])
def test_a_leak_is_told_from_rounding_in_half_precision(variant, monkeypatch):
    see_one_token_ahead(monkeypatch)
    with pytest.raises(gate.Failed, match="the future leaks"):
        gate.Gate(config_of(variant, dtype="bfloat16"), batch_of()).parts()[CAUSAL]()


PAIRS = ("mla+window", "strided+alibi", "mla+rope_yarn", "mla+moe_sigmoid", "fixed+moe_softmax", "layernorm+post_norm")


@pytest.mark.parametrize("variant", often([*VARIANTS, *PAIRS], {"window_and_full"}))
def test_sound_models_pass(variant):
    found = gate.check(config_of(variant, num_layers=2), batch_of())
    assert [check.name for check in found] == [LABELS, CAUSAL, DECODE, PACKED, GRADIENTS]
    assert [check.evidence for check in found if not check.passed] == []


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("variant", "overrides", "changes"),
    [
        ("gqa", ["lora.rank=3"], {}),
        ("moe_softmax", ["lora.rank=3", "lora.dropout=0.1"], {}),
        ("gqa", ["optimizer.accumulation_steps=4"], {"dropout": 0.1, "scan_layers": True, "remat": "full"}),
        ("window", ["loss.name=focal", "loss.z_loss=0.01"], {"dtype": "bfloat16"}),
        ("moe_softmax", [], {"dtype": "bfloat16"}),
        ("gqa", ["optimizer.name=lion", "sharding.fsdp=4"], {"context_length": 5}),
        ("window", [], {"context_length": 1024, "position": "learned"}),
    ],
)
def test_recipes_pass(variant, overrides, changes):
    found = gate.check(config_of(variant, overrides, **changes), batch_of(length=changes.get("context_length", LENGTH)))
    assert [check.evidence for check in found if not check.passed] == []
    assert "finite gradients; the training step and the evaluation agree on" in found[-1].evidence


@pytest.mark.parametrize(("loss", "rank"), [("dpo", 3), pytest.param("ipo", 0, marks=pytest.mark.exhaustive)])
def test_pairs_of_completions_pass(loss, rank):
    overrides = [f"loss.name={loss}", f"lora.rank={rank}", "data.preferences=pairs.jsonl"]
    batch = pairs_of()
    found = gate.check(config_of(overrides=overrides), batch)
    assert [check.evidence for check in found if not check.passed] == []
    followed = batch["weights"][..., :-1] * (batch["positions"][..., 1:] > 0)
    assert found[0].evidence.startswith(f"{int(followed.sum())} targets of the first training batch")


@pytest.mark.parametrize(
    ("targets", "evidence"),
    [
        (
            lambda batch: batch["inputs"],
            r"96% of the targets .* \(the first: sequence 0, position 0\); they are the token itself, which the model",
        ),
        (lambda batch: np.roll(batch["targets"], -1, axis=1), "they are the token 2 positions later"),
        (lambda batch: np.roll(batch["targets"], 2, axis=1), "they are the token before"),
        (lambda batch: batch["targets"][::-1], "they are no shift of the inputs"),
        (
            lambda batch: np.where(np.arange(LENGTH) == 20, 0, batch["targets"]),
            "3% of the targets .* position 20.; the others are",
        ),
    ],
    ids=["own", "later", "before", "others", "one"],
)
def test_labels_of_the_batch_that_are_no_next_tokens_are_refused(targets, evidence, monkeypatch):
    batch = batch_of()
    batch |= {"targets": targets(batch)}
    monkeypatch.setattr(gate, "Subject", Mock())  # no model is needed for that
    with pytest.raises(gate.Failed, match=evidence):
        gate.Gate(config_of(), batch).labels_of_the_batch()


def test_labels_count_within_documents_only():
    batch = batch_of()
    batch["segments"] = np.where(np.arange(LENGTH) < 11, 1, 2) * np.ones((4, 1), np.int32)
    batch["targets"] = batch["targets"].copy()
    batch["targets"][:, 10] = 0  # the end of a document
    batch["weights"][:, 20], batch["targets"][:, 20] = 0, 0
    assert gate._counted(batch).sum() == 4 * (LENGTH - 1 - 2)
    assert not (gate._counted(batch) & (batch["targets"][:, :-1] != batch["inputs"][:, 1:])).any()


def test_contexts_are_shortened_where_attention_stays_the_same():
    long = {"context_length": 4096, "position": "rope"}
    assert length_of(tiny(**long)) == 256
    assert length_of(tiny(context_length=100)) == 100
    assert length_of(tiny("window", **long | {"window": 200})) == 512  # so that the window hides something
    assert length_of(tiny("window_and_full", **long | {"window": 3000})) == 4096
    assert length_of(tiny("strided", **long)) == 256


def test_too_short_a_context_is_one_line():
    with pytest.raises(UserError, match="model.context_length=3 must be at least 4 tokens"):
        gate.check(config_of(context_length=3), batch_of(length=3))
