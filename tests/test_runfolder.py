"""A run folder has one writer, one config, and files that are whole or absent."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from foundry_jax import runfolder
from foundry_jax.errors import UserError
from foundry_jax.runfolder import RunFolder, read_config, read_heartbeat, read_result, write_json_atomic

ROOT = pathlib.Path(__file__).parent.parent

HOLD = """
import sys, time
from foundry_jax.runfolder import RunFolder
folder = RunFolder(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def log(monkeypatch):
    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(runfolder.log, level, lambda text, *values: lines.append(text % values))
    return lines


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path, holder):
    with pytest.raises(UserError, match=f"in use by process {holder.pid} on .*another --workdir"):
        RunFolder(tmp_path)
    with RunFolder(tmp_path, primary=False):
        pass  # the other processes of that run only read


def test_a_killed_process_leaves_the_folder_free(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunFolder(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()} "):
        RunFolder(tmp_path)
    RunFolder(tmp_path).close()


def test_file_systems_without_locks_are_used_with_a_warning(tmp_path, monkeypatch, log):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(runfolder.fcntl, "flock", refuse)
    RunFolder(tmp_path).close()
    assert len(log) == 1 and "without locks" in log[0]


@pytest.fixture
def mounted(tmp_path, request):
    """A tmpfs with the options of the parameter."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a file system here: {error}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.parametrize("mounted", ["ro"], indirect=True)
def test_a_read_only_folder_is_refused_in_one_line(mounted):
    with pytest.raises(UserError, match=f"Cannot write to {mounted}: Read-only file system; choose a --workdir"):
        RunFolder(mounted)
    with pytest.raises(UserError, match="Read-only file system"):
        RunFolder(mounted / "new")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="Cannot write to .*x: File exists"):
        RunFolder(tmp_path / "x")


def fill(disk):
    with open(disk / "ballast", "wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return


@pytest.mark.parametrize("mounted", ["size=64k"], indirect=True)
def test_a_full_disk_is_refused_at_the_start_and_harmless_to_a_heartbeat(mounted, log):
    folder = RunFolder(mounted / "a")
    folder.write_result({"loss": 1.0})
    fill(mounted)
    with pytest.raises(UserError, match="No space left on device; free space"):
        RunFolder(mounted / "b")
    folder.heartbeat(1)
    folder._last_beat = 0.0
    folder.heartbeat(2)
    assert len(log) == 1 and "No space left" in log[0]
    with pytest.raises(UserError, match="No space left on device; free space"):
        folder.write_result({"loss": list(range(5000))})
    assert read_result(mounted / "a") == {"loss": 1.0}  # the old one, whole
    assert not list((mounted / "a").glob("*.tmp")) and not list((mounted / "a").glob(".*.tmp"))
    folder.close()


CONFIG = {"seed": 0, "model.num_layers": 4, "optimizer.learning_rate": 6e-4, "log.every": 10, "logic.every": 3}


def test_the_same_config_continues_the_run(tmp_path):
    for _ in range(2):
        with RunFolder(tmp_path) as folder:
            folder.write_config(CONFIG, {"log.*"})
    assert read_config(tmp_path) == CONFIG
    assert read_config(tmp_path / "elsewhere") is None


def test_another_config_is_refused_with_all_that_differs(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.write_config(CONFIG)
        other = {**CONFIG, "seed": 1, "optimizer.learning_rate": 3e-4, "log.every": 5, "new": "x"}
        del other["model.num_layers"]
        with pytest.raises(UserError) as refused:
            folder.write_config(other, {"log.*"})
    message = str(refused.value)
    differences = "seed: was 0, now 1; model.num_layers: was 4, now absent; "
    differences += 'optimizer.learning_rate: was 0.0006, now 0.0003; new: was absent, now "x".'
    assert differences in message and "log.every" not in message
    assert read_config(tmp_path) == CONFIG


@pytest.mark.parametrize("operational", ["log.*", "log.", "log", "log.every"])
def test_operational_keys_may_change_and_are_logged(tmp_path, operational, log):
    with RunFolder(tmp_path) as folder:
        folder.write_config(CONFIG, {operational})
        folder.write_config({**CONFIG, "log.every": 99}, {operational})
        assert read_config(tmp_path)["log.every"] == 99
        assert len(log) == 1 and "log.every: was 10, now 99" in log[0]
        with pytest.raises(UserError, match="logic.every: was 3, now 4"):
            folder.write_config({**CONFIG, "logic.every": 4}, {operational})


def test_a_damaged_config_is_an_error_not_a_fresh_run(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": ')
    with RunFolder(tmp_path) as folder, pytest.raises(UserError, match="config.json is not valid JSON"):
        folder.write_config(CONFIG)


def test_results_keep_every_float_and_are_standard_json(tmp_path):
    values = {
        "loss": np.float32(0.1),
        "nan": float("nan"),
        "worst": float("-inf"),
        "steps": np.int64(7),
        "seeds": [1, 2],
    }
    with RunFolder(tmp_path) as folder:
        assert read_result(tmp_path) is None
        folder.write_result(values)

    def no_constants(name):
        raise AssertionError(f"{name} is not standard JSON")

    json.loads((tmp_path / "result.json").read_text(), parse_constant=no_constants)
    result = read_result(tmp_path)
    assert np.float32(result["loss"]).tobytes() == np.float32(0.1).tobytes()
    assert np.isnan(result["nan"]) and result["worst"] == -np.inf
    assert (result["steps"], result["seeds"]) == (7, [1, 2])


WRITE_FOR_EVER = """
import itertools, sys
from foundry_jax.runfolder import write_json_atomic
for number in itertools.count():
    write_json_atomic(sys.argv[1], [number] * 20000, durable=False)
"""


def test_a_file_is_never_seen_half_written_even_after_kill_9(tmp_path):
    path = tmp_path / "x.json"
    write_json_atomic(path, [-1])
    process = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, str(path)], cwd=ROOT)
    seen, deadline = set(), time.monotonic() + 30
    while len(seen) < 8:
        assert time.monotonic() < deadline and process.poll() is None
        numbers = json.loads(path.read_text())
        assert len(set(numbers)) == 1
        seen.add(numbers[0])
    process.kill()
    process.wait()
    assert len(set(json.loads(path.read_text()))) == 1


def test_the_heartbeat_tells_step_and_time_at_most_every_few_seconds(tmp_path, monkeypatch):
    assert read_heartbeat(tmp_path) is None
    with RunFolder(tmp_path) as folder:
        folder.heartbeat(1)
        beat = read_heartbeat(tmp_path)
        assert beat["step"] == 1 and abs(beat["time"] - time.time()) < 5
        folder.heartbeat(2)
        assert read_heartbeat(tmp_path)["step"] == 1
        later = time.monotonic() + runfolder.HEARTBEAT_SECONDS
        monkeypatch.setattr(runfolder.time, "monotonic", lambda: later)
        folder.heartbeat(3)
        assert read_heartbeat(tmp_path)["step"] == 3


def test_data_windows_say_how_far_each_step_is_moved_also_after_a_restart(tmp_path):
    with RunFolder(tmp_path) as folder:
        assert folder.data_offset(10**9) == 0
        folder.add_data_window(30, 5)
        folder.add_data_window(60, 9)
        offsets = [folder.data_offset(step) for step in (0, 29, 30, 59, 60, 99)]
        assert offsets == [0, 0, 5, 5, 9, 9]
    with RunFolder(tmp_path) as folder:
        assert [folder.data_offset(step) for step in (0, 29, 30, 59, 60, 99)] == offsets
        folder.add_data_window(40, 12)  # a later roll-back overrules an earlier one
        assert [folder.data_offset(step) for step in (39, 40, 60)] == [5, 12, 12]
    assert json.loads((tmp_path / "data_windows.json").read_text()) == [[30, 5], [60, 9], [40, 12]]
    assert folder.num_rollbacks == 3


def test_the_other_processes_of_a_run_write_nothing(tmp_path):
    with RunFolder(tmp_path, primary=False) as folder:
        folder.write_config(CONFIG)
        folder.write_result({})
        folder.heartbeat(1)
        folder.add_data_window(3, 4)
        assert folder.data_offset(3) == 4
    assert list(tmp_path.iterdir()) == []


def test_looking_at_runs_needs_no_jax():
    script = "import sys, foundry_jax.runfolder; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_a_file_of_the_run_is_kept_whole_with_what_lies_beside_it_and_never_replaced(tmp_path):
    def save(text):
        def save(path):
            path.with_name("beside.json").write_text(text)
            path.write_text(text)

        return save

    def fail(path):
        path.write_text("half")
        raise UserError("no more")

    with RunFolder(tmp_path) as folder:
        with pytest.raises(UserError, match="no more"):
            folder.keep("a.json", fail)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        for text in ("one", "two"):
            folder.keep("a.json", save(text))
    assert {path.name: path.read_text() for path in tmp_path.glob("*.json")} == {"a.json": "one", "beside.json": "one"}
    with RunFolder(tmp_path, primary=False) as folder:
        folder.keep("b.json", save("three"))
    assert not (tmp_path / "b.json").exists()


def test_weights_that_are_not_trained_stay_the_same(tmp_path):
    with RunFolder(tmp_path) as folder:
        for name in ("here", "elsewhere"):
            folder.require_same_source(name, "3c0f")
        with pytest.raises(UserError, match="began with weights of here that are not those of there now"):
            folder.require_same_source("there", "11aa")
