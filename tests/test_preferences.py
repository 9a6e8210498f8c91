"""Training on pairs of completions: against a reference, measured on pairs that are held out."""

import dataclasses
import functools
import logging
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from foundry_jax import rewards, sharding, train
from foundry_jax.config import load
from foundry_jax.data import pair_files
from foundry_jax.data.preferences import Pairs
from foundry_jax.data.tokenize import ByteTokenizer
from foundry_jax.errors import Preempted
from foundry_jax.optimizer import hyperparameters
from foundry_jax.preemption import Preemption
from foundry_jax.runfolder import read_metrics
from foundry_jax.train_step import Program, init_state, reference_step, train_step, unbox
from tests import test_distributed
from tests.conftest import ROOT
from tests.processes import SMALL_TEXT, assert_bitwise_equal
from tests.variants import forward, params_of, tiny

END = ByteTokenizer.separator_id


@pytest.fixture(scope="session")
def harmless(shared_data):
    """The path of 1200 real pairs."""
    return shared_data / "preferences" / "harmless.jsonl"


def ids(text):
    return list(text.encode())


def pairs_of(*rows, context_length=48):
    """Returns the pairs of some (prompt, chosen, rejected)."""
    sequences = [np.array([*ids(prompt + side), END]) for prompt, *sides in rows for side in sides]
    return Pairs.of(sequences, [len(prompt) for prompt, *_ in rows for _ in range(2)], context_length)


# The model of the tests below: byte tokens, weights far from zero.
MODEL = tiny(vocab_size=257, context_length=48)
PAIRS = (("Hi. ", "Hello!", "Go away."), ("Who are you? ", "I am a model.", "No one"), ("2+2=", "4", "I will not say"))


def dpo(loss="dpo", **optimizer):
    """Returns (program, hyperparameters) of preference training."""
    config = load("configs/tiny.py:warmup=0,lr=1e-3", [f"loss.name={loss}", "data.preferences=x"])
    optimizer = dataclasses.replace(config.optimizer, **optimizer)
    config = dataclasses.replace(config, model=MODEL, optimizer=optimizer)
    return Program.of(config), hyperparameters(config)


@functools.cache
def jitted(function, program):
    without = {"base": {}} if function is train_step else {"hyper": None, "base": {}}  # no adapters
    return jax.jit(functools.partial(function, program, **without))


def state_of(program, hyper):
    """Returns the state at step 0, but with parameters far from zero."""
    state = jax.jit(lambda hyper: unbox(init_state(program, hyper)))(hyper)
    return state.replace(params=params_of(MODEL)["params"])


def with_reference(program, params, batch):
    return batch | {"reference": np.asarray(jitted(reference_step, program)(params, batch))}


def test_log_probabilities_are_sums_over_the_completion_and_its_end():
    """Of each sequence alone, without padding, by a plain log-softmax."""
    program, _ = dpo()
    pairs = pairs_of(*PAIRS)
    found = jitted(reference_step, program)(params_of(MODEL)["params"], pairs.batch(np.arange(3)))
    for (prompt, *completions), row in zip(PAIRS, np.asarray(found), strict=True):
        for completion, log_prob in zip(completions, row, strict=True):
            tokens = np.array([*ids(prompt + completion), END, *[0] * (48 - len(prompt + completion) - 1)])
            logits = forward(MODEL)(params_of(MODEL), tokens[None])[0]
            log_probs = jax.nn.log_softmax(logits)[np.arange(47), tokens[1:]]
            first, last = len(prompt) - 1, len(prompt + completion)
            assert log_prob == pytest.approx(float(log_probs[first:last].sum()), rel=1e-5)


