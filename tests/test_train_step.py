"""One step: what it may change, what recompiles it, what accumulation and averaging mean."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundry_jax import compilation, losses, sharding
from foundry_jax.config import load
from foundry_jax.losses import LOSSES, PAIR_LOSSES
from foundry_jax.model.stacking import restack
from foundry_jax.optimizer import OPTIMIZERS, hyperparameters
from foundry_jax.train_step import Program, eval_step, init_state, noise_scale, train_step, unbox
from tests.variants import VOCAB, often, params_of, tiny

ROWS, LENGTH = 4, 8


def config_of(argument="", loss="cross_entropy", **model):
    """Returns tiny.py with a much smaller model."""
    preferences = "pairs.jsonl" if loss in PAIR_LOSSES else ""
    overrides = [f"loss.name={loss}", f"data.preferences={preferences}"]
    return dataclasses.replace(load(f"configs/tiny.py:{argument}", overrides), model=tiny(**model))


def batch_of(seed=0, rows=ROWS):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, LENGTH + 1)).astype(np.int32)
    weights = (rng.random((rows, LENGTH)) < 0.7).astype(np.float32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def pairs_of(seed=0, pairs=ROWS):
    """Returns a batch of pairs: a prompt of 2 tokens, completions of 1 to 6, and what a reference said of them."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (pairs, 2, LENGTH + 1)).astype(np.int32)
    at, ends = np.arange(LENGTH), rng.integers(2, LENGTH + 1, (pairs, 2, 1))
    return {
        "inputs": tokens[..., :-1],
        "targets": tokens[..., 1:],
        "weights": ((at >= 1) & (at < ends)).astype(np.float32),
        "positions": np.where(at < ends, at, -1).astype(np.int32),
        "reference": rng.normal(-10, 1, (pairs, 2)).astype(np.float32),
    }


def traced(function, program):
    """Returns a new jitted step or evaluation of a program without adapters."""
    without = {"base": {}} if function is train_step else {"hyper": None, "base": {}}
    return jax.jit(functools.partial(function, program, **without))


@functools.cache
def step_of(program):
    return traced(train_step, program)


@functools.cache
def eval_of(program):
    return traced(eval_step, program)


@functools.cache
def init_of(program):
    return jax.jit(lambda hyper: unbox(init_state(program, hyper)))


def begin(config):
    program, hyper = Program.of(config), hyperparameters(config)
    return step_of(program), init_of(program)(hyper), hyper


def test_training_lowers_the_loss_on_a_batch_it_sees_again_and_again():
    step, state, hyper = begin(config_of("warmup=1,lr=1e-2"))
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch_of(), hyper)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(VOCAB), abs=0.1)
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 30


@pytest.mark.parametrize(
    ("name", "loss"), [*((name, "cross_entropy") for name in OPTIMIZERS), *(("adamw", loss) for loss in LOSSES)][1:]
)
def test_every_optimizer_and_loss_changes_every_parameter(name, loss):
    step, state, hyper = begin(config_of(f"optimizer={name},warmup=0", loss))
    new, _ = step(state, pairs_of() if loss in PAIR_LOSSES else batch_of(), hyper)
    for path, change in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: a != b, new.params, state.params)
    ):
        assert change.any(), path


