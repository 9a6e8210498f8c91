"""What a run reports while it trains: metrics.jsonl, optional trackers, a progress line, peak FLOP/s.

    {"step": 10, "kind": "train", "loss": 3.211234, "learning_rate": 0.0006}

One JSON object a line, appended and flushed; a number that is not finite is written as "NaN",
"Infinity" or "-Infinity", which standard JSON lacks. runfolder.read_metrics gives floats back, bit for bit.
"""

import collections
import datetime
import functools
import importlib
import json
import logging
import math
import os
import pathlib
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress

from foundry_jax.errors import UserError
from foundry_jax.registry import lookup
from foundry_jax.runfolder import encode_json, metric_rows

log = logging.getLogger(__name__)

CPU_MEASURE_SECONDS = 0.1
CPU_MEASURE_SIZE = 512


class Tracker(Protocol):
    """Where metrics go besides metrics.jsonl. Built by factory(run folder, restored step)."""

    def config(self, values: Mapping[str, Any]) -> None:
        """Takes the run's flat config."""

    def scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Takes one row."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Takes the run's result."""

    def close(self) -> None:
        """Sends what is still held back."""


class TensorBoard:
    """Event files in <run folder>/tensorboard, written by tensorboardX (no TensorFlow)."""

    def __init__(self, folder: pathlib.Path, step: int):
        # purge_step hides the rows of steps that are about to be replayed
        self._writer = _optional("tensorboardX", "tensorboard").SummaryWriter(
            logdir=str(folder / "tensorboard"), purge_step=step + 1
        )

    def config(self, values: Mapping[str, Any]) -> None:
        text = "\n".join(f"    {key} = {value}" for key, value in values.items())
        self._writer.add_text("config", text, 0)

    def scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._writer.add_text("result", json.dumps(encode_json(values)), 0)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """One Weights & Biases run per run folder, continued on resume; WANDB_MODE and the like apply."""

    def __init__(self, folder: pathlib.Path, step: int):
        wandb = _optional("wandb", "wandb")
        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            project="foundry_jax", name=folder.name, dir=str(folder), id=id_file.read_text(), resume="allow"
        )

    def config(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[pathlib.Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
}


class MetricsWriter:
    """Appends rows to metrics.jsonl and passes them on to the trackers named in log.trackers.

    Neither a full disk nor a failing tracker ends the run: rows wait in memory until the disk takes
    them, and a tracker that raises is dropped with one warning.
    """

    def __init__(self, path: str | os.PathLike, *, resume_step: int, trackers: str = "", primary: bool = True):
        """Opens the file for a run restored at that step (0: a fresh one), dropping rows after it.

        With primary=False (any process of a multi-process run but the first) nothing is written.

        Raises:
            UserError: an unknown tracker, one whose extra is not installed, or a damaged file.
        """
        self._path = pathlib.Path(path if primary else os.devnull)
        _drop_after(self._path, resume_step)
        names = [name.strip() for name in trackers.split(",") if name.strip() and primary]
        factories = {name: lookup(TRACKERS, name, "tracker") for name in names}
        self._trackers = [
            _Guarded(name, factory, self._path.parent, resume_step) for name, factory in factories.items()
        ]
        self._waiting: list[bytes] = []
        self._warned = False
        self._open()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Appends one row; values are numbers or zero-dimensional arrays."""
        values = {name: _number(value) for name, value in values.items()}
        row = json.dumps(encode_json({"step": step, "kind": kind, **values}), allow_nan=False)
        self._waiting.append(row.encode() + b"\n")
        self._write_waiting()
        self._tell("scalars", step, kind, values)

    def config(self, values: Mapping[str, Any]) -> None:
        """Gives the run's flat config to the trackers."""
        self._tell("config", values)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Gives the run's result to the trackers."""
        self._tell("summary", values)

    def rewind(self, step: int) -> None:
        """Drops the rows after that step, because the run was rolled back to it."""
        self._file.close()
        _drop_after(self._path, step)
        self._open()

    def close(self) -> None:
        """Writes what is left and closes file and trackers; rows the disk still refuses are lost."""
        if self._file.closed:
            return
        self._write_waiting()
        if self._waiting:
            log.warning("%d last rows of %s are lost: disk full.", len(self._waiting), self._path)
        self._file.close()
        self._tell("close")

    def _open(self) -> None:
        # unbuffered: a row is with the kernel when write() returns, so kill -9 loses none
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115

    def _write_waiting(self) -> None:
        data = b"".join(self._waiting)
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(data) == len(data):
                self._waiting.clear()
                return
            reason = "disk full"
        except OSError as error:
            reason = error.strerror
        self._file.truncate(end)
        if not self._warned:
            log.warning("Rows of %s wait in memory: %s.", self._path, reason)
        self._warned = True

    def _tell(self, method: str, *arguments: Any) -> None:
        for tracker in self._trackers:
            tracker.tell(method, *arguments)


class _Guarded:
    """A tracker that is dropped with one warning, once, when it raises."""

    def __init__(self, name: str, factory: Callable[[pathlib.Path, int], Tracker], *arguments: Any):
        self._name = name
        self._tracker: Tracker | None = None
        try:
            self._tracker = factory(*arguments)
        except UserError:
            raise
        except Exception as error:  # foreign code: no login, no network, a full disk, a bug
            self._drop(error)

    def tell(self, method: str, *arguments: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*arguments)
        except Exception as error:  # as above; the run matters more than its display
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        self._tracker = None
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        log.warning("Tracker %s is off for the rest of this run: %s", self._name, reason)


def _drop_after(path: pathlib.Path, step: int) -> None:
    """Rewrites the file, atomically, without rows after that step and without a torn last line."""
    if not path.exists():
        return
    kept = b"".join(line for line, row in metric_rows(path) if row["step"] <= step)
    if len(kept) == path.stat().st_size:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _number(value: Any) -> float | int:
    return value.item() if hasattr(value, "item") else value


def _optional(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"Tracker {extra!r} needs {module} ({error}): pip install 'foundry-jax[{extra}]', "
            f"or take it out of log.trackers."
        ) from error


class Progress:
    """Shows how training goes: a live bar on a terminal, one line per update elsewhere.

    step 100/5000 loss 3.2112 lr 6.0e-04 12.3k tok/s mfu 41% eta 0:03:10
    """

    def __init__(self, num_steps: int, *, step: int = 0, quiet: bool = False, stream: TextIO | None = None):
        """Starts at a (restored) step; quiet shows nothing. The stream is stderr unless given."""
        self._num_steps = num_steps
        self._quiet = quiet
        self._stream = stream or sys.stderr
        self._clock = collections.deque([(step, time.monotonic())], maxlen=20)
        self._bar: rich.progress.Progress | None = None
        if not quiet and self._stream.isatty():
            self._bar = _start_bar(self._stream, num_steps, step)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows loss, learning_rate, tokens_per_second and mfu (a fraction), those that are given."""
        self._clock.append((step, time.monotonic()))
        status = " ".join([*_status(values), f"eta {self._eta(step)}"])
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, status=status)
        elif not self._quiet:
            print(f"step {step}/{self._num_steps} {status}", file=self._stream, flush=True)

    def line(self, text: str) -> None:
        """Prints one line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self._quiet:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()

    def _eta(self, step: int) -> str:
        # over the last 20 updates, so that compilation does not weigh on it for ever
        first_step, first_time = self._clock[0]
        if step <= first_step:
            return "-"
        rate = (self._clock[-1][1] - first_time) / (step - first_step)
        return str(datetime.timedelta(seconds=round(rate * (self._num_steps - step))))


def _start_bar(stream: TextIO, num_steps: int, step: int) -> rich.progress.Progress:
    bar = rich.progress.Progress(
        rich.progress.TextColumn("step"),
        rich.progress.MofNCompleteColumn(),
        rich.progress.BarColumn(bar_width=20),
        rich.progress.TextColumn("{task.fields[status]}", markup=False),
        console=rich.console.Console(file=stream),
    )
    bar.start()
    bar.add_task("train", total=num_steps, completed=step, status="compiling")
    return bar


def _status(values: Mapping[str, Any]) -> list[str]:
    shown = {
        "loss": lambda x: f"loss {x:.4f}",
        "learning_rate": lambda x: f"lr {x:.1e}",
        "tokens_per_second": lambda x: f"{_short(x)} tok/s",
        "mfu": lambda x: f"mfu {x:.0%}",
    }
    return [show(float(values[name])) for name, show in shown.items() if values.get(name) is not None]


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


# Dense peak FLOP/s of one JAX device at 16 bit and, for matmuls of float32 at JAX's default
# precision, at 32 bit: TF32 on NVIDIA from Ampere on, bfloat16 passes on TPU. Vendors' published
# numbers; NVIDIA's sheets print twice these, "with sparsity". First match in device_kind wins.
# TPU v2, v3 and 7x show each of a chip's two cores as a device, so theirs is half a chip.
_T = 1e12
PEAK_FLOPS: Sequence[tuple[str, float, float]] = (
    (r"GB200|B200", 2250 * _T, 1125 * _T),
    (r"H100 PCIe", 756 * _T, 378 * _T),
    (r"H100 NVL", 835 * _T, 417 * _T),
    (r"H100|H200|GH200|H800", 989 * _T, 494 * _T),
    (r"A100|A800", 312 * _T, 156 * _T),
    (r"A10G", 70 * _T, 35 * _T),
    (r"A10", 125 * _T, 62.5 * _T),
    (r"A40", 149.7 * _T, 74.8 * _T),
    (r"A6000", 154.8 * _T, 77.4 * _T),
    (r"L4", 121 * _T, 60.5 * _T),
    (r"L40S", 362 * _T, 183 * _T),
    (r"L40", 181 * _T, 90.5 * _T),
    (r"T4", 65 * _T, 8.1 * _T),
    (r"V100", 125 * _T, 15.7 * _T),
    (r"RTX 3090", 71 * _T, 35.6 * _T),
    (r"RTX 4090", 165.2 * _T, 82.6 * _T),
    (r"RTX 5090", 209.5 * _T, 104.8 * _T),
    (r"TPU v2", 23 * _T, 23 * _T),
    (r"TPU v3", 61.5 * _T, 61.5 * _T),
    (r"TPU v4", 275 * _T, 275 * _T),
    (r"TPU v5 ?(lite|e)", 197 * _T, 197 * _T),
    (r"TPU v5p?", 459 * _T, 459 * _T),
    (r"TPU v6 ?(lite|e)", 918 * _T, 918 * _T),
    (r"TPU ?v?7x?", 1153.5 * _T, 1153.5 * _T),
)


def device_peak_flops(device: jax.Device, dtype: Any) -> float | None:
    """Returns the most FLOP/s a matmul of that dtype can reach on one device; None if unknown.

    On CPU it is measured (0.2 s, once per process) and shared between the CPU devices, which are one
    machine. Elsewhere it is the vendor's number.
    """
    dtype = jnp.dtype(dtype)
    if device.platform == "cpu":
        return _measured_flops()
    for pattern, half, full in PEAK_FLOPS:
        if re.search(rf"\b({pattern})\b", device.device_kind):
            return half if dtype.itemsize == 2 else full
    return None


@functools.cache
def _measured_flops() -> float:
    """Returns the FLOP/s of NumPy's float32 matrix product, which knows nothing of meshes and compiles nothing."""
    x_NN = np.ones((CPU_MEASURE_SIZE, CPU_MEASURE_SIZE), np.float32)
    best, start = math.inf, time.perf_counter()
    while (now := time.perf_counter()) - start < CPU_MEASURE_SECONDS:
        np.dot(x_NN, x_NN)
        best = min(best, time.perf_counter() - now)
    return 2 * CPU_MEASURE_SIZE**3 / best / len(jax.devices("cpu"))
