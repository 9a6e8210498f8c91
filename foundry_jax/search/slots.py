"""Which part of this machine each of several processes may use: equal shares, so it does not matter who gets which.

Imports no JAX, which would take hold of the devices itself.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import subprocess
from collections.abc import Mapping, Sequence

from foundry_jax.schema import require

# What libtpu must be told for a process that has so many chips of a host for itself.
TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1"}
SHARED_GPU_MEMORY = 0.9  # of a GPU, for all processes on it together


@dataclasses.dataclass(frozen=True)
class Slot:
    """A part of the machine.

    environment: what a process there has besides the environment of this one. cores: () for all.
    """

    index: int
    environment: Mapping[str, str]
    cores: tuple[int, ...]


def divide(number: int, environment: Mapping[str, str] = os.environ) -> list[Slot]:
    """Returns so many equal parts of the accelerators that are visible, and of this process's cores.

    More slots than GPUs or cores: several share one, and of a GPU each gets its share of the memory.

    Raises:
        UserError: number is less than 1, or more than there are TPU chips, which cannot be shared.
    """
    require(number >= 1, f"jobs={number} must be at least 1.")
    devices = _device_settings(number, environment)
    cores = shares(_cores(), number) if number > 1 else [()]
    return [Slot(index, devices[index], tuple(map(int, cores[index]))) for index in range(number)]


def shares(things: Sequence, number: int) -> list[tuple]:
    """Returns equal shares of some things; if they are too few, each share is one thing that others have, too.

    What does not divide stays unused: with a share of another size a run would not come to the same bits.
    """
    size = len(things) // number
    if size == 0:
        return [(things[index % len(things)],) for index in range(number)]
    return [tuple(things[index * size : (index + 1) * size]) for index in range(number)]


def _device_settings(number: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    platforms = environment.get("JAX_PLATFORMS", "")
    if number == 1 or platforms == "cpu":
        return [{}] * number
    if platforms in ("", "cuda", "gpu") and (gpus := _gpus(environment)):
        return _gpu_settings(gpus, number, environment)
    if platforms in ("", "tpu") and (chips := _tpu_chips(environment)):
        return _tpu_settings(chips, number)
    return [{}] * number


def _gpu_settings(gpus: Sequence[str], number: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    settings = [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares(gpus, number)]
    known = {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & environment.keys()
    if number > len(gpus) and not known:
        fraction = SHARED_GPU_MEMORY / -(-number // len(gpus))
        settings = [one | {"XLA_CLIENT_MEM_FRACTION": f"{fraction:.3f}"} for one in settings]
    return settings


def _tpu_settings(chips: Sequence[str], number: int) -> list[dict[str, str]]:
    require(
        number <= len(chips), f"jobs={number}, but there are {len(chips)} TPU chips, and no two processes share one."
    )
    size = len(chips) // number
    require(
        size in TPU_BOUNDS, f"jobs={number} would give each {size} of {len(chips)} TPU chips; try jobs={len(chips)}."
    )
    bounds = {"TPU_CHIPS_PER_PROCESS_BOUNDS": TPU_BOUNDS[size], "TPU_PROCESS_BOUNDS": "1,1,1"}
    return [bounds | {"TPU_VISIBLE_CHIPS": ",".join(share)} for share in shares(chips, number)]


def _gpus(environment: Mapping[str, str]) -> list[str]:
    """Returns the ids of the NVIDIA GPUs that CUDA would show."""
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name.strip()]
    return list(_listed_gpus())


@functools.cache
def _listed_gpus() -> tuple[str, ...]:
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(found.stdout.split()) if found.returncode == 0 else ()


def _tpu_chips(environment: Mapping[str, str]) -> list[str]:
    if visible := environment.get("TPU_VISIBLE_CHIPS"):
        return visible.split(",")
    if importlib.util.find_spec("libtpu") is None:
        return []
    files = [*pathlib.Path("/dev").glob("accel*"), *pathlib.Path("/dev/vfio").glob("*")]
    return [str(index) for index in range(sum(bool(re.search(r"\d$", file.name)) for file in files))]


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
