"""The plan command: what it prints, and that it plans for devices that are not there."""

import json
import logging
import subprocess
import sys

import pytest

from foundry_jax import forecast, train
from foundry_jax.config import load
from tests.conftest import ROOT


def plan(*arguments):
    command = [sys.executable, "-m", "foundry_jax.cli.plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_it_plans_for_256_devices_and_lists_every_parameter():
    done = plan("--config=configs/baseline.py", "--devices=256", "--config.sharding.fsdp_min_params=1e6", "--json")
    report = json.loads(done.stdout)
    assert (report["plan"]["strategy"], report["plan"]["fsdp"]) == ("fsdp", 256)
    assert "not fewer than 1e+06" in report["plan"]["reason"]
    sizes = {row["name"]: row for row in report["params"]}
    embedding = sizes["embed/embedding"]
    assert embedding["shape"] == [8192, 384]
    assert embedding["bytes_per_device"] == 8192 * 384 * 4 // 256  # 256 does not divide 384: the vocabulary is cut
    assert report["memory"]["total"] == sum(size for name, size in report["memory"].items() if name != "total")


@pytest.mark.slow
def test_it_says_what_fits_and_shows_the_collectives_of_the_compiled_step():
    done = plan(
        "--config=configs/smoke.py", "--devices=8", "--config.sharding.strategy=fsdp", "--device-memory=0.00001",
        "--compile",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "strategy: fsdp, because sharding.strategy=fsdp was asked for" in done.stdout
    assert "fsdp does not fit; what fits: none; try more devices" in done.stdout
    assert "all-gather" in done.stdout.split("compiled for virtual cpu devices: ")[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--config=configs/smoke.py", "--devices=6", "--config.sharding.tensor=4"], 1, "needs 4 devices, but 6 are"),
        (["--config=configs/smoke.py", "--devices=0"], 1, "--devices=0 must be 1 or more"),
        (["--config=configs/smoke.py", "--deviecs=1"], 1, "unrecognized arguments: --deviecs=1"),
    ],
)
def test_a_mistake_is_one_line(arguments, code, message):
    done = plan(*arguments)
    assert done.returncode == code
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_run_that_will_not_fit_is_warned_about_with_the_strategy_that_would(caplog):
    config = train.with_vocabulary(
        load("configs/baseline.py", ["sharding.strategy=ddp", "model.context_length=1"]), 8192
    )
    decision = forecast.plan_of(config, 8)
    with caplog.at_level(logging.WARNING):
        train.warn_about_memory(config, decision, forecast.memory(config, decision).total)
        assert not caplog.records
        train.warn_about_memory(config, decision, forecast.memory(config, decision).total - 1)
    assert "ddp needs about 0.2 GiB per device" in caplog.text
    assert "try sharding.strategy=fsdp" in caplog.text


def test_how_many_parameters_adapters_train_is_shown():
    done = plan("--config=configs/smoke.py:lora_rank=2", "--config.lora.targets=attention/query", "--json")
    report = json.loads(done.stdout)
    assert report["num_trained_params"] == 2 * 2 * (16 + 16)  # layers, rank, into and out of the map
    assert report["num_trained_params"] < report["num_params"] / 10
    shown = plan("--config=configs/smoke.py:lora_rank=2", "--config.lora.targets=attention/query").stdout
    assert f"{report['num_params']:,} parameters in all, 128 trained" in shown
