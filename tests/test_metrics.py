"""metrics.jsonl survives crashes and replays; trackers and displays never end a run."""

import io
import json
import math
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundry_jax import metrics
from foundry_jax.errors import UserError
from foundry_jax.metrics import MetricsWriter, Progress, device_peak_flops
from foundry_jax.runfolder import read_metrics


@pytest.fixture
def log(monkeypatch):
    lines = []
    monkeypatch.setattr(metrics.log, "warning", lambda text, *values: lines.append(text % values))
    return lines


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write_steps(path, steps, *, resume_step=0, scale=1.0):
    with MetricsWriter(path, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, "train", {"loss": scale * step})


def steps_of(path):
    return [row["step"] for row in read_metrics(path)]


def test_a_row_is_one_line_of_standard_json(path):
    with MetricsWriter(path, resume_step=0) as writer:
        writer.write(10, "train", {"loss": 3.25, "nan": math.nan, "inf": math.inf, "tokens": np.int64(7)})

    def no_constants(name):
        raise AssertionError(f"{name} is not standard JSON")

    text = path.read_text()
    assert text == '{"step": 10, "kind": "train", "loss": 3.25, "nan": "NaN", "inf": "Infinity", "tokens": 7}\n'
    json.loads(text, parse_constant=no_constants)
    (row,) = read_metrics(path)
    assert math.isnan(row.pop("nan")) and row.pop("inf") == math.inf
    assert row == {"step": 10, "kind": "train", "loss": 3.25, "tokens": 7}


def test_float32_comes_back_bit_for_bit(path):
    bits = np.random.default_rng(0).integers(0, 2**32, 300, dtype=np.uint32)
    values = [x for x in bits.view(np.float32) if np.isfinite(x)] + [np.float32(1e-45), np.float32(-0.0)]
    with MetricsWriter(path, resume_step=0) as writer:
        for step, value in enumerate(values):
            writer.write(step, "train", {"numpy": value, "jax": jnp.float32(value)})
    rows = read_metrics(path)
    for name in ("numpy", "jax"):
        found = np.array([row[name] for row in rows], np.float32)
        keep = np.abs(np.array(values)) >= np.finfo(np.float32).tiny  # JAX flushes smaller ones to zero
        keep |= name == "numpy"
        np.testing.assert_array_equal(found[keep].view(np.uint32), np.array(values)[keep].view(np.uint32))


def test_kinds_can_be_read_apart(path):
    with MetricsWriter(path, resume_step=0) as writer:
        writer.write(1, "train", {"loss": 1.0})
        writer.write(1, "eval", {"loss": 2.0})
    assert [row["loss"] for row in read_metrics(path, "eval")] == [2.0]
    assert len(read_metrics(path)) == 2


def test_a_row_is_on_disk_as_soon_as_it_is_written(path):
    with MetricsWriter(path, resume_step=0) as writer:
        writer.write(1, "train", {"loss": 1.0})
        assert steps_of(path) == [1]


def test_kill_9_loses_no_row(path):
    script = (
        "import os, sys; from foundry_jax.metrics import MetricsWriter; w = MetricsWriter(sys.argv[1], resume_step=0); "
        "[w.write(s, 'train', {'loss': 1.0}) for s in range(5)]; os.kill(os.getpid(), 9)"
    )
    root = pathlib.Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", script, str(path)], cwd=root).returncode == -9
    assert steps_of(path) == [0, 1, 2, 3, 4]


def test_a_torn_last_line_is_skipped_by_readers_and_cut_off_by_the_next_writer(path):
    write_steps(path, [1, 2, 3])
    os.truncate(path, path.stat().st_size - 5)
    assert steps_of(path) == [1, 2]
    write_steps(path, [3, 4], resume_step=2)
    assert steps_of(path) == [1, 2, 3, 4]


def test_replayed_steps_are_not_doubled(path):
    write_steps(path, [1, 2, 3, 4, 5])
    write_steps(path, [4, 5, 6], resume_step=3, scale=10.0)
    assert [row["loss"] for row in read_metrics(path)] == [1.0, 2.0, 3.0, 40.0, 50.0, 60.0]
    write_steps(path, [1], resume_step=0)
    assert steps_of(path) == [1]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_rolling_back_while_the_run_goes_on_drops_the_undone_rows(path):
    with MetricsWriter(path, resume_step=0) as writer:
        for step in (1, 2, 3):
            writer.write(step, "train", {"loss": math.nan})
        writer.rewind(1)
        writer.write(2, "train", {"loss": 2.0})
    assert steps_of(path) == [1, 2]


def test_the_other_processes_of_a_run_write_nothing(path):
    write_steps(path, [1, 2, 3])
    with MetricsWriter(path, resume_step=1, trackers="wandb", primary=False) as writer:
        writer.write(2, "train", {"loss": 0.0})
        writer.rewind(1)
    assert steps_of(path) == [1, 2, 3] and [p.name for p in path.parent.iterdir()] == [path.name]


