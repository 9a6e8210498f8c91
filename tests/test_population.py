"""Runs that pause, that are trained together, and that one process trains one after the other: as if trained alone."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from foundry_jax import compilation, config, train
from foundry_jax.config import to_flat_dict
from foundry_jax.errors import MachineError, Preempted, UserError
from foundry_jax.preemption import Preemption
from foundry_jax.runfolder import read_metrics, read_result, read_validation_blocks
from foundry_jax.search import population, worker
from foundry_jax.search.jobs import Job, Run, RunState, read_failure
from tests.processes import SMALL_TEXT, SMOKE, assert_bitwise_equal, newest_state, newest_step

SETTINGS = (*SMALL_TEXT, "sharding.strategy=none", "num_steps=20", "eval.every=10", "checkpoint.every=5")
MEMBERS = {
    "slow": ("optimizer.learning_rate=1e-3",),
    "fast": ("optimizer.learning_rate=1e-2",),
    "other": ("seed=1", "optimizer.schedule=constant", "optimizer.beta2=0.9"),
}
DIVERGES = ("optimizer.learning_rate=1000", "optimizer.warmup_steps=1", "optimizer.clip_norm=0", "guard.max_skips=2",
            "guard.max_rollbacks=0")  # fmt: skip


def settings(*overrides: str) -> config.Config:
    return config.load(str(SMOKE), [*SETTINGS, *overrides])


def run_of(folder: pathlib.Path, *overrides: str, until: int | None = None) -> Run:
    return Run(folder, to_flat_dict(settings(*overrides)), until)


def runs_in(folder: pathlib.Path, until: int | None = None) -> list[Run]:
    return [run_of(folder / name, *overrides, until=until) for name, overrides in MEMBERS.items()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> pathlib.Path:
    """The members, each trained alone."""
    folder = tmp_path_factory.mktemp("alone")
    for name, overrides in MEMBERS.items():
        train.run(settings(*overrides), folder / name, quiet=True)
    return folder


def together(runs: list[Run], preemption=None, *, decided=None) -> tuple[population.Report, dict]:
    """Returns the report, and {name: what a run ended with}."""
    ended = {}
    with Preemption() as signals:
        report = population.train_together(
            runs,
            preemption or signals,
            decided=decided,
            ended=lambda run, outcome: ended.update({run.folder.name: outcome}),
        )
    return report, ended


class StopAt:
    """A preemption at a step."""

    def __init__(self, step: int):
        self.step = step

    def requested(self, step: int) -> bool:
        return step >= self.step


def test_a_paused_run_is_evaluated_and_saved_and_goes_on_as_if_nothing_had_been(alone, tmp_path):
    folder, run = tmp_path / "run", run_of(tmp_path / "run", *MEMBERS["fast"], until=7)
    assert run.state() == RunState("unfinished")
    for _ in range(2):  # the second time there is nothing to do
        assert train.run(settings(*MEMBERS["fast"]), folder, quiet=True, until=7) == {"status": "paused", "step": 7}
        assert [row["step"] for row in read_metrics(folder / "metrics.jsonl", "eval")] == [7]
        assert newest_step(folder) == 7 and read_result(folder) is None
    assert run.state() == RunState("paused") and run.step() == 7
    assert dataclasses.replace(run, until=8).state() == RunState("unfinished")
    result = train.run(settings(*MEMBERS["fast"]), folder, quiet=True, until=20)
    assert result["status"] == "done" and run.state() == RunState("done")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    unpaused = [line for line in lines if '"step": 7, "kind": "eval"' not in line]
    (folder / "metrics.jsonl").write_text("\n".join([*unpaused, ""]))
    assert_bitwise_equal(folder, alone / "fast")


def test_a_run_that_was_saved_at_its_pause_but_not_evaluated_is_not_paused_yet(tmp_path):
    run = run_of(tmp_path / "run", until=10)
    train.run(settings(), run.folder, quiet=True, until=10)
    metrics = run.folder / "metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.open() if '"eval"' not in line))
    assert run.state() == RunState("unfinished")
    assert train.run(settings(), run.folder, quiet=True, until=10) == {"status": "paused", "step": 10}
    assert run.state() == RunState("paused")


def assert_alike(one: pathlib.Path, other: pathlib.Path) -> None:
    """Fails if two runs differ by more than XLA's rounding of one program and of another."""
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    assert (one / "config.json").read_text() == (other / "config.json").read_text()
    for kind in ("train", "eval"):
        rows, expected = (read_metrics(folder / "metrics.jsonl", kind) for folder in (one, other))
        assert [row.keys() for row in rows] == [row.keys() for row in expected]
        for row, wanted in zip(rows, expected, strict=True):
            assert row.pop("kind") == wanted.pop("kind")
            assert row == pytest.approx(wanted, rel=2e-3)  # 20 steps of Adam make 1e-7 to 1e-3 at most
    blocks, wanted = read_validation_blocks(one), read_validation_blocks(other)
    assert blocks["bytes"] == wanted["bytes"] and blocks["targets"] == wanted["targets"]
    np.testing.assert_allclose(blocks["nats"], wanted["nats"], rtol=2e-3)
    result, expected = read_result(one), read_result(other)
    assert result.keys() == expected.keys()
    assert result["validation"] == pytest.approx(expected["validation"], rel=2e-3)
    states = newest_state(one), newest_state(other)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    assert newest_step(one) == newest_step(other) == 20


