"""The learning-rate finder: its scan takes the training steps, its rule finds what was planted, and it says no."""

import json
import subprocess
import sys

import numpy as np
import pytest

from foundry_jax import compilation, train
from foundry_jax.config import load
from foundry_jax.errors import UserError
from foundry_jax.optimizer import hyperparameters
from foundry_jax.runfolder import read_metrics
from foundry_jax.search import charts, lr_finder
from tests.conftest import ROOT
from tests.processes import SMALL_TEXT, SMOKE

STEPS = 60
SMALL = (*SMALL_TEXT, "eval.batch_size=8", "sharding.strategy=none")


@pytest.fixture(scope="module")
def finder():
    return lr_finder.Finder(load(str(SMOKE), SMALL), STEPS)


def test_its_steps_are_the_steps_of_a_run(finder, tmp_path):
    settings = load(str(SMOKE), [*SMALL, "num_steps=12", "optimizer.warmup_steps=4"])
    train.run(settings, tmp_path, quiet=True)
    ran = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl", "train")]
    rates = np.array([row["learning_rate"] for row in read_metrics(tmp_path / "metrics.jsonl", "train")])
    losses, smoothed = finder.run(rates)
    np.testing.assert_allclose(losses, ran, rtol=2e-5)  # another program sums in another order
    weights = 0.9 ** np.arange(11, -1, -1)
    assert smoothed[-1] == pytest.approx(weights @ losses / weights.sum(), rel=1e-5)


def test_it_compiles_one_program_for_range_and_bracket(finder):
    finder.run(np.full(5, 1e-3))  # what draws the state is compiled by now
    before = compilation.counts()["compiles"]
    lr_finder.range_test(finder, 1e-5, 1.0)
    lr_finder.bracket(finder, 3e-3)
    assert compilation.counts()["compiles"] - before <= 1, "that of the bracket's rates"


def test_it_ends_where_the_loss_is_lost(finder):
    losses, smoothed = finder.run([1e-3] * 20 + [3e2] * 20, limit=1.5)
    assert 20 < len(losses) < 40
    assert smoothed[-1] > 1.5 * smoothed.min() >= smoothed[-2] or not np.isfinite(losses[-1])
    stopped, _ = finder.run([1e-3] * 5 + [0.0] * 5)
    assert len(stopped) == 5, "a rate of 0 is no step"


def test_a_loss_that_is_not_finite_is_the_last_and_is_said(monkeypatch):
    class Exploding:
        num_steps = 40

        def run(self, rates, limit):
            return np.append(np.linspace(5, 3, 29), np.nan), np.append(np.linspace(5, 3, 29), np.nan)

    test = lr_finder.range_test(Exploding(), 1e-4, 1.0)
    assert "not finite at a rate of 0.094: that step changed nothing" in test.ended
    assert lr_finder.suggest(test).rate == pytest.approx(np.geomspace(1e-4, 1, 40)[19], rel=0.2)


def planted(best: float, noise: float = 0.05) -> lr_finder.RangeTest:
    """Returns losses that fall from 6 to 2 around a rate, and rise after 100 times that."""
    rates = np.geomspace(1e-6, 1, 200)
    curve = 2 + 4 / (1 + (rates / best) ** 2) + 0.1 * np.maximum(np.log(rates / (100 * best)), 0)
    noisy = curve + noise * np.random.default_rng(0).standard_normal(200)
    weights = 0.9 ** np.arange(200)
    smoothed = np.convolve(noisy, weights)[:200] / np.cumsum(weights)
    return lr_finder.RangeTest(rates, noisy, smoothed, "all 200 steps were taken")


@pytest.mark.parametrize("best", [1e-4, 1e-3, 1e-2])
def test_the_suggestion_moves_with_the_fall(best):
    found = lr_finder.suggest(planted(best))
    assert found.rule == "two thirds of the fall"
    assert best < found.rate < 5 * best, "at two thirds, and what smoothing adds"


def test_a_plateau_does_not_carry_the_suggestion_away():
    """The minimum may lie anywhere on a plateau; the rule that asks where it lies is lost, ours is not."""
    test = planted(1e-4)
    moved = test.smoothed.copy()
    moved[-20] -= 0.6
    test = lr_finder.RangeTest(test.rates, test.losses, moved, test.ended)
    assert lr_finder.suggest(test, "a tenth of the minimum").rate > 1e-2
    assert lr_finder.suggest(test).rate < 1e-3