@pytest.mark.parametrize("loss", ["focal", "dpo"])
def test_a_target_of_weight_zero_changes_nothing(loss):
    step, state, hyper = begin(config_of(loss=loss))
    batch = pairs_of() if loss in PAIR_LOSSES else batch_of()
    other = dict(batch, targets=np.where(batch["weights"] == 0, (batch["targets"] + 1) % VOCAB, batch["targets"]))
    one, two = step(state, batch, hyper), step(state, other, hyper)
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize(
    ("loss", "parts"), often([("cross_entropy", 2), ("cross_entropy", 4), ("dpo", 2)], [("cross_entropy", 4)])
)
def test_accumulated_gradients_equal_those_of_the_whole_batch(loss, parts):
    """Rows have different numbers of counted tokens, so a mean of means would differ."""
    whole = config_of("warmup=0", loss)
    split = dataclasses.replace(whole, optimizer=dataclasses.replace(whole.optimizer, accumulation_steps=parts))
    step, state, hyper = begin(whole)
    step_in_parts, _, _ = begin(split)
    batch = pairs_of() if loss in PAIR_LOSSES else batch_of()
    (one, metrics), (two, metrics_in_parts) = step(state, batch, hyper), step_in_parts(state, batch, hyper)
    shared = metrics.keys() & metrics_in_parts.keys()
    assert shared >= {"loss", "cross_entropy", "grad_norm", "tokens"} | ({"reward_margin"} if loss == "dpo" else set())
    for name in shared:
        assert float(metrics[name]) == pytest.approx(float(metrics_in_parts[name]), rel=1e-5), name
    # Adam's first moment after one step is proportional to the gradient
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), one.opt_state[1].mu, two.opt_state[1].mu)


def test_gradient_noise_scale_recovers_the_variance_of_known_gradients():
    """Gradients of single sequences are drawn around G; the estimates must be |G|^2 and tr(Sigma) on average."""
    rng = np.random.default_rng(0)
    G, sigma, rows, parts = np.array([3.0, -1.0, 2.0]), np.array([1.0, 2.0, 0.5]), 8, 4
    found = []
    for _ in range(20_000):
        per_row = G + sigma * rng.standard_normal((rows, 3))
        small = np.mean(np.sum(per_row.reshape(parts, rows // parts, 3).mean(axis=1) ** 2, axis=1))
        big = np.sum(per_row.mean(axis=0) ** 2)
        estimate = noise_scale(small, big, parts, rows)
        found.append((estimate["gradient_signal"], estimate["gradient_noise"]))
    signal, noise = np.mean(found, axis=0)
    assert signal == pytest.approx(np.sum(G**2), rel=0.02)
    assert noise == pytest.approx(np.sum(sigma**2), rel=0.03)


def test_accumulation_reports_the_noise_of_its_micro_batches():
    config = config_of()
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, accumulation_steps=2))
    step, state, hyper = begin(config)
    same = batch_of(rows=1)
    repeated = {name: np.repeat(x, ROWS, axis=0) for name, x in same.items()}
    _, metrics = step(state, repeated, hyper)
    assert abs(float(metrics["gradient_noise"])) < 1e-4 * float(metrics["gradient_signal"])
    _, metrics = step(state, batch_of(), hyper)
    assert float(metrics["gradient_noise"]) > 0


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e38])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(poison):
    step, state, hyper = begin(config_of())
    state, _ = step(state, batch_of(), hyper)
    bad = dict(batch_of(), weights=np.where(batch_of()["weights"] > 0, np.float32(poison), np.float32(0)))
    after, metrics = step(state, bad, hyper)
    assert (int(after.step), int(after.skips), int(after.total_skips)) == (2, 1, 1)
    assert not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["grad_norm"])
    for name in ("params", "opt_state", "ema_params"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
    recovered, _ = step(after, batch_of(1), hyper)
    assert (int(recovered.skips), int(recovered.total_skips)) == (0, 1)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(recovered))


def test_averaged_weights_are_the_weighted_mean_of_all_weights_so_far():
    step, state, hyper = begin(config_of("warmup=0,ema=0.5"))
    expected = np.asarray(state.params["embed"]["embedding"])
    for t in range(4):
        state, _ = step(state, batch_of(t), hyper)
        decay = min(0.5, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["embed"]["embedding"])
    np.testing.assert_allclose(state.ema_params["embed"]["embedding"], expected, atol=1e-6)


def test_no_averaging_leaves_the_averaged_weights_equal_to_the_raw_ones():
    step, state, hyper = begin(config_of("ema=0"))
    state, _ = step(state, batch_of(), hyper)
    jax.tree.map(np.testing.assert_array_equal, state.params, state.ema_params)


