"""Processes that train jobs: started on slots, watched, started again, and never left behind."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from foundry_jax import config
from foundry_jax.config import to_flat_dict
from foundry_jax.errors import MachineError, Preempted, UserError
from foundry_jax.runfolder import read_result
from foundry_jax.search import runner, slots
from foundry_jax.search.jobs import Job, Run, RunState, read_failure, read_job, write_failure
from foundry_jax.search.runner import run_jobs
from tests.processes import ROOT, SMALL_TEXT, SMOKE

# In place of search/worker.py, so that a process starts in 30 ms. The config of a run says what it does when it is
# started, for the first time, the second time, ...; then it is done.
STAND_IN = """
import json, os, pathlib, signal, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])

def beat(run, step):
    (run / "beat").write_text(json.dumps({"step": step, "time": time.time()}))
    os.replace(run / "beat", run / "heartbeat.json")

def stop(*_):
    (folder / "saved").touch()
    sys.exit(75)

signal.signal(signal.SIGTERM, stop)
for run in json.loads((folder / "job.json").read_text())["runs"]:
    path = pathlib.Path(run["folder"])
    path.mkdir(parents=True, exist_ok=True)
    (folder / "status.json").write_text(json.dumps({"current": [str(path)], "pid": os.getpid()}))
    (path / "cores").write_text(json.dumps(sorted(os.sched_getaffinity(0))))
    starts = path / "starts"
    starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
    acts = run["config"]["acts"]
    act = acts[len(starts.read_text()) - 1] if len(starts.read_text()) <= len(acts) else "done"
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "step and kill":
        beat(path, len(starts.read_text()))
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "stall":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (path / "pids").write_text(json.dumps([os.getpid(), child.pid]))
        time.sleep(600)
    if act == "wait":
        for step in range(3000):
            beat(path, step)
            time.sleep(0.2)
    if act.startswith("exit"):
        print("some lines\\nerror: what was wrong\\nand more")
        sys.exit(int(act.split()[1]))
    time.sleep(0.02)
    (path / "result.json").write_text("{}")
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> pathlib.Path:
    """Has the runner start the stand-in, and wait for little."""
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    monkeypatch.setattr(runner, "WORKER", (sys.executable, str(path)))
    monkeypatch.setattr(runner, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(runner, "SIGN_SECONDS", 0.05)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.005)
    return path


def job_of(folder: pathlib.Path, name: str, *acts: list[str]) -> Job:
    """Returns a job with a run for each list of what happens to it."""
    runs = [Run(folder / "runs" / f"{name}-{i}", {"num_steps": 100, "acts": each}) for i, each in enumerate(acts)]
    return Job(name, tuple(runs))


class Events(list):
    """What was told."""

    def names(self) -> list[str]:
        return [event["event"] for event in self if event["event"] != "step"]


def carry_out(folder: pathlib.Path, *jobs: Job, number: int = 2, patience: float = 20, retries: int = 3, tell=None):
    """Returns the outcomes, and what was told."""
    events = Events()

    def note(event):
        events.append(event)
        if tell:
            tell(event)

    found = run_jobs(jobs, slots=number, folder=folder / "jobs", patience=patience, retries=retries, tell=note)
    return found, events