def test_members_of_a_population_end_as_if_they_had_been_alone(alone, tmp_path):
    report, ended = together(runs_in(tmp_path))
    assert report.way == "vmap" and report.step_seconds["vmap"] > 0
    assert {name: result["status"] for name, result in ended.items()} == dict.fromkeys(MEMBERS, "done")
    for name in MEMBERS:
        assert_alike(tmp_path / name, alone / name)
        assert read_result(tmp_path / name) == ended[name]
    losses = {ended[name]["validation"]["loss"] for name in MEMBERS}
    assert len(losses) == 3  # each has its own rate, seed and schedule
    assert together(runs_in(tmp_path))[1] == {}  # there is nothing left to do


def test_a_population_pauses_and_goes_on(alone, tmp_path):
    _, ended = together(runs_in(tmp_path, until=10))
    assert ended == {name: {"status": "paused", "step": 10} for name in MEMBERS}
    assert {run.state().status for run in runs_in(tmp_path, until=10)} == {"paused"}
    assert together(runs_in(tmp_path))[1].keys() == MEMBERS.keys()
    for name in MEMBERS:
        assert_alike(tmp_path / name, alone / name)


@pytest.mark.exhaustive
def test_whoever_is_at_another_step_goes_on_alone(alone, tmp_path):
    together(runs_in(tmp_path, until=10))
    train.run(settings(*MEMBERS["slow"]), tmp_path / "slow", quiet=True, until=15)
    report, ended = together(runs_in(tmp_path))
    assert report.way == "vmap" and ended.keys() == {"fast", "other"}
    train.run(settings(*MEMBERS["slow"]), tmp_path / "slow", quiet=True)
    found, expected = (read_result(folder / "slow")["validation"] for folder in (tmp_path, alone))
    assert found == pytest.approx(expected, rel=2e-3)


@pytest.mark.exhaustive
def test_a_member_that_does_not_stay_finite_leaves_and_the_others_notice_nothing(alone, tmp_path):
    runs = [*runs_in(tmp_path)[:2], run_of(tmp_path / "wild", *DIVERGES)]
    _, ended = together(runs)
    assert ended.keys() == {"slow", "fast"}
    assert runs[2].state() == RunState("unfinished")
    for name in ended:
        assert_alike(tmp_path / name, alone / name)


def test_all_members_save_when_they_are_asked_to_stop(alone, tmp_path):
    with pytest.raises(Preempted, match="step 8 of 20 is saved"):
        together(runs_in(tmp_path), StopAt(8))
    assert {newest_step(tmp_path / name) for name in MEMBERS} == {8}
    assert together(runs_in(tmp_path))[0].way == "vmap"
    assert_alike(tmp_path / "other", alone / "other")


def test_a_run_that_cannot_begin_says_why_and_the_others_are_timed_both_ways(tmp_path):
    reports = []
    runs = [*runs_in(tmp_path), run_of(tmp_path / "no", "data.path=/nowhere")]
    report, ended = together(runs, decided=reports.append)
    assert isinstance(ended.pop("no"), UserError)
    assert report.step_seconds.keys() == {"serial", "vmap"}
    faster = min(report.step_seconds, key=report.step_seconds.get)
    assert reports[0].way == report.way and (report.way == "vmap" or faster == "serial")
    assert ended.keys() == (MEMBERS.keys() if report.way == "vmap" else set())


def test_runs_with_other_last_steps_are_not_trained_together(tmp_path):
    report, ended = together([run_of(tmp_path / "a"), run_of(tmp_path / "b", until=10)])
    assert report == population.Report("serial", {}) and not ended


