"""Runs brought to as much of one thing as the incumbent's."""

import dataclasses
import json

import pytest

from foundry_jax.config import load
from foundry_jax.errors import UserError
from foundry_jax.model import transformer
from foundry_jax.search.matching import Cost, match, report, stretched, with_params
from tests.conftest import ROOT

TINY = str(ROOT / "configs" / "tiny.py")
INCUMBENT = Cost(params=1000, steps=300, tokens_per_step=2048, flops_per_token=6000.0, seconds_per_step=0.2)


def num_params(config):
    """Returns the parameters of a config with a vocabulary of 2048."""
    return transformer.num_params(dataclasses.replace(config.model, vocab_size=2048))


@pytest.mark.parametrize(
    ("by", "changes", "steps"),
    [
        ("steps", {"tokens_per_step": 1024}, 300),
        ("tokens", {"tokens_per_step": 1024}, 600),
        ("tokens", {"flops_per_token": 12000.0}, 300),
        ("flops", {"flops_per_token": 9000.0}, 200),
        ("flops", {"flops_per_token": 9000.0, "tokens_per_step": 1024}, 400),
        ("seconds", {"seconds_per_step": 0.23}, 261),
        ("seconds", {"seconds_per_step": 1000.0}, 1),
    ],
)
def test_the_steps_bring_the_contestant_to_what_the_incumbent_has(by, changes, steps):
    contestant = dataclasses.replace(INCUMBENT, **changes)
    matched = match(INCUMBENT, contestant, load(TINY), by)
    assert matched.num_steps == steps
    ratios = report(INCUMBENT, dataclasses.replace(contestant, steps=steps))
    if steps > 1:
        assert ratios[by] == pytest.approx(1, abs=0.5 / steps)


def test_what_is_counted_in_steps_keeps_its_share():
    config = load(TINY, ["eval.every=100", "checkpoint.every=150", "optimizer.warmup_steps=30"])
    found = stretched(config, 500)
    assert (found.num_steps, found.optimizer.warmup_steps, found.eval.every, found.checkpoint.every) == (
        500,
        50,
        167,
        250,
    )
    short = stretched(config, 1)
    assert (short.optimizer.warmup_steps, short.eval.every, short.checkpoint.every) == (1, 1, 1)
    assert stretched(load(TINY, ["optimizer.warmup_steps=0"]), 500).optimizer.warmup_steps == 0
    assert stretched(config, config.num_steps) == config


@pytest.mark.parametrize("argument", ["mla", "attention=gqa_4kv", "gelu", "moe", "depth=2", "depth=6"])
def test_the_width_of_the_mlp_brings_the_parameters_nearest(argument):
    incumbent, config = load(TINY), load(f"{TINY}:{argument}")
    target = num_params(incumbent)
    found = with_params(config, target, num_params)
    gap = abs(num_params(found) - target)
    for width in (found.model.mlp_dim - 8, found.model.mlp_dim + 8):
        other = dataclasses.replace(config, model=dataclasses.replace(config.model, mlp_dim=width))
        assert gap <= abs(num_params(other) - target)
    assert gap / target < 0.01
    assert found == dataclasses.replace(config, model=found.model)
    assert (found == config) == (argument in ("mla", "gelu"))  # nearest as they are


def test_match_by_params_goes_by_the_width():
    config = load(f"{TINY}:depth=6")
    cost = dataclasses.replace(INCUMBENT, params=num_params(load(TINY)))
    assert match(cost, cost, config, "params", num_params=num_params) == with_params(config, cost.params, num_params)


def test_the_report_has_all_five_ratios():
    contestant = Cost(params=1500, steps=150, tokens_per_step=4096, flops_per_token=7500.0, seconds_per_step=0.5)
    expected = {"steps": 0.5, "tokens": 1.0, "flops": 1.25, "params": 1.5, "seconds": 1.25}
    assert report(INCUMBENT, contestant) == pytest.approx(expected)
    assert report(INCUMBENT, dataclasses.replace(contestant, seconds_per_step=None))["seconds"] is None


def test_a_cost_comes_from_a_forecast_and_goes_through_json():
    forecast = {"params": 1000, "steps": 300, "tokens_per_step": 2048, "flops_per_token": 6000.0, "step_seconds": 0.2,
                "memory_bytes": 5}  # fmt: skip
    assert Cost.of(forecast) == INCUMBENT
    assert Cost(**json.loads(json.dumps(dataclasses.asdict(INCUMBENT)))) == INCUMBENT


@pytest.mark.parametrize(
    ("by", "argument", "overrides", "changes", "message"),
    [
        ("stepz", "", [], {}, "Unknown --match 'stepz'. Did you mean 'steps'"),
        ("tokens", "steps=600", [], {}, "num_steps=600, while the incumbent has 300: matching would undo"),
        ("seconds", "", [], {"seconds_per_step": None}, "--match=seconds needs the seconds of both"),
        ("params", "depth=400", [], {}, r"with model.mlp_dim=8 there still are .* parameters, the incumbent has 1,000"),
        ("params", "", ["init.source=smollm2-135m"], {}, "init.source='smollm2-135m' has the width that it has"),
        ("params", "", ["model.moe=softmax(expert_dim=32)"], {}, "do not depend on it; leave out expert_dim"),
    ],
)  # fmt: skip
def test_what_cannot_be_matched_is_one_line(by, argument, overrides, changes, message):
    config = load(f"{TINY}:{argument}", overrides)
    with pytest.raises(UserError, match=message):
        match(INCUMBENT, dataclasses.replace(INCUMBENT, **changes), config, by, num_params=num_params)