def test_mistakes_are_one_line(finder):
    with pytest.raises(UserError, match="Unknown rule 'steepest'"):
        lr_finder.suggest(planted(1e-3), "steepest")
    with pytest.raises(UserError, match="fell by .* nats, and its noise is .* Use a larger --max"):
        lr_finder.suggest(planted(1e3))
    with pytest.raises(UserError, match="--steps=19 is too few for a range test; use 20 or more"):
        lr_finder.Finder(load(str(SMOKE)), 19)
    with pytest.raises(UserError, match="--min=1 and --max=0.1 must be positive, and --min the smaller one"):
        lr_finder.find(load(str(SMOKE)), low=1.0, high=0.1, num_steps=20, check=False)
    with pytest.raises(UserError, match="diverged after [0-9]+ steps from a rate of 500; use a smaller --min"):
        lr_finder.range_test(finder, 500.0, 1000.0)


def test_pairs_of_completions_get_their_reference(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"a{i}", "chosen": "bb" * (1 + i % 3), "rejected": "cd" * (1 + i % 2)} for i in range(30)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = load(f"{SMOKE}:dpo", [*SMALL, f"data.preferences={pairs}", "data.batch_size=4", "model.num_layers=1"])
    losses, _ = lr_finder.Finder(settings, 20).run(np.full(20, 1e-3))
    assert losses[0] == pytest.approx(np.log(2), rel=1e-5), "at the start the model is its own reference"
    assert losses[-1] < 0.6


@pytest.mark.exhaustive
@pytest.mark.parametrize("mutations", ["lora_rank=2", "ema=0.9"])
def test_it_starts_from_the_model_that_the_config_names(mutations, tmp_path):
    result = train.run(load(str(SMOKE), [*SMALL, "num_steps=20"]), tmp_path, quiet=True)
    found = lr_finder.Finder(load(f"{SMOKE}:{mutations}", [*SMALL, f"init.source={tmp_path}"]), 40)
    losses, _ = found.run(np.full(40, 1e-6))
    assert losses.mean() == pytest.approx(result["validation"]["loss"], abs=0.3), "not at log(257) = 5.5"
    faster, _ = found.run(np.full(40, 3e-2))
    assert faster[-10:].mean() < losses[-10:].mean(), "adapters on so small a model learn little"


def test_the_schedule_is_the_configs_own_with_another_peak(finder):
    rates = finder.schedule(0.01, 40)
    own = hyperparameters(finder.config)
    assert rates.max() == pytest.approx(0.01, rel=1e-3) and len(rates) == 40
    assert rates[-1] == pytest.approx(0.01 * own.min_learning_rate / own.learning_rate, rel=1e-3)


@pytest.mark.slow
def test_the_command_writes_json_and_a_picture_and_checks_itself(tmp_path):
    command = [sys.executable, "-m", "foundry_jax.cli.lr_finder", f"--config={SMOKE}", f"--out={tmp_path}", "--json"]
    overrides = [f"--config.{text}" for text in SMALL]
    done = subprocess.run([*command, "--check", *overrides], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert json.loads((tmp_path / "lr_finder.json").read_text())["suggestion"] == found["suggestion"]
    assert (tmp_path / "lr_finder.png").read_bytes().startswith(b"\x89PNG")
    assert found["suggestion"]["rule"] == "two thirds of the fall"
    assert 1 / 4 <= found["check"]["factor"] <= 4, "within two octaves of the best of the bracket"
    assert found["check"]["behind"] == found["check"]["losses"][f"{found['suggestion']['learning_rate']:.6g}"] - min(
        found["check"]["losses"].values()
    )


def test_the_picture_shows_losses_suggestion_and_bracket():
    found = lr_finder.to_json(planted(1e-3), lr_finder.Suggestion(3e-3, "a rule"), load(str(SMOKE)), None)
    check = lr_finder.Bracket(100, {1e-3: 3.0, 3e-3: 2.5, 1e-2: float("inf")})
    found |= {
        "check": lr_finder.to_json(planted(1e-3), lr_finder.Suggestion(3e-3, ""), load(str(SMOKE)), check)["check"]
    }
    assert (found["check"]["best"], found["check"]["behind"]) == (3e-3, 0.0)
    (axes,) = charts.range_test(found).figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "suggestion 0.003: a rule" in labels and "bracket: last fifth of 100 steps" in labels