def test_padding_changes_nothing():
    program, _ = dpo()
    params = params_of(MODEL)["params"]
    short, long = (pairs_of(*PAIRS, context_length=length).batch(np.arange(3)) for length in (32, 48))
    other = dict(long, inputs=np.where(long["positions"] < 0, 7, long["inputs"]))
    found = [jitted(reference_step, program)(params, batch) for batch in (short, long, other)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    np.testing.assert_array_equal(found[1], found[2])


@pytest.mark.parametrize(("loss", "parts", "expected"), [("dpo", 2, np.log(2)), ("ipo", 1, 25.0)])
def test_at_step_0_nothing_is_preferred(harmless, loss, parts, expected):
    """Exactly: the compiled step and the compiled reference find the same bits for the same rows."""
    program, hyper = dpo(loss, accumulation_steps=parts)
    found = pair_files.read(str(harmless), ByteTokenizer(), format="own", fraction=0.05, context_length=48)
    pairs = found.train[0]
    state = state_of(program, hyper)
    size = 8 // parts
    reference = [
        jitted(reference_step, program)(state.params, pairs.batch(np.arange(i, i + size))) for i in range(0, 8, size)
    ]
    batch = pairs.batch(np.arange(8)) | {"reference": np.concatenate(reference)}
    _, metrics = jitted(train_step, program)(state, batch, hyper)
    assert float(metrics["loss"]) == pytest.approx(expected, abs=1e-7 * expected)
    assert float(metrics["reward_margin"]) == 0 and float(metrics["reward_accuracy"]) == 0
    assert float(metrics["tokens"]) == batch["weights"].sum()


def test_training_prefers_what_was_chosen():
    program, hyper = dpo()
    state = state_of(program, hyper)
    batch = pairs_of(*PAIRS).batch(np.array([0, 1, 2, 2]))
    batch, rows = with_reference(program, state.params, batch), []
    for _ in range(15):
        state, metrics = jitted(train_step, program)(state, batch, hyper)
        rows.append(metrics)
    assert float(rows[0]["loss"]) == pytest.approx(np.log(2), abs=1e-6)
    assert float(rows[-1]["loss"]) < 0.3
    assert float(rows[-1]["reward_accuracy"]) == 1 and float(rows[-1]["reward_margin"]) > 1


def test_what_is_said_of_a_target_adds_up_to_what_is_said_of_the_completion():
    program, _ = dpo()
    params, batch = params_of(MODEL)["params"], pairs_of(*PAIRS).batch(np.arange(3))
    answers = jitted(rewards.answers_step, program)(params, batch)
    np.testing.assert_array_equal(answers.completions, jitted(reference_step, program)(params, batch))
    np.testing.assert_allclose(np.sum(answers.targets * batch["weights"], -1), answers.completions, rtol=1e-5)
    logits = forward(MODEL)(params_of(MODEL), batch["inputs"][0, 1][None])
    log_probs = jax.nn.log_softmax(logits)[0, np.arange(20), batch["targets"][0, 1, :20]]
    length = batch["weights"][0, 1].nonzero()[0][-1] + 1
    np.testing.assert_allclose(answers.targets[0, 1, :length], log_probs[:length], rtol=1e-4)


def figures(change, loss="dpo", **scales):
    """Returns the figures of PAIRS, of whose tokens the log-probabilities have changed by this much."""
    pairs = pairs_of(*PAIRS)
    _, hyper = dpo(loss)
    scales = hyper.loss.replace(**{name: np.float32(x) for name, x in scales.items()})
    reference = np.linspace(-3, -1, pairs.completion_lengths.sum(), dtype=np.float32)
    return rewards.figures(pairs, reference + np.float32(change), reference, loss, scales)


def test_figures_where_nothing_has_changed():
    found = figures(0.0)
    assert found.pop("preference_loss") == np.log(np.float32(2))
    low, high = found.pop("reward_accuracy_low"), found.pop("reward_accuracy_high")
    assert low == 0 and 0.5 < high < 0.6, "nothing is preferred, and three pairs say little"
    assert set(found.values()) == {0.0} and len(found) == 5


def test_figures_by_hand():
    """Each token of the completions has become likelier by 0.5 nats."""
    lengths = np.array([[7, 9], [14, 7], [2, 15]])
    np.testing.assert_array_equal(pairs_of(*PAIRS).completion_lengths, lengths)
    found, margin = figures(0.5, dpo_beta=0.2), 0.5 * (lengths[:, 0] - lengths[:, 1])
    assert found["reward_accuracy"] == pytest.approx(1 / 3)
    assert found["reward_margin"] == pytest.approx(0.2 * margin.mean())
    assert found["chosen_log_ratio"] == pytest.approx(0.5 * lengths[:, 0].mean())
    assert found["rejected_log_ratio"] == pytest.approx(0.5 * lengths[:, 1].mean())
    assert found["kl"] == pytest.approx(math.exp(-0.5) - 1 + 0.5)
    assert found["preference_loss"] == pytest.approx(np.log1p(np.exp(-0.2 * margin)).mean())
    assert figures(0.5, "ipo", dpo_beta=0.2)["preference_loss"] == pytest.approx(2.5**2), "per token all gain the same"
    line = "loss 0.9141, reward accuracy 0.333 (0.06 to 0.79), margin -0.2667, KL 0.1065 nats a token"
    assert rewards.line(found) == line


def test_the_divergence_is_that_of_the_distributions_where_tokens_are_drawn_from_the_model():
    rng = np.random.default_rng(0)
    model, reference = rng.dirichlet(np.ones(20), 2)
    drawn = rng.choice(20, 200_000, p=model)
    rows = [("p", "c" * 99_999, "r" * 99_999)]
    pairs = pairs_of(*rows, context_length=100_100)
    log_probs = [np.log(p[drawn]).astype(np.float32) for p in (model, reference)]
    _, hyper = dpo()
    found = rewards.figures(pairs, *log_probs, "dpo", hyper.loss)
    assert found["kl"] == pytest.approx(np.sum(model * np.log(model / reference)), rel=0.02)


def test_the_interval_of_a_share_is_wilsons():
    """The example of 8 in 10, and shares of 0 and 1, whose interval is not a point."""
    assert rewards.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert rewards.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert rewards.wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)


