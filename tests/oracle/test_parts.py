"""Parts of the model and the losses against torch and transformers: tables, slopes, losses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundry_jax import losses
from foundry_jax.config import load
from foundry_jax.model import position
from tests import reference

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="needs the oracle extra: make oracle")
hf = pytest.importorskip("transformers", reason="needs the oracle extra: make oracle")

TABLE_RTOL = 1e-6  # some units in the last place of a float32: torch divides a number by a tensor by its reciprocal
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = {  # ours -> theirs
    "linear(factor=4)": {"rope_type": "linear", "factor": 4.0},
    "llama3(factor=8, original_length=8192, low=1, high=4)": LLAMA3
    | {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
    "llama3(factor=32, original_length=32, low=1, high=4)": LLAMA3
    | {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 32},
    "yarn(factor=40, original_length=4096)": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
    },
    "yarn(factor=4, original_length=512, beta_fast=16, beta_slow=2, mscale=0.7, mscale_all_dim=1.3)": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    },
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("theta", "dim"), [(1e4, 64), (5e5, 128), (1e6, 16)])
def test_rotary_tables_equal_transformers(scaling, theta, dim):
    parameters = SCALINGS[scaling] | {"rope_theta": theta}
    config = hf.LlamaConfig(
        hidden_size=4 * dim, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=parameters
    )
    table, factor = hf.modeling_rope_utils.ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, None)
    ours = dataclasses.replace(load("configs/baseline.py").model, rope_theta=theta, rope_scaling=scaling)
    for ours_table, ours_factor in (
        position.rotary_frequencies(ours, dim),
        reference.frequencies(theta, dim, scaling),
    ):
        np.testing.assert_allclose(ours_table, table.numpy(), rtol=TABLE_RTOL)
        assert ours_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("dim", [16, 64, 128])
def test_plain_rotary_tables_equal_torch_to_the_bit(theta, dim):
    """float64 rounded to float32 would move a cosine by 4.6e-4 at position 8191."""
    expected = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    ours = dataclasses.replace(load("configs/baseline.py").model, rope_theta=theta)
    np.testing.assert_array_equal(position.rotary_frequencies(ours, dim)[0], expected.numpy())


@pytest.mark.parametrize("heads", range(1, 33))
def test_alibi_slopes_equal_bloom_and_mpt(heads):
    bloom = hf.models.bloom.modeling_bloom._get_alibi_slopes(heads, torch.device("cpu")).numpy()
    bias = hf.models.mpt.modeling_mpt.build_mpt_alibi_tensor(heads, 5).numpy()  # [heads, 1, keys], last key at 0
    for slopes in (position.Alibi.slopes(heads), reference.alibi_slopes(heads)):
        np.testing.assert_allclose(slopes, bloom, rtol=1e-6)
        np.testing.assert_allclose(slopes, -bias[:, 0, -2], rtol=1e-6)


def random_logits(shape=(3, 7, 29)):
    """Returns (logits, targets, mask of the targets that count)."""
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal(shape).astype(np.float32)
    return logits, rng.integers(0, shape[-1], shape[:-1]), rng.random(shape[:-1]) < 0.7


def scales(**numbers):
    """Returns LossScales, zero where nothing is said."""
    names = [field.name for field in dataclasses.fields(losses.LossScales)]
    return losses.LossScales(**{name: jnp.float32(numbers.get(name, 0.0)) for name in names})


def masked_mean(loss, mask):
    return jnp.sum(jnp.where(mask, loss, 0.0)) / mask.sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunks", [0, 3])
def test_cross_entropy_and_its_gradients_equal_torch(smoothing, chunks):
    """torch masks targets with ignore_index, and spreads the smoothing over the whole vocabulary as we do."""
    _, targets, mask = random_logits()
    rng = np.random.default_rng(1)
    x = rng.standard_normal((*targets.shape, 11)).astype(np.float32)
    kernel = 0.5 * rng.standard_normal((11, 29)).astype(np.float32)

    def ours(x, kernel):
        if chunks:
            statistics = losses.chunked_statistics(x, kernel, jnp.asarray(targets), num_chunks=chunks)
        else:
            statistics = losses.token_statistics(x @ kernel, jnp.asarray(targets))
        return masked_mean(losses.cross_entropy(statistics, scales(label_smoothing=smoothing)), mask)

    their_x, their_kernel = (torch.tensor(a, requires_grad=True) for a in (x, kernel))
    expected = torch.nn.functional.cross_entropy(
        (their_x @ their_kernel).reshape(-1, 29),
        torch.tensor(np.where(mask, targets, -100).reshape(-1)),
        ignore_index=-100,
        label_smoothing=smoothing,
    )
    expected.backward()
    value, gradients = jax.value_and_grad(ours, argnums=(0, 1))(x, kernel)
    assert float(value) == pytest.approx(expected.item(), rel=1e-6)
    for ours_gradient, theirs in zip(gradients, (their_x.grad, their_kernel.grad), strict=True):
        np.testing.assert_allclose(ours_gradient, theirs.numpy(), atol=1e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_and_z_loss_and_their_gradients_equal_torch(gamma):
    logits, targets, mask = random_logits()

    def ours(logits):
        statistics = losses.token_statistics(logits, jnp.asarray(targets))
        return masked_mean(losses.focal(statistics, scales(focal_gamma=gamma, z_loss=1e-2)), mask)

    theirs = torch.tensor(logits, requires_grad=True)
    log_p = torch.log_softmax(theirs, dim=-1).gather(-1, torch.tensor(targets)[..., None])[..., 0]
    per_token = -((1 - log_p.exp()) ** gamma) * log_p + 1e-2 * torch.logsumexp(theirs, dim=-1) ** 2
    expected = per_token[torch.tensor(mask)].mean()
    expected.backward()
    value, gradient = jax.value_and_grad(ours)(jnp.asarray(logits))
    assert float(value) == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_preference_losses_and_their_gradients_equal_torch(smoothing):
    ratios = np.array([[3.0, 1.5], [-1.0, 1.0], [0.5, 0.5], [40.0, -700.0]], np.float32)  # the last one saturates
    length = jnp.ones_like(ratios)

    def ours(ratios):
        statistics = losses.PairStatistics(ratios, length)
        return jnp.mean(losses.dpo(statistics, scales(dpo_beta=0.1, label_smoothing=smoothing)))

    theirs = torch.tensor(ratios, requires_grad=True)
    reward = 0.1 * (theirs[:, 0] - theirs[:, 1])
    sigmoid = torch.nn.functional.logsigmoid
    expected = (-(1 - smoothing) * sigmoid(reward) - smoothing * sigmoid(-reward)).mean()
    expected.backward()
    value, gradient = jax.value_and_grad(ours)(jnp.asarray(ratios))
    assert float(value) == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-7)
