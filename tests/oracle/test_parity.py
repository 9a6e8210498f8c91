"""The model against `transformers`: same weights, same logits, same gradients, for every family.

Oracles are re-initialised away from their defaults (weights N(0, .15), 1-D tensors += N(0, .2)): with the defaults a
wrong rotary pairing moves the logits by only 9e-3, so a sloppy model would pass. Measured floors between two correct
implementations at these sizes are 7e-6 on logits and 2e-6 relative on gradients.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundry_jax.config import load
from foundry_jax.losses import token_statistics
from foundry_jax.model import transformer
from foundry_jax.model.mask import EMPTY, Placement
from foundry_jax.model.mlp import moe
from foundry_jax.model.transformer import Transformer
from tests import reference

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="needs the oracle extra: make oracle")
pytest.importorskip("transformers", reason="needs the oracle extra: make oracle")
families = pytest.importorskip("tests.oracle.families")

LOGITS_ATOL, GRADIENT_RTOL = 5e-5, 1e-4
# Keys' biases without rotary positions shift all logits of a query alike: their gradient is zero, and computed as 1e-9.
GRADIENT_ATOL = 1e-7


def config_of(family, **changes):
    """Returns our model config of a family."""
    return dataclasses.replace(load("configs/baseline.py").model, **family.fields | changes)


def tokens_of(length=21):
    """Returns tokens [3, length]."""
    return np.random.default_rng(0).integers(0, families.VOCAB, (3, length))


@functools.cache
def oracle_of(name):
    """Returns (family, torch model, our config, our parameters)."""
    family = families.FAMILIES[name]
    model = family.make()
    return family, model, config_of(family), {"params": families.converted(family, families.tensors(model))}


# These differ from another family in nothing that a cache could see; each case compiles two programs.
SAME_CACHE = (
    "llama_rope_linear", "llama_rope_llama3", "llama_rope_yarn_mscale", "llama_geglu", "llama_geglu_tanh", "llama_glu",
    "llama_attention_biases", "nemotron_relu2", "mixtral", "deepseek_v2_groups", "deepseek_v3_q_lora", "mpt_4_heads",
    "bloom_4_heads")  # fmt: skip


@pytest.fixture(params=families.FAMILIES)
def oracle(request):
    """What oracle_of returns, for each family."""
    return oracle_of(request.param)


def test_names_cover_every_parameter_in_both_directions(oracle):
    """families.converted has checked that every tensor of theirs is used exactly once."""
    _, _, config, params = oracle
    ours = nn.meta.unbox(jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0))))
    shapes = functools.partial(jax.tree.map, lambda x: x.shape)
    assert shapes(params["params"]) == shapes(ours)


def test_logits_and_gradients_equal_the_oracles(oracle):
    family, model, config, params = oracle
    tokens = tokens_of()
    model.zero_grad()
    theirs = model(input_ids=torch.tensor(tokens), labels=torch.tensor(tokens))
    theirs.loss.backward()

    def loss(params):
        logits, _ = Transformer(config).apply(params, tokens)
        return jnp.mean(token_statistics(logits[:, :-1], jnp.asarray(tokens[:, 1:])).nll), logits

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, theirs.logits.detach().numpy(), atol=LOGITS_ATOL)
    assert float(value) == pytest.approx(theirs.loss.item(), rel=1e-5)
    gradients_equal(grads, family, model)


def gradients_equal(ours, family, model):
    """Asserts that our gradients are those that torch has left in the model."""

    def close(path, ours, oracles):
        limit = max(GRADIENT_RTOL * np.abs(oracles).max(), GRADIENT_ATOL)
        np.testing.assert_allclose(ours, oracles, rtol=0, atol=limit, err_msg=jax.tree_util.keystr(path))

    expected = {"params": families.converted(family, families.gradients(model), offset=False)}
    jax.tree_util.tree_map_with_path(close, ours, expected)


@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name not in SAME_CACHE])
def test_cached_decoding_equals_the_oracles_forward_pass(name):
    _, model, config, params = oracle_of(name)
    tokens = tokens_of()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(tokens)).logits.numpy()
    decode = jax.jit(lambda tokens, placement, cache: Transformer(config).apply(params, tokens, placement, cache))
    cache = transformer.init_cache(config, 3, 32)
    parts, start = [], 0
    for length in [9] + [1] * 12:
        positions = jnp.broadcast_to(jnp.arange(start, start + length), (3, length))
        logits, cache = decode(tokens[:, start : start + length], Placement(positions), cache)
        parts.append(logits)
        start += length
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, atol=LOGITS_ATOL)


def model_and_reference(config, params, tokens, positions=None, segments=None):
    """Returns the logits of our model, and those of the reference that the contract suite holds it against."""
    placement = None
    if positions is not None:
        placement = Placement(jnp.asarray(positions), None if segments is None else jnp.asarray(segments))
    logits, _ = jax.jit(Transformer(config).apply)(params, tokens, placement)
    return logits, reference.logits(config, params, tokens, positions, segments)


def pairs(length):
    """Returns (positions of queries [L, 1], of keys [1, L])."""
    return np.arange(length)[:, None], np.arange(length)[None, :]


def window(query, key):
    return (key <= query) & (key > query - 5)


def strided(query, key):
    return (key <= query) & ((query - key < 4) | ((query - key) % 4 == 0))


def fixed(query, key):
    return (key <= query) & ((key // 5 == query // 5) | (key % 5 >= 3))


@pytest.mark.parametrize("name", ["llama_gqa_wide_heads", "deepseek_v3_dense"])
@pytest.mark.parametrize(
    ("visible", "fields"),
    [
        (window, {"pattern": "S", "window": 5}),
        (strided, {"pattern": "P", "sparse": "strided(stride=4)"}),
        (fixed, {"pattern": "P", "sparse": "fixed(stride=5, summary=2)"}),
    ],
)
def test_masked_layers_equal_the_oracle_under_the_same_mask(name, visible, fields):
    """transformers adds a float mask of four dimensions; a boolean one would be added too, as 0 and 1."""
    family, model, _, params = oracle_of(name)
    tokens = tokens_of()
    mask = np.where(visible(*pairs(21)), 0.0, np.finfo(np.float32).min).astype(np.float32)
    with torch.no_grad():
        expected = model(
            input_ids=torch.tensor(tokens), attention_mask=torch.tensor(np.tile(mask, (3, 1, 1, 1)))
        ).logits.numpy()
    for ours in model_and_reference(config_of(family, **fields), params, tokens):
        np.testing.assert_allclose(ours, expected, atol=LOGITS_ATOL)


@pytest.mark.parametrize("name", ["llama_gqa_wide_heads", "mistral_window", "mixtral", "deepseek_v3_yarn"])
def test_packed_documents_equal_the_oracles_packed_documents(name):
    """transformers takes positions that restart for documents, as long as use_cache is off."""
    _, model, config, params = oracle_of(name)
    tokens, lengths = tokens_of(), [5, 9, 7]
    positions = np.concatenate([np.arange(n) for n in lengths])[None, :].repeat(3, axis=0)
    segments = np.repeat(np.arange(3), lengths)[None, :].repeat(3, axis=0)
    with torch.no_grad():
        expected = model(
            input_ids=torch.tensor(tokens), position_ids=torch.tensor(positions), use_cache=False
        ).logits.numpy()
    for ours in model_and_reference(config, params, tokens, positions, segments):
        np.testing.assert_allclose(ours, expected, atol=LOGITS_ATOL)


@pytest.mark.parametrize("name", ["llama_gqa_wide_heads", "mistral_window", "mixtral", "bloom_6_heads", "gpt2"])
def test_left_padding_equals_the_oracles_left_padding(name):
    _, model, config, params = oracle_of(name)
    tokens, padding = tokens_of(), np.array([0, 4, 11])
    positions = np.arange(21)[None, :] - padding[:, None]
    real = positions >= 0
    at = {} if name.startswith("bloom") else {"position_ids": torch.tensor(np.maximum(positions, 0))}
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(real.astype(int)), **at).logits
    for ours in model_and_reference(config, params, tokens, np.where(real, positions, EMPTY)):
        np.testing.assert_allclose(np.asarray(ours)[real], expected.numpy()[real], atol=LOGITS_ATOL)


@pytest.mark.parametrize(("name", "padding"), [("mixtral", (0, 0, 0)), ("qwen3_moe", (0, 4, 11))])
def test_router_losses_and_their_gradients_equal_the_oracles(name, padding):
    """Load balance and z, over the tokens of all layers together; padding does not count."""
    family, model, config, params = oracle_of(name)
    tokens = tokens_of()
    real = np.arange(21)[None, :] < 21 - np.array(padding)[:, None]
    placement = Placement(jnp.asarray(np.where(real, np.arange(21), EMPTY)))
    model.zero_grad()
    mask = torch.tensor(real.astype(int))
    theirs = model(input_ids=torch.tensor(tokens), attention_mask=mask, output_router_logits=True)
    logits = torch.stack(theirs.router_logits).reshape(families.LAYERS, 3, 21, -1)[:, torch.tensor(real)]
    their_z = (torch.logsumexp(logits, dim=-1) ** 2).mean()
    (theirs.aux_loss + 0.1 * their_z).backward()

    def loss(params):
        _, sown = Transformer(config).apply(params, tokens, placement, mutable=["router"])
        stats = transformer.router_stats(sown)
        balance, z = moe.router_losses(stats)
        return balance + 0.1 * z, (balance, z, jnp.sum(stats.dropped))

    (_, (balance, z, dropped)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert float(balance) == pytest.approx(theirs.aux_loss.item(), rel=1e-5)
    assert float(z) == pytest.approx(their_z.item(), rel=1e-5)
    assert float(dropped) == 0
    gradients_equal(grads, family, model)