PLAN = sharding.Plan("none", 1, 1, 1, "")


def file_of(**changes):
    """Returns where the reference of some pairs is kept, with what is given changed."""
    given = {
        "cache_dir": "cache", "program": dpo()[0], "plan": PLAN, "batch_shape": (2, 2, 48), "start": [0],
        "train": [pairs_of(*PAIRS)], "held_out": pairs_of(PAIRS[0]),
    } | changes  # fmt: skip
    options = {name: given.pop(name) for name in ("start", "train", "held_out")}
    return rewards.ReferenceFile.of(*given.values(), **options)


def test_a_reference_is_shared_by_runs_that_find_the_same_bits():
    same, key = {"program": dpo("ipo", accumulation_steps=2)[0], "cache_dir": "other"}, file_of().key
    assert all(file_of(**{name: value}).key == key for name, value in same.items())
    program = dpo()[0]
    others = {
        "program": dataclasses.replace(program, model=dataclasses.replace(MODEL, dtype="bfloat16")),
        "plan": sharding.Plan("ddp", 2, 1, 1, ""),
        "batch_shape": (4, 2, 48),
        "start": [1],
        "train": [pairs_of(*PAIRS[1:])],
        "held_out": pairs_of(PAIRS[1]),
    }
    keys = {file_of(**{name: value}).key for name, value in others.items()}
    keys |= {file_of(program=dataclasses.replace(program, lora_rank=2)).key}
    assert len(keys | {key}) == len(others) + 2
    assert file_of().shapes == ((3, 2), (16,)) and file_of().path.parts[:2] == ("cache", "references")


@pytest.fixture
def run_dpo(harmless, tmp_path):
    """Returns a function that trains configs/smoke.py on real pairs in this process, on all its devices."""

    def run_dpo(name, argument="", *overrides):
        given = [*SMALL_TEXT, "loss.name=dpo", f"data.preferences={harmless}", "num_steps=12", "eval.every=6"]
        given += ["model.num_layers=1", "data.batch_size=16", f"data.cache_dir={tmp_path / 'cache'}", *overrides]
        return train.run(load(f"configs/smoke.py{argument}", given), tmp_path / name, quiet=True)

    return run_dpo


