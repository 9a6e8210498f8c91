"""Two processes of two devices train, and answer tasks, as one process of four does."""

import json
import socket
import subprocess
import sys

import pytest

from foundry_jax.runfolder import read_metrics
from foundry_jax.tasks import results
from tests.conftest import ROOT
from tests.processes import SMALL_TEXT

pytestmark = pytest.mark.slow

# Room for the 256 tokens of an answer.
SIZES = ("num_steps=12", "checkpoint.every=6", "eval.every=6", "model.context_length=320", "eval.batch_size=4")
SCRIPT = """
import sys, jax
rank, count, devices, port, folder, *overrides = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices))
if int(count) > 1:
    jax.distributed.initialize(f"localhost:{port}", int(count), int(rank))
from foundry_jax import command, compilation, config, train
compilation.enable_cache()
command.run(lambda: train.run(config.load("configs/smoke.py", overrides), folder))
"""


PACKED = ("data.packing=first_fit", "data.curriculum=length(start=0.5)")


def start(rank, count, devices, port, folder, strategy):
    data = folder.parent
    tasks = f"constitution(every=6, data='{data}/pairs.jsonl'), gsm8k(shots=0, data='{data}/sums.jsonl')"
    overrides = [*SMALL_TEXT, f"sharding.strategy={strategy}", f"eval.tasks={tasks}", *SIZES]
    overrides += PACKED if strategy == "fsdp" else ()
    arguments = [sys.executable, "-c", SCRIPT, *map(str, (rank, count, devices, port, folder, *overrides))]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.exhaustive)])
def test_two_processes_equal_one(tmp_path, strategy):
    for name, row in {
        "pairs": {"prompt": "Is it so?", "chosen": " It is.", "rejected": " No idea."},
        "sums": {"question": "1 + 1?", "answer": "#### 2"},
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    alone = start(0, 1, 4, 0, tmp_path / "alone", strategy)
    assert alone.wait(120) == 0, alone.stdout.read()
    port = free_port()
    pair = [start(rank, 2, 2, port, tmp_path / "pair", strategy) for rank in range(2)]
    for process in pair:
        assert process.wait(120) == 0, process.stdout.read()
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("alone", "pair"))
    assert [(row["step"], row["kind"]) for row in one] == [(row["step"], row["kind"]) for row in two]
    assert [row["kind"] for row in one].count("task") == 3
    for a, b in zip(one, two, strict=True):
        names = [name for name in a if name == "loss" or "/" in name]
        assert [a[name] for name in names] == pytest.approx([b[name] for name in names], rel=1e-5, nan_ok=True)
    one, two = (results.read(tmp_path / name / "evals" / "step-12" / "gsm8k").rows for name in ("alone", "pair"))
    assert len(one) == 3 and one[0].notes["text"] == two[0].notes["text"] != ""
    assert json.loads((tmp_path / "pair" / "result.json").read_text())["num_processes"] == 2
