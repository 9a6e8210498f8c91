"""A sweep as a user runs it: real processes, real models, one folder."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from foundry_jax import command
from foundry_jax.cli import sweep as cli
from foundry_jax.config import load
from foundry_jax.runfolder import read_result
from foundry_jax.search.ledger import Ledger
from tests.bench.sweep_crash_safety import processes_of, without_times
from tests.conftest import ROOT

PAIRS = [{"prompt": f"Is {i} even?", "chosen": " Yes.", "rejected": " No, it is not."} for i in range(8)]
SHORT = ("--config=configs/smoke.py", "--config.num_steps=20", "--config.eval.every=20", "--seeds=2", "--jobs=2")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> pathlib.Path:
    """A folder with the configs, which promotions write to."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "configs", folder / "configs", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in PAIRS), "utf-8")
    return folder


def start(words: list[str], folder: pathlib.Path) -> subprocess.Popen:
    """Starts `python -m foundry_jax.WORDS` in a folder."""
    environment = os.environ | {"FOUNDRY_CACHE": str(ROOT / ".cache" / "data")}
    command_line = [sys.executable, "-m", f"foundry_jax.{words[0]}", *words[1:]]
    pipe = subprocess.PIPE
    return subprocess.Popen(command_line, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def run(words: list[str], folder: pathlib.Path, stdin: str | None = None) -> subprocess.CompletedProcess:
    """Runs it to its end."""
    environment = os.environ | {"FOUNDRY_CACHE": str(ROOT / ".cache" / "data")}
    command_line = [sys.executable, "-m", f"foundry_jax.{words[0]}", *words[1:]]
    return subprocess.run(
        command_line, cwd=folder, env=environment, capture_output=True, text=True, input=stdin, timeout=600, check=False
    )


@pytest.mark.slow
def test_a_sweep_trains_judges_promotes_and_the_promotion_can_be_undone(checkout):
    words = ["cli.sweep", "lr", "6e-3", *SHORT, "--config.num_steps=30", "--promote", "--json", "--alpha=0.4"]
    done = run([*words, "--min-effect=0.0001"], checkout)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    contestant = result["contestants"]["lr=6e-3"]
    assert len(contestant["gate"]) >= 4 and all(check["passed"] for check in contestant["gate"])
    assert [run["status"] for run in contestant["runs"]] == ["done", "done"] and result["cost"]["runs"] == 4
    assert contestant["verdict"]["over_units"]["n"] > 10 and "report.html" in done.stderr
    assert result["decision"]["promoted"] == "lr=6e-3", result["decision"]["why"]
    assert load(str(checkout / "configs" / "smoke.py")).optimizer.learning_rate == 6e-3
    begin = time.monotonic()
    again = run([*words, "--min-effect=0.0001"], checkout)
    assert time.monotonic() - begin < 2 and json.loads(again.stdout)["decision"] == result["decision"]
    piped = run(["cli.lineage", "-", "--json"], checkout, stdin=again.stdout)
    assert piped.returncode == 0 and json.loads(piped.stdout), piped.stderr
    assert run(["cli.lineage", "--undo", "configs/smoke.py"], checkout).returncode == 0
    assert load(str(checkout / "configs" / "smoke.py")).optimizer.learning_rate == 3e-3


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_sweep_can_be_decided_by_a_task(checkout):
    words = ["cli.sweep", "norm", "layernorm", *SHORT, "--eval-task=constitution", "--data=pairs.jsonl", "--json"]
    done = run(words, checkout)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["metric"]["name"] == "constitution" and result["hashes"]["items"].keys() == {"constitution"}
    contestant = result["contestants"]["layernorm"]
    assert contestant["verdict"]["over_units"]["n"] == len(PAIRS)
    assert "bits_per_byte" in contestant["others"]
    assert {"bits_per_byte", "loss", "constitution/accuracy"} <= contestant["mean"].keys()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_mutations_of_the_data_are_judged_on_the_same_text(checkout):
    words = ["cli.sweep", "packing=first_fit", "curriculum=length", "data_filter=exact", *SHORT, "--json"]
    done = run(words, checkout)
    assert done.returncode == 0, done.stderr
    contestant = json.loads(done.stdout)["contestants"]["first_fit,curriculum=length,data_filter=exact"]
    assert len(contestant["gate"]) == 5 and all(check["passed"] for check in contestant["gate"])
    assert [run["status"] for run in contestant["runs"]] == ["done", "done"]
    assert contestant["verdict"]["over_units"]["n"] > 10


@pytest.mark.slow
@pytest.mark.exhaustive
def test_formats_of_conversations_are_judged_on_the_same_answers(checkout):
    said = [{"instruction": f"Double {i}.", "input": "", "output": f"It is {2 * i}."} for i in range(200)]
    (checkout / "chats.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in said), "utf-8")
    data = ["--config.data.source=chat", "--config.data.path=chats.jsonl", "--config.data.tokenizer=bpe"]
    data += ["--config.data.vocab_size=300", "--config.data.packing=first_fit"]
    data += ["--config.data.validation=document(0.3)"]
    words = ["cli.sweep", "conversation_format", "llama3", "alpaca", "--json"]
    data += ["--config.model.context_length=128", "--config=configs/smoke.py:chatml"]
    done = run([*words, *SHORT[1:], *data], checkout)
    assert done.returncode == 0, done.stderr
    contestants = json.loads(done.stdout)["contestants"]
    for name in ("llama3", "alpaca"):
        assert [run["status"] for run in contestants[name]["runs"]] == ["done", "done"], contestants[name]
        assert contestants[name]["verdict"]["over_units"]["n"] > 3


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_sweep_that_is_killed_goes_on_and_leaves_no_process(checkout):
    words = ["cli.sweep", "norm", "layernorm", *SHORT, "--config.num_steps=60", "--json"]
    calm = run([*words, "--workdir=calm"], checkout)
    folder = checkout / "killed"
    with start([*words, f"--workdir={folder}"], checkout) as process:
        while not list(folder.glob("runs/*/*/checkpoints/*/SEAL.json")):
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    until = time.monotonic() + 5
    while processes_of(folder) and time.monotonic() < until:
        time.sleep(0.05)
    assert not processes_of(folder)
    done = run([*words, f"--workdir={folder}"], checkout)
    assert json.loads(done.stdout)["decision"] == json.loads(calm.stdout)["decision"]
    assert without_times(Ledger(folder)._facts) == without_times(Ledger(checkout / "calm")._facts)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_sweep_that_is_asked_to_stop_says_so(checkout):
    folder = checkout / "stopped"
    words = ["cli.sweep", "norm", "layernorm", *SHORT, "--config.num_steps=60", "--json", f"--workdir={folder}"]
    with start(words, checkout) as process:
        while not list(folder.glob("runs/*/*/metrics.jsonl")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
        assert process.returncode == 75 and "run the same command again" in process.stderr.read()
    assert not processes_of(folder)
    assert run(words, checkout).returncode == 0 and read_result(folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["norm", "layernrom"], r"Unknown norm 'layernrom'. Did you mean 'layernorm'"),
        (["nrom=layernorm"], r"Unknown mutation 'nrom'. Did you mean 'norm'"),
        (["norm", "rmsnorm"], r"nothing to compare the incumbent with. rmsnorm: it is the incumbent"),
        (["mla", "--budget=soon"], r"--budget='soon' must be a time such as 90s, 30m"),
        (["mla", "--jobs=0"], r"--jobs=0 must be 1 or more"),
        (["mla", "--data=x"], r"--data is of --eval-task; name one"),
        (["mla", "--eval-task=mlmu"], r"Unknown metric 'mlmu'. Did you mean 'mmlu'"),
        (["mla", "--metric=loss2"], r"Unknown metric 'loss2'. Did you mean 'loss'"),
        (["mla", "--seeds=3", "--max-seeds=2"], r"max_seeds=2 must be at least seeds=3"),
        (["mla", "--config=configs/none.py"], r"No config file 'configs/none.py'"),
        (["mla", "--config.model.numlayers=2"], r"Unknown config key 'model.numlayers'. Did you mean"),
    ],
)
def test_mistakes_are_one_line(words, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.setattr(sys, "argv", ["sweep", "--config=configs/smoke.py", *words])
    with pytest.raises(SystemExit) as stop:
        command.run(cli.main)
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and len(said) == 1
    assert re.search(message, said[0]), said[0]
    assert not list(tmp_path.glob("runs/sweeps/*/runs"))
