"""Runs that are killed, stopped, damaged or poisoned end as if nothing had happened: real processes, all bits."""

import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable

import jax
import numpy as np
import pytest

from foundry_jax import config, data, train
from foundry_jax.errors import UserError
from foundry_jax.runfolder import read_metrics, read_result
from tests.processes import (
    ROOT,
    SMALL_TEXT,
    SMOKE,
    assert_bitwise_equal,
    compare,
    finish,
    newest_state,
    newest_step,
    poison,
    start,
)
from tests.variants import often

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> pathlib.Path:
    """A finished run that nothing happened to."""
    return finish(tmp_path_factory.mktemp("undisturbed") / "run").workdir


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> pathlib.Path:
    """A run stopped in step 24, with checkpoints 20 and 23 or 24, that nobody trains in."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    with start(workdir, pause="step:23") as child:
        assert child.signal_in_phase(signal.SIGTERM) == 75
    return workdir


@pytest.fixture
def run(stopped, tmp_path) -> pathlib.Path:
    """A copy of the stopped run to damage and to go on with."""
    return pathlib.Path(shutil.copytree(stopped, tmp_path / "run"))


def test_kill_9_at_random_moments_changes_no_number():
    arguments = [f"--config.{text}" for text in (*SMALL_TEXT, "num_steps=60")]
    script = [sys.executable, str(ROOT / "tests" / "bench" / "crash_safety.py"), "--kills=3", "--seed=1", *arguments]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"3 kills \(\d with .*\), 66 rows and \d\d arrays compared .*: 0 mismatches\n", done.stdout)


def test_the_comparison_notices_one_bit_of_one_number(undisturbed, tmp_path):
    """Or the tests of this file could not fail."""
    other = shutil.copytree(undisturbed, tmp_path / "other")
    metrics = other / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    row = json.loads(lines[7])
    row["loss"] = math.nextafter(row["loss"], 9)
    metrics.write_text("\n".join([*lines[:7], json.dumps(row), *lines[8:], ""]))
    assert len(compare(undisturbed, other).mismatches) == 1
    shutil.copytree(other / "checkpoints" / "40", other / "checkpoints" / "41")
    shutil.rmtree(other / "checkpoints" / "40")
    assert len(compare(undisturbed, other).mismatches) > 2  # the arrays of another step


@pytest.mark.parametrize(
    ("pause", "number"),
    often(
        [
            ("compile", signal.SIGTERM),
            ("step:12", signal.SIGTERM),
            ("step:12", signal.SIGINT),
            ("eval:3", signal.SIGTERM),  # that of the averaged weights at step 20
            ("save:2", signal.SIGTERM),  # at step 15
        ],
        [("save:2", signal.SIGTERM)],
    ),
)
def test_a_signal_saves_the_current_step_and_the_run_goes_on_from_it(undisturbed, tmp_path, pause, number):
    with start(tmp_path / "run", pause=pause) as child:
        assert child.signal_in_phase(number) == 75, child.stderr
    last_line = child.stderr.splitlines()[-1]
    said = re.fullmatch(rf"preempted: step (\d+) of 40 is saved in {child.workdir}; run it again .*", last_line)
    assert said and "Traceback" not in child.stderr, child.stderr
    step = int(said[1])
    if pause.startswith("save"):  # training went on meanwhile, but not past the next save
        assert 15 <= step <= 20
    else:
        assert step == {"compile": 1, "step:12": 13, "eval:3": 20}[pause]
    assert newest_step(child.workdir) == step == max(child.steps())
    assert (child.checkpoints / str(step) / "SEAL.json").exists()
    again = finish(child.workdir)
    assert f"Resuming from step {step}." in again.stderr
    assert again.steps() == list(range(step + 1, 41))
    assert_bitwise_equal(again.workdir, undisturbed)


def flip_a_bit(checkpoint: pathlib.Path) -> None:
    largest = _largest_file(checkpoint)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def truncate(checkpoint: pathlib.Path) -> None:
    largest = _largest_file(checkpoint)
    os.truncate(largest, largest.stat().st_size // 2)


def delete_a_file(checkpoint: pathlib.Path) -> None:
    _largest_file(checkpoint).unlink()


def empty(checkpoint: pathlib.Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def _largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", often([flip_a_bit, truncate, delete_a_file, empty], [flip_a_bit]))
def test_a_damaged_checkpoint_is_named_and_the_one_before_gives_the_same_run(undisturbed, run, damage: Callable):
    damage(run / "checkpoints" / "24")
    child = finish(run)
    told = [line for line in child.stderr.splitlines() if " is damaged (" in line]
    assert len(told) == 1 and told[0].startswith("Checkpoint 24 is damaged ("), child.stderr
    assert "Resuming from step 20." in child.stderr
    assert [path.name.partition("-")[0] for path in (run / "checkpoints" / "quarantine").iterdir()] == ["24"]
    assert_bitwise_equal(run, undisturbed)


@pytest.mark.exhaustive
def test_a_deleted_checkpoint_is_not_missed(undisturbed, run):
    shutil.rmtree(run / "checkpoints" / "24")
    assert "Resuming from step 20." in finish(run).stderr
    assert_bitwise_equal(run, undisturbed)


def test_a_run_without_a_whole_checkpoint_stops_instead_of_starting_over(run):
    for step in ("20", "24"):
        flip_a_bit(run / "checkpoints" / step)
    rows = (run / "metrics.jsonl").read_bytes()
    for _ in range(2):  # it stays so
        with start(run) as child:
            assert child.wait() == 1
        errors = [line for line in child.stderr.splitlines() if line.startswith("error:")]
        assert len(errors) == 1 and "Every checkpoint of this run is damaged: 20-checksum, 24-checksum" in errors[0]
        assert "Traceback" not in child.stderr and not child.steps()
    assert (run / "metrics.jsonl").read_bytes() == rows


def smoke(*overrides: str) -> config.Config:
    return config.load(str(SMOKE), [*SMALL_TEXT, "sharding.strategy=none", *overrides])


def train_poisoned(monkeypatch, workdir: pathlib.Path, batches: range, *overrides: str) -> dict:
    monkeypatch.setattr(data, "training", poison(batches))
    return train.run(smoke(*overrides), workdir, quiet=True)


def rows_of(workdir: pathlib.Path, kind: str) -> list[dict]:
    return read_metrics(workdir / "metrics.jsonl", kind)


def all_finite(run: pathlib.Path) -> bool:
    return all(np.isfinite(x).all() for x in jax.tree.leaves(newest_state(run)))


def test_a_few_nan_batches_are_skipped(monkeypatch, tmp_path):
    result = train_poisoned(monkeypatch, tmp_path / "run", range(12, 16))
    assert {row["step"]: row["skips"] for row in rows_of(tmp_path / "run", "train") if row["skips"]} == {
        13: 1, 14: 2, 15: 3, 16: 4}  # fmt: skip
    assert (result["skipped_steps"], result["rollbacks"]) == (4, 0)
    assert math.isfinite(result["validation"]["loss"]) and all_finite(tmp_path / "run")


def test_many_nan_batches_roll_the_run_back_and_move_it_past_them(monkeypatch, tmp_path):
    run = tmp_path / "run"
    result = train_poisoned(monkeypatch, run, range(12, 23))
    # The fifth skip is step 17: back to 10, and on with batch 17, so that steps 11 to 15 are bad again.
    assert json.loads((run / "data_windows.json").read_text()) == [[10, 7], [10, 12]]
    assert [(row["step"], row["from_step"], row["rollbacks"]) for row in rows_of(run, "rollback")] == [
        (10, 17, 1), (10, 15, 2)]  # fmt: skip
    assert result["rollbacks"] == 2
    rows = rows_of(run, "train")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert {row["step"] for row in rows if not math.isfinite(row["loss"])} == {11}  # batch 22
    assert math.isfinite(result["validation"]["loss"]) and all_finite(run)


@pytest.mark.exhaustive
def test_a_roll_back_finds_a_checkpoint_from_before_the_trouble(monkeypatch, tmp_path):
    """Steps that are skipped save nothing, or they would push out what is to be rolled back to."""
    run = tmp_path / "run"
    train_poisoned(monkeypatch, run, range(12, 17), "checkpoint.every=1", "checkpoint.keep_best=0")
    assert json.loads((run / "data_windows.json").read_text()) == [[12, 5]]


def test_a_run_that_stays_nan_ends_with_a_diagnosis(tmp_path):
    """With such a rate weight decay makes the weights 100 times larger, and of the other sign, at each step."""
    workdir = tmp_path / "run"
    absurd = ("optimizer.learning_rate=1000", "optimizer.warmup_steps=1", "optimizer.clip_norm=0")
    with start(workdir, [*SMALL_TEXT, *absurd]) as child:
        assert child.wait() == 1, child.stderr
    errors = [line for line in child.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in child.stderr, child.stderr
    for part in ("5 steps in a row", "after 3 roll-backs", "last finite loss", "optimizer.learning_rate (1000 now)"):
        assert part in errors[0]
    assert child.stderr.count("and on with other data (roll-back ") == 3
    assert len(json.loads((workdir / "data_windows.json").read_text())) == 3
    assert read_result(workdir) is None


def test_nan_without_roll_backs_ends_at_once(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="5 steps in a row up to step 5 .* after 0 roll-backs .*; none was before"):
        train_poisoned(monkeypatch, tmp_path / "run", range(40), "guard.max_rollbacks=0")


@pytest.mark.exhaustive
def test_a_run_killed_after_a_roll_back_remembers_which_data_to_skip(tmp_path):
    whole = finish(tmp_path / "whole", poison="12:17").workdir
    assert json.loads((whole / "data_windows.json").read_text()) == [[10, 7]]
    with start(tmp_path / "run", poison="12:17") as child:
        assert child.wait_until(lambda: len(child.steps()) > 17)  # it is back at 11 or later
        child.process.kill()
    assert "roll-back" not in finish(child.workdir, poison="12:17").stderr
    assert json.loads((child.workdir / "data_windows.json").read_text()) == [[10, 7]]
    assert_bitwise_equal(child.workdir, whole)


def virtual_devices(number: int) -> dict[str, str]:
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={number}"}


@pytest.fixture(scope="module", params=often(["ddp", "fsdp"], ["fsdp"]))
def stopped_on_8(request, tmp_path_factory) -> pathlib.Path:
    """A run stopped after 24 steps on 8 devices."""
    workdir = tmp_path_factory.mktemp(request.param) / "run"
    overrides = [*SMALL_TEXT, f"sharding.strategy={request.param}"]
    with start(workdir, overrides, pause="step:23", environment=virtual_devices(8)) as child:
        assert child.signal_in_phase(signal.SIGTERM) == 75, child.stderr
    assert f"Sharding: {request.param}" in child.stderr and "on 8 x cpu" in child.stderr
    return workdir


@pytest.mark.parametrize("num_devices", often([1, 2], [1]))
def test_a_run_goes_on_with_another_number_of_devices(undisturbed, stopped_on_8, tmp_path, num_devices):
    run = shutil.copytree(stopped_on_8, tmp_path / "run")
    child = finish(run, environment=virtual_devices(num_devices))
    assert f"on {num_devices} x cpu" in child.stderr and "Resuming from step 24." in child.stderr
    for kind in ("train", "eval"):
        rows, expected = rows_of(run, kind), rows_of(undisturbed, kind)
        assert [row["step"] for row in rows] == [row["step"] for row in expected]
        # Devices add up gradients in another order: float32 keeps 7 digits.
        np.testing.assert_allclose([row["loss"] for row in rows], [row["loss"] for row in expected], rtol=1e-5)