def test_validation_is_plain_cross_entropy_whatever_the_training_loss():
    config = config_of("label_smoothing=0.3")
    step, state, hyper = begin(config)
    _, metrics = step(state, batch_of(), hyper)
    nats_B, count_B = eval_of(Program.of(config))(state.params, batch_of())
    np.testing.assert_array_equal(count_B, batch_of()["weights"].sum(axis=-1))
    assert float(nats_B.sum() / count_B.sum()) == pytest.approx(float(metrics["cross_entropy"]), rel=1e-6)
    assert float(metrics["loss"]) != pytest.approx(float(metrics["cross_entropy"]), rel=1e-6)


def test_metrics_of_pairs_equal_numbers_computed_by_hand():
    """All logits are equal at first, but for the init's 0.02: a completion of n tokens has log-probability -n log V."""
    step, state, hyper = begin(config_of(loss="dpo"))
    state = state.replace(params=jax.tree.map(jnp.zeros_like, state.params))
    batch = pairs_of()
    _, metrics = step(state, batch, hyper)
    lengths = batch["weights"].sum(axis=-1)
    log_ratio = -lengths * np.log(VOCAB) - batch["reference"]
    margin = log_ratio[:, 0] - log_ratio[:, 1]
    expected = {
        "loss": np.mean(np.log1p(np.exp(-0.1 * margin))),
        "reward_margin": 0.1 * margin.mean(),
        "reward_accuracy": (margin > 0).mean(),
        "cross_entropy": np.log(VOCAB),
        "tokens": lengths.sum(),
    }
    assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected, rel=1e-5)


def test_positions_of_a_batch_reach_the_model():
    """Two documents in a row of a batch are as if each had a row of its own."""
    program, params = Program.of(config_of()), params_of(tiny())["params"]
    apart = batch_of(rows=2)
    apart = {name: x.copy() for name, x in apart.items()}
    apart["weights"][0, 3:] = apart["weights"][1, 5:] = 0
    packed = {name: np.concatenate([x[0, :3], x[1, :5]])[None] for name, x in apart.items()}
    packed["positions"] = np.array([[0, 1, 2, 0, 1, 2, 3, 4]], np.int32)
    packed["segments"] = np.array([[0, 0, 0, 1, 1, 1, 1, 1]], np.int32)
    found = [[x.sum() for x in eval_of(program)(params, batch)] for batch in (apart, packed)]
    np.testing.assert_allclose(*found, rtol=1e-5)


def lines_in_loops(hlo):
    """Returns the instructions of a compiled program that run once an iteration of a loop."""
    bodies, current, lines = set(re.findall(r"body=%?([\w.\-]+)", hlo)), None, []
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", line):
            current = header[1]
        if current in bodies:
            lines.append(line)
    assert lines
    return lines


def floats(metrics):
    return {name: float(x) for name, x in metrics.items()}


def chunked(monkeypatch):
    """Makes every program that is traced from now on take logits in chunks of 2 tokens a row or so."""
    monkeypatch.setattr(losses, "WHOLE_LOGITS", 0)
    monkeypatch.setattr(losses, "PIECE_LOGITS", 2 * ROWS * VOCAB)


def test_logits_in_chunks_change_no_step_and_no_evaluation(monkeypatch):
    config = config_of(loss="dpo")
    program, batch = Program.of(config), pairs_of()
    step, state, hyper = begin(config)
    (one, metrics), nats = step(state, batch, hyper), eval_of(program)(state.params, batch)[0]
    chunked(monkeypatch)
    two, metrics_in_chunks = traced(train_step, program)(state, batch, hyper)
    assert floats(metrics_in_chunks) == pytest.approx(floats(metrics), rel=1e-5)
    nats_in_chunks = traced(eval_step, program)(state.params, batch)[0]
    np.testing.assert_allclose(nats_in_chunks, nats, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), one.opt_state[1].mu, two.opt_state[1].mu)