def test_damage_inside_the_file_is_named_by_line(path):
    write_steps(path, [1, 2])
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(UserError, match="metrics.jsonl, line 1 is not JSON"):
        read_metrics(path)
    with pytest.raises(UserError, match="line 1 is not JSON"):
        MetricsWriter(path, resume_step=0)
    with pytest.raises(UserError, match="No metrics at"):
        read_metrics(path.parent / "no")


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small file system here: {error}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_rows_wait_while_the_disk_is_full_and_none_is_torn(small_disk, log):
    path, ballast = small_disk / "metrics.jsonl", small_disk / "ballast"
    ballast.write_bytes(bytes(8192))
    with MetricsWriter(path, resume_step=0) as writer:
        for step in range(200):
            writer.write(step, "train", {"loss": 1 / 3})
        written = steps_of(path)
        assert 0 < len(written) < 200 and path.read_bytes().endswith(b"\n")
        ballast.unlink()
        writer.write(200, "train", {"loss": 1.0})
    assert steps_of(path) == list(range(201))
    assert len(log) == 1 and "wait in memory" in log[0]


# --- trackers ------------------------------------------------------------------------------------


class Recorder:
    """A tracker that notes its calls and raises where it is told to."""

    def __init__(self, folder, step, fails=()):
        self.calls, self.fails = [("init", folder, step)], fails
        self._note("factory")

    def _note(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name in self.fails:
            raise ConnectionError(f"{name} failed\nbadly")

    def config(self, values):
        self._note("config", values)

    def scalars(self, step, kind, values):
        self._note("scalars", step, kind, values)

    def summary(self, values):
        self._note("summary", values)

    def close(self):
        self._note("close")


def run_with(path, trackers):
    with MetricsWriter(path, resume_step=0, trackers=trackers) as writer:
        writer.config({"seed": 0})
        writer.write(1, "train", {"loss": jnp.float32(0.5)})
        writer.write(2, "train", {"loss": 0.25})
        writer.summary({"loss": 0.25})


def test_trackers_are_told_everything_in_order(path, monkeypatch, log):
    made = []
    monkeypatch.setitem(metrics.TRACKERS, "fake", lambda *a: made.append(Recorder(*a)) or made[-1])
    run_with(path, " fake ,")
    assert made[0].calls == [
        ("init", path.parent, 0),
        ("factory",),
        ("config", {"seed": 0}),
        ("scalars", 1, "train", {"loss": 0.5}),
        ("scalars", 2, "train", {"loss": 0.25}),
        ("summary", {"loss": 0.25}),
        ("close",),
    ]
    assert log == []


@pytest.mark.parametrize("method", ["factory", "config", "scalars", "summary", "close"])
def test_a_failing_tracker_is_dropped_with_one_warning_and_hurts_nobody(path, monkeypatch, log, method):
    good = []
    monkeypatch.setitem(metrics.TRACKERS, "bad", lambda *a: Recorder(*a, fails=(method,)))
    monkeypatch.setitem(metrics.TRACKERS, "good", lambda *a: good.append(Recorder(*a)) or good[-1])
    run_with(path, "bad,good")
    assert log == [f"Tracker bad is off for the rest of this run: ConnectionError: {method} failed badly"]
    assert len(good[0].calls) == 7 and steps_of(path) == [1, 2]


def test_an_unknown_tracker_is_refused_with_the_choices(path):
    with pytest.raises(UserError, match="Unknown tracker 'wandbb'. Did you mean 'wandb'"):
        MetricsWriter(path, resume_step=0, trackers="wandbb")


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_extra_is_named(path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)  # import raises, installed or not
    with pytest.raises(UserError, match=rf"pip install 'foundry-jax\[{name}\]'"):
        MetricsWriter(path, resume_step=0, trackers=name)


def test_tensorboard_gets_scalars_by_kind_and_forgets_replayed_steps(path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, **options):
            calls.append(options)

        def __getattr__(self, name):
            return lambda *arguments: calls.append((name, *arguments))

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    write = MetricsWriter(path, resume_step=7, trackers="tensorboard")
    write.config({"seed": 0})
    write.write(8, "eval", {"loss": 0.5})
    write.close()
    assert calls[0] == {"logdir": str(path.parent / "tensorboard"), "purge_step": 8}
    assert calls[1:] == [("add_text", "config", "    seed = 0", 0), ("add_scalar", "eval/loss", 0.5, 8), ("close",)]


def test_wandb_continues_the_same_run_after_a_restart(path, monkeypatch):
    started, logged = [], []
    run = types.SimpleNamespace(
        config=types.SimpleNamespace(update=lambda *a, **k: None),
        summary={},
        log=lambda values, step: logged.append((values, step)),
        finish=lambda: None,
    )
    fake = types.SimpleNamespace(init=lambda **options: started.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        run_with(path, "wandb")
    assert started[0]["id"] == started[1]["id"] and len(started[0]["id"]) == 32
    assert started[0]["resume"] == "allow"
    assert logged[0] == ({"train/loss": 0.5}, 1) and run.summary == {"loss": 0.25}


# --- progress ------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


VALUES = {"loss": 3.21116, "learning_rate": 6e-4, "tokens_per_second": 12345.6, "mfu": 0.412, "other": 1.0}


def clock(monkeypatch, *times):
    times = list(times)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: times.pop(0))


def test_without_a_terminal_each_update_is_one_plain_line(monkeypatch):
    clock(monkeypatch, 0.0, 3.8)
    stream = io.StringIO()
    with Progress(5000, stream=stream) as progress:
        progress.update(100, VALUES)
        progress.line("eval 100 loss 3.1")
    line = "step 100/5000 loss 3.2112 lr 6.0e-04 12.3k tok/s mfu 41% eta 0:03:06\n"
    assert stream.getvalue() == line + "eval 100 loss 3.1\n"


def test_what_is_not_known_is_not_shown(monkeypatch):
    clock(monkeypatch, 0.0, 1.0)
    stream = io.StringIO()
    with Progress(10, stream=stream) as progress:
        progress.update(0, {"loss": jnp.float32(math.nan), "mfu": None})
    assert stream.getvalue() == "step 0/10 loss nan eta -\n"


def test_the_eta_forgets_the_compilation(monkeypatch):
    clock(monkeypatch, 0.0, *(1000.0 + step for step in range(1, 41)))
    stream = io.StringIO()
    progress = Progress(100, stream=stream)
    for step in range(1, 41):
        progress.update(step, {})
    first, *_, last = stream.getvalue().splitlines()
    assert first == "step 1/100 eta 1 day, 3:31:39" and last == "step 40/100 eta 0:01:00"


def test_quiet_is_quiet():
    for stream in (io.StringIO(), Terminal()):
        with Progress(10, quiet=True, stream=stream) as progress:
            progress.update(1, VALUES)
            progress.line("text")
        assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_with_the_same_numbers(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    stream = Terminal()
    with Progress(5000, step=40, stream=stream) as progress:
        progress.update(100, VALUES)
        progress.line("eval [100] loss 3.1")
    shown = stream.getvalue()
    assert "100/5000" in shown and "loss 3.2112 lr 6.0e-04 12.3k tok/s mfu 41% eta" in shown
    assert "eval [100] loss 3.1" in shown


# --- peak FLOP/s ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "half", "full"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 494e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA H200", 989e12, 494e12),
        ("NVIDIA L4", 121e12, 60.5e12),
        ("NVIDIA L40S", 362e12, 183e12),
        ("NVIDIA A10G", 70e12, 35e12),
        ("Tesla T4", 65e12, 8.1e12),
        ("Tesla V100-SXM2-16GB", 125e12, 15.7e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("TPU v2", 23e12, 23e12),
        ("TPU v4", 275e12, 275e12),
        ("TPU v5 lite", 197e12, 197e12),
        ("TPU v5p", 459e12, 459e12),
        ("TPU v5", 459e12, 459e12),
        ("TPU v6 lite", 918e12, 918e12),
        ("TPU7x", 1153.5e12, 1153.5e12),
        ("NVIDIA Something New", None, None),
        ("NVIDIA L400", None, None),
    ],
)
def test_peak_flops_follow_the_device_kind_and_dtype(kind, half, full):
    device = types.SimpleNamespace(platform="tpu" if "TPU" in kind else "gpu", device_kind=kind)
    assert (device_peak_flops(device, jnp.bfloat16), device_peak_flops(device, jnp.float32)) == (half, full)


def test_peak_flops_of_a_cpu_are_measured_once():
    device = jax.devices("cpu")[0]
    assert device_peak_flops(device, jnp.float32) == device_peak_flops(device, np.float32)


def matmul_flops(size):
    """Returns the best FLOP/s per device of ten of XLA's matrix products."""
    matmul = jax.jit(lambda x_NN: x_NN @ x_NN)
    x_NN = jnp.ones((size, size))
    matmul(x_NN).block_until_ready()
    best = math.inf
    for _ in range(10):
        start = metrics.time.perf_counter()
        matmul(x_NN).block_until_ready()
        best = min(best, metrics.time.perf_counter() - start)
    return 2 * size**3 / best / len(jax.devices("cpu"))


def test_peak_flops_of_a_cpu_are_what_xlas_matmul_of_another_size_reaches():
    """Other tests share these cores, and a tenth of a second may fall to them whole: one of 20 attempts must agree."""
    ratios = []
    for _ in range(20):
        metrics._measured_flops.cache_clear()
        ratios.append(device_peak_flops(jax.devices("cpu")[0], jnp.float32) / matmul_flops(768))
        if 0.2 < ratios[-1] < 5:
            return
    pytest.fail(f"peak / reached was {ratios}")