@pytest.mark.exhaustive
def test_a_run_on_pairs_is_measured_on_text_and_on_pairs_and_goes_on_where_it_was_stopped(
    run_dpo, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    result = run_dpo("whole")
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl", "train")
    assert (rows[0]["loss"], rows[0]["reward_accuracy"]) == (np.log(np.float32(2)), 0)
    assert result["validation"]["bits_per_byte"] == pytest.approx(8, abs=0.3)  # of text, by a model that knows nothing
    assert result["tokens"] == 12 * 16 * 2 * 32
    evals = read_metrics(tmp_path / "whole" / "metrics.jsonl", "eval")
    assert [row["step"] for row in evals] == [6, 12]
    assert 0.5 < evals[1]["preference_loss"] < evals[0]["preference_loss"] < np.log(2)
    assert evals[1]["reward_accuracy_low"] < evals[1]["reward_accuracy"]
    assert 0 < evals[0]["kl"] < evals[1]["kl"] < 1
    assert result["validation"]["preference_loss"] == evals[1]["preference_loss"]
    references = tmp_path / "cache" / "references"

    def stop_at(wanted):
        with monkeypatch.context() as patch:
            patch.setattr(Preemption, "requested", lambda self, step: step == wanted)
            with pytest.raises(Preempted, match=f"step {wanted} of 12 is saved" if wanted else "has no reference yet"):
                run_dpo("stopped")

    (kept,) = references.iterdir()
    kept.unlink()
    stop_at(0)  # while the reference is computed
    stop_at(7)
    assert caplog.text.count("Computing the reference log-probabilities of 1,200 pairs") == 3
    stop_at(9)
    assert caplog.text.count("Computing the reference") == 3  # it was kept
    kept.write_bytes(kept.read_bytes()[:-100])
    run_dpo("stopped")
    assert caplog.text.count("Computing the reference") == 4 and "is damaged" in caplog.text
    assert_bitwise_equal(tmp_path / "whole", tmp_path / "stopped")
    run_dpo("other", "", "loss.name=ipo", "optimizer.learning_rate=1e-2")
    assert caplog.text.count("Computing the reference") == 4, "it starts from the same parameters"
    run_dpo("seed", "", "seed=1")
    assert caplog.text.count("Computing the reference") == 5


@pytest.mark.exhaustive
@pytest.mark.slow
def test_two_processes_measure_what_one_does_and_share_the_reference(harmless, tmp_path):
    overrides = [*SMALL_TEXT, "loss.name=dpo", f"data.preferences={harmless}", "num_steps=6", "eval.every=3"]
    overrides += ["eval.batch_size=4", f"data.cache_dir={tmp_path / 'cache'}"]

    def run(name, count, devices):
        port = test_distributed.free_port()
        arguments = [sys.executable, "-c", test_distributed.SCRIPT]
        others = [str(x) for x in (count, devices, port, tmp_path / name, *overrides)]
        started = [
            subprocess.Popen(
                [*arguments, str(rank), *others], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for rank in range(count)
        ]
        said = [process.communicate(timeout=300)[0] for process in started]
        assert not any(process.returncode for process in started), said
        return read_metrics(tmp_path / name / "metrics.jsonl"), "".join(said).count("Computing the reference")

    alone, computed = run("alone", 1, 4)
    assert computed == 1
    (kept,) = (tmp_path / "cache" / "references").iterdir()
    kept.unlink()  # its devices are the same, as far as the key goes
    for name, expected in (("pair", 2), ("again", 0)):
        found, computed = run(name, 2, 2)
        assert computed == expected, "both processes compute it, or both get the one that is kept"
        for a, b in zip(alone, found, strict=True):
            names = a.keys() & {"loss", "preference_loss", "reward_margin", "kl"}
            assert [a[x] for x in names] == pytest.approx([b[x] for x in names], rel=1e-3, abs=1e-6)
