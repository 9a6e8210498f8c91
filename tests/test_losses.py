"""Losses against numbers computed by hand and against optax; logits in chunks against logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from foundry_jax import config, losses
from foundry_jax.config import load
from foundry_jax.errors import UserError
from foundry_jax.losses import (
    PAIR_LOSSES,
    TOKEN_LOSSES,
    LossScales,
    PairStatistics,
    TokenStatistics,
    chunked_statistics,
    num_chunks,
    token_statistics,
)
from foundry_jax.mutate.training import LOSS_NUMBERS

LOGITS = jnp.array([[[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]]])
TARGETS = jnp.array([[2, 1]])


def scales(label_smoothing=0.0, z_loss=0.0, focal_gamma=2.0, dpo_beta=0.1):
    return LossScales(*map(jnp.float32, (label_smoothing, z_loss, focal_gamma, dpo_beta)))


def pairs(log_ratio, length=1.0):
    """Returns the statistics of pairs with these log-ratios [[chosen, rejected], ...]."""
    log_ratio = jnp.asarray(log_ratio, jnp.float32)
    return PairStatistics(log_ratio, jnp.broadcast_to(jnp.asarray(length, jnp.float32), log_ratio.shape))


def random_logits(seed=0, shape=(3, 5, 11)):
    logits = jax.random.normal(jax.random.key(seed), shape) * 3
    return logits, jax.random.randint(jax.random.key(seed + 1), shape[:2], 0, shape[2])


def test_the_tables_of_the_config_are_those_of_the_losses():
    assert config.TOKEN_LOSSES.keys() == TOKEN_LOSSES.keys()
    assert config.PAIR_LOSSES.keys() == PAIR_LOSSES.keys()
    assert config.LOSSES.keys() == losses.LOSSES.keys() == LOSS_NUMBERS.keys()


def test_statistics_equal_numbers_computed_by_hand():
    found = token_statistics(LOGITS, TARGETS)
    log_z = np.log(np.exp(1) + np.exp(2) + np.exp(4))
    np.testing.assert_allclose(found.log_z, [[log_z, np.log(3)]], rtol=1e-6)
    np.testing.assert_allclose(found.nll, [[log_z - 4, np.log(3)]], rtol=1e-5)
    np.testing.assert_allclose(found.uniform_nll, [[log_z - 7 / 3, np.log(3)]], rtol=1e-6)


def test_cross_entropy_smoothing_and_z_loss_equal_optax_in_value_and_gradient():
    logits, targets = random_logits()
    epsilon, z = 0.13, 0.02

    def ours(x):
        losses = TOKEN_LOSSES["cross_entropy"](token_statistics(x, targets), scales(epsilon, z))
        return jnp.mean(losses * jnp.arange(1, 6, dtype=jnp.float32)[None])

    def oracle(x):
        smoothed = optax.smooth_labels(jax.nn.one_hot(targets, 11), epsilon)
        losses = optax.softmax_cross_entropy(x, smoothed) + z * jnp.square(jax.nn.logsumexp(x, axis=-1))
        return jnp.mean(losses * jnp.arange(1, 6, dtype=jnp.float32)[None])

    for mine, theirs in zip(*(jax.jit(jax.value_and_grad(f))(logits) for f in (ours, oracle)), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-6)


def test_focal_loss_of_a_probability_of_one_half():
    even = TokenStatistics(*jnp.full((3, 1, 1), np.log(2)))
    assert float(TOKEN_LOSSES["focal"](even, scales(focal_gamma=2))[0, 0]) == pytest.approx(0.25 * np.log(2), rel=1e-6)
    assert float(TOKEN_LOSSES["focal"](even, scales(z_loss=0.5))[0, 0]) == pytest.approx(
        0.25 * np.log(2) + 0.5 * np.log(2) ** 2, rel=1e-6
    )


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_of_two_classes_equals_optax_in_value_and_gradient(gamma):
    logits, targets = jnp.array([[-3.0, -0.5, 0.1, 2.0]]), jnp.array([[1, 0, 1, 0]])

    def ours(z):
        statistics = token_statistics(jnp.stack([jnp.zeros_like(z), z], axis=-1), targets)
        return jnp.sum(TOKEN_LOSSES["focal"](statistics, scales(focal_gamma=gamma)))

    def oracle(z):
        return jnp.sum(optax.sigmoid_focal_loss(z, targets.astype(jnp.float32), alpha=None, gamma=gamma))

    for mine, theirs in zip(*(jax.jit(jax.value_and_grad(f))(logits) for f in (ours, oracle)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-6)


def test_focal_loss_with_gamma_zero_is_cross_entropy():
    logits, targets = random_logits()
    found = [
        jax.value_and_grad(lambda x, f=f: jnp.sum(f(token_statistics(x, targets), scales(focal_gamma=0, z_loss=0.1))))(
            logits
        )
        for f in (TOKEN_LOSSES["focal"], TOKEN_LOSSES["cross_entropy"])
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *found)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_loss_has_a_gradient_where_the_target_is_certain(gamma):
    certain = jnp.array([[[60.0, 0.0, 0.0]]])

    def loss(x):
        return jnp.sum(TOKEN_LOSSES["focal"](token_statistics(x, jnp.array([[0]])), scales(focal_gamma=gamma)))

    value, grad = jax.value_and_grad(loss)(certain)
    assert float(value) == 0 and jnp.isfinite(grad).all() and jnp.abs(grad).max() < 1e-6


@pytest.mark.parametrize("name", TOKEN_LOSSES)
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_huge_logits_stay_finite(name, scale):
    numbers = scales(label_smoothing=0.1, z_loss=1e-4, focal_gamma=0.5)

    def loss(x):
        return jnp.sum(TOKEN_LOSSES[name](token_statistics(x, TARGETS), numbers))

    value, grad = jax.value_and_grad(loss)(LOGITS * scale)
    assert jnp.isfinite(value) and jnp.isfinite(grad).all()


def test_dpo_equals_numbers_computed_by_hand():
    """-log sigmoid(beta D) for D = 1.5, -2, 0; the gradient is -beta sigmoid(-beta D)."""
    statistics = pairs([[1.0, -0.5], [-3.0, -1.0], [7.0, 7.0]])
    np.testing.assert_allclose(PAIR_LOSSES["dpo"](statistics, scales()), [0.620957, 0.798139, 0.693147], atol=1e-6)
    smoothed = PAIR_LOSSES["dpo"](statistics, scales(label_smoothing=0.2))
    np.testing.assert_allclose(smoothed, [0.650957, 0.758139, 0.693147], atol=1e-6)
    grad = jax.grad(lambda x: jnp.sum(PAIR_LOSSES["dpo"](pairs(x), scales())))(statistics.log_ratio)
    slopes = -0.1 / (1 + np.exp(0.1 * np.array([1.5, -2.0, 0.0])))
    np.testing.assert_allclose(grad, np.stack([slopes, -slopes], axis=1), rtol=1e-6)


def test_ipo_is_about_log_probabilities_per_token():
    """(3/2 - 1/4 - 1/(2 beta))^2 = (1.25 - 5)^2."""
    found = PAIR_LOSSES["ipo"](pairs([[3.0, 1.0]], [[2.0, 4.0]]), scales())
    np.testing.assert_allclose(found, [14.0625], rtol=1e-6)
    assert float(PAIR_LOSSES["ipo"](pairs([[0.0, 0.0]], 0.0), scales(dpo_beta=0.5))[0]) == 1.0  # no completion at all


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("margin", [1e6, -1e6])
def test_huge_margins_stay_finite(name, margin):
    def loss(x):
        return jnp.sum(PAIR_LOSSES[name](pairs(x), scales(label_smoothing=0.1)))

    value, grad = jax.value_and_grad(loss)(jnp.array([[margin, 0.0]]))
    assert jnp.isfinite(value) and jnp.isfinite(grad).all()


REFUSED = [
    (
        ["loss.name=focal", "loss.label_smoothing=0.1"],
        "focal has no label smoothing: set loss.label_smoothing to 0, not",
    ),
    (
        ["loss.name=ipo", "loss.label_smoothing=0.1"],
        "ipo has no label smoothing: .* or loss.name to cross_entropy or dpo",
    ),
    (
        ["loss.name=dpo", "loss.z_loss=1e-4"],
        "dpo has no z loss: set loss.z_loss to 0, not 0.0001, or loss.name to cross",
    ),
    (["loss.name=ipo", "loss.z_loss=1e-4"], "ipo has no z loss: set loss.z_loss to 0"),
    (
        ["loss.name=dpo", "loss.label_smoothing=0.5"],
        "loss.label_smoothing=0.5 must be less than 0.5 with loss.name=dpo",
    ),
    (
        ["loss.name=dpo"],
        "loss.name=dpo learns from pairs of completions: set data.preferences to a JSONL file with the",
    ),
    (["data.preferences=x.jsonl"], "data.preferences='x.jsonl' is not used by loss.name=cross_entropy: .* dpo or ipo"),
    (
        ["loss.name=fokal"],
        "Unknown loss.name 'fokal'. Did you mean 'focal'. Choose from: cross_entropy, dpo, focal, ipo",
    ),
    (["loss.focal_gamma=-1"], "loss.focal_gamma=-1.0 must be a finite number at least 0"),
    (["loss.dpo_beta=0"], "loss.dpo_beta=0.0 must be a finite number at least 1e-06"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_numbers_that_a_loss_does_not_have_are_refused(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        load("configs/tiny.py", overrides)
    assert "\n" not in str(caught.value)


def naive_statistics(x_BLD, kernel_DV, targets_BL):
    B, L, D = x_BLD.shape
    logits = (x_BLD.reshape(B * L, D) @ kernel_DV).astype(jnp.float32)
    return token_statistics(logits.reshape(B, L, -1), targets_BL)


def mixed_loss(statistics_of):
    """Returns a function of (x, kernel, targets) whose gradient uses every statistic, each token differently."""

    def loss(x_BLD, kernel_DV, targets_BL):
        s = statistics_of(x_BLD, kernel_DV, targets_BL)
        w_BL = jnp.cos(jnp.arange(targets_BL.size, dtype=jnp.float32)).reshape(targets_BL.shape)
        return jnp.sum(w_BL * (s.nll + 0.3 * s.uniform_nll + 0.1 * jnp.square(s.log_z)))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def hidden_and_kernel(dtype=jnp.float32, scale=1.0):
    keys = jax.random.split(jax.random.key(0), 3)
    x_BLD = (scale * jax.random.normal(keys[0], (3, 7, 10))).astype(dtype)
    kernel_DV = jax.random.normal(keys[1], (10, 11)).astype(dtype)
    return x_BLD, kernel_DV, jax.random.randint(keys[2], (3, 7), 0, 11)


@pytest.mark.parametrize(("chunks", "shards"), [(1, 1), (3, 1), (7, 3)])
def test_chunks_give_the_statistics_and_gradients_of_the_whole(monkeypatch, chunks, shards):
    """7 tokens in 3 chunks need padding; the kernel's gradient is summed 5 rows at a time."""
    monkeypatch.setattr(losses, "KERNEL_ROWS", 6)
    chunked = lambda *a: chunked_statistics(*a, num_chunks=chunks, shards=shards)  # noqa: E731
    inputs = hidden_and_kernel()
    whole, found = (mixed_loss(f)(*inputs) for f in (naive_statistics, chunked))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * float(jnp.abs(a).max()))
    np.testing.assert_allclose(
        chunked(*inputs).nll,
        optax.softmax_cross_entropy_with_integer_labels(inputs[0] @ inputs[1], inputs[2]),
        rtol=1e-5,
        atol=1e-6,
    )