def is_alive(pid: int) -> bool:
    """Returns whether a process runs: one that has ended and whose parent does not care is a zombie."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_jobs_are_done_once_and_a_second_call_starts_nothing(stand_in, tmp_path):
    jobs = [job_of(tmp_path, "one", [], []), job_of(tmp_path, "two", [])]
    outcomes, events = carry_out(tmp_path, *jobs)
    assert sorted(events.names()) == ["ended"] * 2 + ["run"] * 3 + ["started"] * 2
    assert all(event["text"].startswith(f"{event['job']}: ") for event in events)
    for job in jobs:
        outcome = outcomes[job.name]
        assert (outcome.status, outcome.reason, outcome.starts) == ("done", None, 1) and outcome.seconds > 0
        assert outcome.runs == {run.folder: RunState("done") for run in job.runs}
        assert read_job(tmp_path / "jobs" / job.name) == job
    again, events = carry_out(tmp_path, *jobs)
    assert [outcome.starts for outcome in again.values()] == [0, 0] and events.names() == ["ended", "ended"]


def test_a_run_that_failed_for_good_is_not_trained_again(stand_in, tmp_path):
    job = job_of(tmp_path, "job", [], [])
    write_failure(job.runs[0].folder, "5 steps in a row were not finite", "diverged")
    outcome = carry_out(tmp_path, job)[0]["job"]
    assert outcome.status == "done" and not (job.runs[0].folder / "starts").exists()
    assert outcome.runs[job.runs[0].folder] == RunState("failed", "5 steps in a row were not finite", "diverged")
    assert read_failure(job.runs[0].folder)["reason"] == "5 steps in a row were not finite"
    assert read_failure(job.runs[1].folder) is None
    assert runner.is_settled(job.runs[0].folder) and runner.is_settled(job.runs[1].folder)
    assert not runner.is_settled(tmp_path)


@pytest.mark.parametrize(
    ("act", "why"), [("kill", "killed by signal 9"), ("exit 75", "asked to stop"), ("exit 7", "exit code 7: what was")]
)
def test_what_did_not_end_by_itself_is_started_again(stand_in, tmp_path, act, why):
    outcomes, events = carry_out(tmp_path, job_of(tmp_path, "job", [act, act]))
    assert outcomes["job"].status == "done" and outcomes["job"].starts == 3
    retries = [event for event in events if event["event"] == "retry"]
    assert [event["seconds"] for event in retries] == [0.01, 0.02] and all(why in event["reason"] for event in retries)


def test_it_is_given_up_after_so_many_tries_but_not_while_it_gains_steps(stand_in, tmp_path):
    jobs = [job_of(tmp_path, "hopeless", ["kill"] * 9), job_of(tmp_path, "slow", ["step and kill"] * 9)]
    outcomes, _ = carry_out(tmp_path, *jobs, retries=2)
    assert outcomes["hopeless"].status == "failed" and outcomes["hopeless"].starts == 3
    assert "killed by signal 9 (Killed), 3 times without a step gained; see " in outcomes["hopeless"].reason
    assert list(outcomes["hopeless"].runs.values()) == [RunState("unfinished")]
    assert outcomes["slow"].status == "done" and outcomes["slow"].starts == 10


def test_a_run_that_brings_its_process_down_is_left_out(stand_in, tmp_path):
    job = job_of(tmp_path, "job", [], ["kill"] * 9, [])
    outcomes, events = carry_out(tmp_path, job, retries=1)
    states = list(outcomes["job"].runs.values())
    assert [state.status for state in states] == ["done", "unfinished", "done"]
    assert "killed by signal 9" in states[1].reason and "left out" in events.names()
    assert outcomes["job"].status == "failed" and "job-1: killed by signal 9" in outcomes["job"].reason


def test_a_mistake_is_not_tried_again_and_is_the_reason(stand_in, tmp_path):
    outcomes, _ = carry_out(tmp_path, job_of(tmp_path, "job", [], ["exit 1"]))
    outcome = outcomes["job"]
    assert (outcome.status, outcome.reason, outcome.starts) == ("failed", "what was wrong", 1)
    assert [state.status for state in outcome.runs.values()] == ["done", "unfinished"]


def test_what_the_machine_refuses_ends_everything(stand_in, tmp_path):
    jobs = [job_of(tmp_path, "a", ["stall"]), job_of(tmp_path, "b", ["exit 74"])]
    with pytest.raises(MachineError, match="^what was wrong$"):
        carry_out(tmp_path, *jobs)
    pids = tmp_path / "runs" / "a-0" / "pids"
    assert not pids.exists() or not any(map(is_alive, json.loads(pids.read_text())))


def test_a_stalled_process_is_killed_with_all_it_started(stand_in, tmp_path):
    outcomes, events = carry_out(tmp_path, job_of(tmp_path, "job", ["stall"]), patience=2)
    assert outcomes["job"].status == "done" and outcomes["job"].starts == 2
    assert next(event for event in events if event["event"] == "retry")["reason"] == "no sign of life for 2 s"
    wait_until(lambda: not any(map(is_alive, json.loads((tmp_path / "runs" / "job-0" / "pids").read_text()))))


def test_a_process_that_shows_signs_of_life_is_left_alone_and_saves_when_asked_to_stop(stand_in, tmp_path):
    def stop(event):
        if event["event"] == "step" and list(event["steps"].values()) >= [6]:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    jobs = [job_of(tmp_path, "job", ["wait"]), job_of(tmp_path, "waits", [])]
    with pytest.raises(Preempted, match="1 jobs are stopped, 1 wait; run the same command again"):
        carry_out(tmp_path, *jobs, number=1, patience=0.8, tell=stop)
    assert (tmp_path / "jobs" / "job" / "saved").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_interrupt_does_not_wait(stand_in, tmp_path, monkeypatch):
    stand_in.write_text(stand_in.read_text().replace("sys.exit(75)", "time.sleep(600)"))  # saving takes long
    sent = []

    def interrupt(event):
        if event["event"] == "step" and max(event["steps"].values()) > 1 and not sent:
            sent.append(event)
            os.kill(os.getpid(), signal.SIGINT)

    def again(seconds, sleep=time.sleep):
        if (tmp_path / "jobs" / "job" / "saved").exists():
            os.kill(os.getpid(), signal.SIGINT)
        sleep(seconds)

    monkeypatch.setattr(runner.time, "sleep", again)
    with pytest.raises(KeyboardInterrupt):
        carry_out(tmp_path, job_of(tmp_path, "job", ["wait"]), tell=interrupt)


def test_no_process_outlives_a_driver_that_is_killed(stand_in, tmp_path):
    script = f"""