@pytest.mark.exhaustive
def test_logits_in_chunks_are_the_same_on_eight_devices(monkeypatch):
    sizes = {"vocab_size": 40, "model_dim": 32, "num_heads": 8, "mlp_dim": 48, "num_layers": 1}
    config = config_of("warmup=0,label_smoothing=0.1,z_loss=1e-3", **sizes, tie_embeddings=False)
    layout = dataclasses.replace(config.sharding, data=2, fsdp=2, tensor=2)
    config = dataclasses.replace(config, sharding=layout)
    program, hyper, batch = Program.of(config), hyperparameters(config), batch_of(rows=8)
    chunked(monkeypatch)
    one, metrics = traced(train_step, program)(init_of(program)(hyper), batch, hyper)
    plan = sharding.plan(1, 8, config.sharding)
    with plan.context():
        state = compilation.compile_init(program, plan)(hyper)
        step = compilation.compile_train_step.__wrapped__(program, plan, (8, LENGTH))
        placed = {name: jax.device_put(x, plan.batch_sharding()) for name, x in batch.items()}
        two, metrics_of_eight = step(state, placed, hyper, {})
    assert floats(metrics_of_eight) == pytest.approx(floats(metrics), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), one.opt_state[1].mu, two.opt_state[1].mu)
    # The kernel [D, V / tensor] and its gradient go over the wire once, not once a chunk.
    collective = re.compile(r"f32\[(1,)?32,20\].* (all-reduce|all-gather|reduce-scatter)\(")
    assert collective.search(step.as_text()) and not any(map(collective.search, lines_in_loops(step.as_text())))


RECIPES = ["", "lr=1e-4", "warmup=9", "weight_decay=0.3", "adam_betas=0.8:0.99", "grad_clip=0.1", "label_smoothing=0.1",
           "ema=0.9", "schedule=wsd", "steps=77"]  # fmt: skip


def test_no_number_of_the_recipe_recompiles_the_step():
    plan = sharding.plan(1, 1, load("configs/tiny.py").sharding)
    before = None
    for recipe in RECIPES:
        config = dataclasses.replace(config_of(recipe), seed=len(recipe))
        step = compilation.compile_train_step(Program.of(config), plan, (ROWS, LENGTH))
        state = compilation.compile_init(Program.of(config), plan)(hyperparameters(config))
        step(state, batch_of(), hyperparameters(config), {})
        if before is None:
            before = compilation.counts()["compiles"]
    assert compilation.counts()["compiles"] == before


@pytest.mark.parametrize(("loss", "number"), [("focal", "focal_gamma"), ("dpo", "dpo_beta"), ("ipo", "dpo_beta")])
def test_no_number_of_a_loss_recompiles_the_step(loss, number):
    found = set()
    for value in (0.5, 1.5):
        config = config_of(loss=loss)
        config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, **{number: value}))
        step, state, hyper = begin(config)
        _, metrics = step(state, pairs_of() if loss in PAIR_LOSSES else batch_of(), hyper)
        found.add(float(metrics["loss"]))
    assert len(found) == 2 and step._cache_size() == 1


def test_dropout_rates_share_a_program_but_no_dropout_is_another():
    programs = {rate: Program.of(config_of(f"dropout={rate}", dropout=rate)) for rate in (0.0, 0.1, 0.2)}
    assert programs[0.1] == programs[0.2] != programs[0.0]


def test_seeds_give_different_weights_and_the_same_seed_the_same():
    config = config_of()
    init = init_of(Program.of(config))
    one, again, two = (init(hyperparameters(dataclasses.replace(config, seed=seed))).params for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert (one["embed"]["embedding"] != two["embed"]["embedding"]).all()


@pytest.mark.exhaustive
def test_scanned_layers_start_from_the_same_weights_and_compute_the_same_step():
    """Switching scan_layers is a choice of compilation, not of experiment."""
    (step, state, hyper), (scan_step, scan_state, _) = begin(config_of()), begin(config_of(scan_layers=True))
    unscanned = functools.partial(restack, source=tiny(scan_layers=True), target=tiny())
    jax.tree.map(np.testing.assert_array_equal, unscanned(scan_state.params), state.params)
    after, scan_after = step(state, batch_of(), hyper)[0], scan_step(scan_state, batch_of(), hyper)[0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7),
        unscanned(scan_after.opt_state[1].mu),
        after.opt_state[1].mu,
    )