def test_chunks_in_bfloat16_sum_in_float32():
    """The logits are the same numbers; the naive gradient of the kernel is rounded once, the chunked one too."""
    inputs = hidden_and_kernel(jnp.bfloat16)
    whole, found = (mixed_loss(f)(*inputs) for f in (naive_statistics, lambda *a: chunked_statistics(*a, num_chunks=3)))
    assert [x.dtype for x in jax.tree.leaves(found)] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(found), strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        np.testing.assert_allclose(a, b, atol=2**-7 * float(jnp.abs(a).max()))  # one unit in bfloat16's last place


def test_chunks_of_huge_logits_stay_finite():
    found = mixed_loss(lambda *a: chunked_statistics(*a, num_chunks=3))(*hidden_and_kernel(scale=1e4))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(found))


@pytest.mark.parametrize(
    ("tokens", "length", "vocab_size", "chunks"),
    [
        (64 * 256, 256, 8192, 1),  # configs/baseline.py, just not too large
        (64 * 257, 257, 8192, 5),
        (4096, 1024, 128256, 16),
        (2**20, 8, 128256, 8),  # never less than one token of each sequence
    ],
)
def test_in_how_many_chunks(tokens, length, vocab_size, chunks):
    assert num_chunks(tokens, length, vocab_size) == chunks


def test_chunks_take_at_most_a_quarter_of_the_memory():
    """As XLA plans it for a vocabulary of 128,256; tests/bench/loss_memory.py has more sizes, and the time."""
    shape = jax.ShapeDtypeStruct
    inputs = shape((4, 1024, 16), jnp.float32), shape((16, 128256), jnp.float32), shape((4, 1024), jnp.int32)
    chunks = num_chunks(4096, 1024, 128256)
    memory = [
        mixed_loss(f).lower(*inputs).compile().memory_analysis().temp_size_in_bytes
        for f in (naive_statistics, lambda *a: chunked_statistics(*a, num_chunks=chunks))
    ]
    assert memory[0] > 4096 * 128256 * 4 > memory[1] > 0
    assert memory[1] <= memory[0] / 4
