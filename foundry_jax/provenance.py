"""Where a number comes from: code, packages, devices."""

import importlib.metadata
import pathlib
import platform
import subprocess
from typing import Any

import jax

from foundry_jax.sharding import Plan

PACKAGES = ("foundry-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")


def environment(plan: Plan) -> dict[str, Any]:
    """Returns versions, git commit and devices, for result.json."""
    return {
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "git_commit": git_commit(),
        "device": jax.devices()[0].device_kind,
        "num_devices": plan.num_devices,
        "num_processes": jax.process_count(),
        "sharding": plan.strategy,
    }


def git_commit() -> str | None:
    """Returns the commit of this code, with "-dirty" if files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