import pathlib
from foundry_jax.search import runner
runner.WORKER = {runner.WORKER!r}
folder = pathlib.Path({str(tmp_path)!r})
job = runner.Job("job", (runner.Run(folder / "runs" / "job-0", {{"num_steps": 9, "acts": ["stall"]}}),))
runner.run_jobs([job], slots=1, folder=folder / "jobs", patience=600)
"""
    driver = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    pids = tmp_path / "runs" / "job-0" / "pids"
    try:
        wait_until(lambda: pids.exists() and pids.read_text())
        worker, child = json.loads(pids.read_text())
    finally:
        driver.kill()
        driver.wait()
    wait_until(lambda: not is_alive(worker))
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)  # of the stand-in; a worker's own children end with it


def test_as_many_jobs_run_at_a_time_as_there_are_slots(stand_in, tmp_path):
    jobs = [job_of(tmp_path, name, []) for name in "abc"]
    running, most = set(), []

    def count(event):
        if event["event"] in ("started", "ended"):
            (running.add if event["event"] == "started" else running.discard)(event["job"])
            most.append(len(running))

    for number in (1, 2):
        most.clear()
        carry_out(tmp_path / str(number), *[job_of(tmp_path / str(number), job.name, []) for job in jobs],
                  number=number, tell=count)  # fmt: skip
        assert max(most) == number


def test_processes_share_the_cores_equally(stand_in, tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    carry_out(tmp_path, *[job_of(tmp_path, name, []) for name in "ab"], number=2)
    used = [json.loads((tmp_path / "runs" / f"{name}-0" / "cores").read_text()) for name in "ab"]
    assert len(used[0]) == len(used[1]) == max(1, len(cores) // 2)
    assert len(cores) == 1 or not set(used[0]) & set(used[1])


def environments(number: int, **environment: str) -> list[dict[str, str]]:
    return [dict(slot.environment) for slot in slots.divide(number, environment)]


def test_gpus_are_shared_out():
    assert environments(1, CUDA_VISIBLE_DEVICES="0,1") == [{}]  # all of them
    assert environments(2, CUDA_VISIBLE_DEVICES="0,1,4,5,6") == [
        {"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "4,5"}]  # fmt: skip
    shared = environments(3, CUDA_VISIBLE_DEVICES="0,1")
    assert [one["CUDA_VISIBLE_DEVICES"] for one in shared] == ["0", "1", "0"]
    assert {one["XLA_CLIENT_MEM_FRACTION"] for one in shared} == {"0.450"}
    of_the_user = environments(2, CUDA_VISIBLE_DEVICES="0", XLA_PYTHON_CLIENT_MEM_FRACTION="0.2")
    assert of_the_user == [{"CUDA_VISIBLE_DEVICES": "0"}] * 2
    assert environments(2, CUDA_VISIBLE_DEVICES="0,1", JAX_PLATFORMS="cpu") == [{}, {}]


def test_tpu_chips_are_shared_out_but_none_is_shared():
    chips = {"TPU_VISIBLE_CHIPS": "0,1,2,3", "JAX_PLATFORMS": "tpu"}
    two = environments(2, **chips)
    assert [one["TPU_VISIBLE_CHIPS"] for one in two] == ["0,1", "2,3"]
    assert {one["TPU_CHIPS_PER_PROCESS_BOUNDS"] for one in two} == {"1,2,1"}
    with pytest.raises(UserError, match="jobs=5, but there are 4 TPU chips, and no two processes share one"):
        environments(5, **chips)


def test_shares_are_equal():
    assert slots.shares(range(7), 3) == [(0, 1), (2, 3), (4, 5)]
    assert slots.shares("ab", 3) == [("a",), ("b",), ("a",)]
    with pytest.raises(UserError, match="jobs=0 must be at least 1"):
        slots.divide(0, {})


def test_jobs_that_cannot_be_told_apart_are_refused(tmp_path):
    job, path = job_of(tmp_path, "job", []), pathlib.Path
    with pytest.raises(UserError, match="Two jobs have one name: job, job"):
        run_jobs([job, job], slots=1, folder=tmp_path, patience=9)
    with pytest.raises(UserError, match="'a/b', which is no folder's name"):
        run_jobs([Job("a/b", job.runs)], slots=1, folder=tmp_path, patience=9)
    with pytest.raises(UserError, match="two runs in one folder"):
        Job("job", job.runs * 2)
    with pytest.raises(UserError, match="runs/a of a job must be an absolute path"):
        Run(path("runs/a"), {})
    with pytest.raises(UserError, match="Unknown way to train several runs 'wmap'. Did you mean 'vmap'"):
        Job("job", job.runs, "wmap")
    with pytest.raises(UserError, match="holds no job.json that can be read"):
        read_job(tmp_path)


def test_a_damaged_note_of_a_failure_says_what_to_do(tmp_path):
    run = job_of(tmp_path, "job", []).runs[0]
    write_failure(run.folder, "why", "refused")
    (run.folder / "failure.json").write_text("{")
    with pytest.raises(UserError, match="failure.json is not valid JSON .*; delete it to try the run again"):
        run.state()


def test_a_damaged_heartbeat_is_none(tmp_path):
    """They are not written so that they survive a power cut."""
    run = job_of(tmp_path, "job", []).runs[0]
    run.folder.mkdir(parents=True)
    assert run.step() == 0 and run.heartbeat() is None
    (run.folder / "heartbeat.json").write_text('{"step": 7, "time": 1.0}')
    assert run.step() == 7
    (run.folder / "heartbeat.json").write_text("")
    assert run.step() == 0 and run.heartbeat() is None


@pytest.mark.slow
def test_real_workers_are_killed_and_finish_all_the_same(tmp_path):
    """One is killed in its first run, the driver's other one is left alone; each run is finished once."""
    steps = (*SMALL_TEXT, "num_steps=60", "eval.every=30", "checkpoint.every=10", "log.every=10")
    flat = [to_flat_dict(config.load(str(SMOKE), [*steps, f"seed={seed}"])) for seed in range(4)]
    runs = [Run(tmp_path / "runs" / f"seed-{seed}", settings) for seed, settings in enumerate(flat)]
    jobs = [Job("killed", tuple(runs[:2])), Job("calm", tuple(runs[2:]))]
    pids = {}

    def kill(event):
        if event["event"] == "started":
            pids.setdefault(event["job"], []).append(event["pid"])
        steps = event.get("steps", {}).get(runs[0].folder, 0)
        if event["job"] == "killed" and steps >= 10 and len(pids["killed"]) == 1:
            os.kill(pids["killed"][0], signal.SIGKILL)

    outcomes, _ = carry_out(tmp_path, *jobs, patience=300, tell=kill)
    assert {name: outcome.status for name, outcome in outcomes.items()} == {"killed": "done", "calm": "done"}
    assert outcomes["killed"].starts == 2 and outcomes["calm"].starts == 1
    assert [read_result(run.folder)["step"] for run in runs] == [60] * 4
    assert not any(is_alive(pid) for each in pids.values() for pid in each)
    status = json.loads((tmp_path / "jobs" / "calm" / "status.json").read_text())
    assert status["compilations"]["train_steps"] == 1 and status["step_seconds"]["serial"] > 0
