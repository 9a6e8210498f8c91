"""Two processes of two devices train as one process of four does."""

import json
import os
import socket
import subprocess
import sys

import pytest

from foundry_jax.metrics import read_metrics
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

SCRIPT = """
import sys, jax
rank, count, devices, port, folder, strategy = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices))
if int(count) > 1:
    jax.distributed.initialize(f"localhost:{port}", int(count), int(rank))
from foundry_jax import command, compilation, config, train
compilation.enable_cache()
overrides = [f"sharding.strategy={strategy}", "num_steps=12", "checkpoint.every=6", "eval.every=6"]
command.run(lambda: train.run(config.load("configs/smoke.py", overrides), folder))
"""


def start(rank, count, devices, port, folder, strategy):
    arguments = [sys.executable, "-c", SCRIPT, *map(str, (rank, count, devices, port, folder, strategy))]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.exhaustive)])
def test_two_processes_equal_one(tmp_path, strategy):
    alone = start(0, 1, 4, 0, tmp_path / "alone", strategy)
    assert alone.wait(120) == 0, alone.stdout.read()
    port = free_port()
    pair = [start(rank, 2, 2, port, tmp_path / "pair", strategy) for rank in range(2)]
    for process in pair:
        assert process.wait(120) == 0, process.stdout.read()
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("alone", "pair"))
    assert [(row["step"], row["kind"]) for row in one] == [(row["step"], row["kind"]) for row in two]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert json.loads((tmp_path / "pair" / "result.json").read_text())["num_processes"] == 2