@pytest.mark.exhaustive
def test_runs_of_two_programs_or_on_several_devices_are_not_trained_together(tmp_path):
    other_program = run_of(tmp_path / "b", "model.num_layers=1")
    spread = [run_of(tmp_path / name, "sharding.strategy=ddp") for name in ("c", "d")]
    report, ended = together([run_of(tmp_path / "a"), other_program, *spread])
    assert report == population.Report("serial", {}) and not ended


def job_status(folder: pathlib.Path, runs: list[Run], way: str = "serial") -> dict:
    """Returns what status.json says after a worker has done a job in this process."""
    job = Job("job", tuple(runs), way)
    job.write(folder)
    with Preemption() as preemption:
        worker.work(job, worker.Status(folder, job), preemption)
    return json.loads((folder / "status.json").read_text())


def test_a_worker_trains_all_runs_with_one_executable_and_writes_down_who_failed(alone, tmp_path):
    compilation.compile_train_step.cache_clear()
    bad = {"no": ("data.path=/nowhere",), "wild": DIVERGES}
    runs = [*runs_in(tmp_path), *(run_of(tmp_path / name, *overrides) for name, overrides in bad.items())]
    status = job_status(tmp_path / "job", runs)
    assert compilation.compile_train_step.cache_info().misses == 1
    assert [run.state().status for run in runs] == ["done", "done", "done", "failed", "failed"]
    assert [entry["status"] for entry in status["runs"].values()] == [run.state().status for run in runs]
    assert status["current"] == [] and status["step_seconds"]["serial"] > 0 and status["way"] == "serial"
    assert read_failure(tmp_path / "no")["kind"] == "refused"
    assert read_failure(tmp_path / "wild")["kind"] == "diverged"
    assert "2 steps in a row" in runs[4].state().reason
    for name in MEMBERS:
        assert_bitwise_equal(tmp_path / name, alone / name)


def test_a_worker_finishes_alone_who_left_the_population(tmp_path):
    runs = [*runs_in(tmp_path)[:2], run_of(tmp_path / "wild", *DIVERGES)]
    status = job_status(tmp_path / "job", runs, "vmap")
    assert [run.state().status for run in runs] == ["done", "done", "failed"]
    assert status["way"] == "vmap" and status["step_seconds"]["vmap"] > 0


def test_the_way_is_decided_once(monkeypatch, tmp_path):
    """Two programs of one function differ in the last bits, so a job that is started again must not decide again."""
    job = Job("job", tuple(runs_in(tmp_path)), "auto")
    assert worker.way_of(job, tmp_path) == "serial"  # on CPU
    assert worker.way_of(dataclasses.replace(job, way="vmap"), tmp_path) == "vmap"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert worker.way_of(job, tmp_path) == "auto"
    (tmp_path / "status.json").write_text('{"way": "vmap"}')
    assert worker.way_of(job, tmp_path) == "vmap"


def test_what_the_machine_refuses_is_no_failure_of_the_run(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise MachineError("Cannot write to there: No space left on device; free space or raise the quota.")

    monkeypatch.setattr(train, "run", refuse)
    with pytest.raises(MachineError, match="free space"):
        job_status(tmp_path / "job", runs_in(tmp_path))
    assert not list(tmp_path.rglob("failure.json"))


def test_a_worker_that_is_asked_to_stop_begins_no_further_run(tmp_path):
    job = Job("job", tuple(runs_in(tmp_path)))
    (tmp_path / "job").mkdir()
    with pytest.raises(Preempted, match="job job has runs that have not begun"):
        worker.work(job, worker.Status(tmp_path / "job", job), StopAt(0))
    assert not (tmp_path / "slow").exists()


def test_a_corpus_is_read_again_only_when_it_has_changed(monkeypatch, tmp_path):
    from foundry_jax.data import cache, hashing

    root, read = tmp_path / "cache", []
    monkeypatch.setattr(
        hashing, "sha256_file", lambda path, sha=hashing.sha256_file: (read.append(path.name), sha(path))[1]
    )
    build = lambda folder: (folder / "train.bin").write_bytes(b"1234") and {}  # noqa: E731
    cache.open_or_build(root, {"a": 1}, build)
    read.clear()
    for _ in range(2):
        entry = cache.open_or_build(root, {"a": 1}, build)
    assert read == ["train.bin"]
    (entry.folder / "train.bin").write_bytes(b"1235")
    cache.open_or_build(root, {"a": 1}, build)
    assert (entry.folder / "train.bin").read_bytes() == b"1234"
    shutil.rmtree(root)
