"""A folder per key, built once, whole or not there at all, and checked each time it is opened.

<root>/<key>/meta.json        what build returned, and the sha256 of every file and of meta.json itself
<root>/<key>/...              what build wrote
<root>/<key>.lock, .building  the lock of the process that builds, and its unfinished folder
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from foundry_jax.data.hashing import sha256_file, sha256_json, sha256_unchanged
from foundry_jax.errors import MachineError

log = logging.getLogger(__name__)

SIDECAR = "meta.json"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A verified folder of the cache and what its build returned."""

    folder: Path
    facts: Mapping[str, Any]


class _DamagedError(Exception):
    """A folder of the cache is not what was written."""


def cache_root(cache_dir: str) -> Path:
    """Returns the folder of the token cache: in cache_dir, else $FOUNDRY_CACHE, else ~/.cache/foundry_jax."""
    root = cache_dir or os.environ.get("FOUNDRY_CACHE") or "~/.cache/foundry_jax"
    return Path(os.path.expanduser(root)) / "tokens"


def open_or_build(root: Path, spec: Mapping[str, Any], build: Callable[[Path], dict[str, Any]]) -> Entry:
    """Returns the entry of a spec; build(folder) writes its files and returns its facts, both only if need be.

    Of several processes at once one builds and the others wait for it. A damaged entry is built again.

    Raises:
        MachineError: the cache cannot be written.
    """
    folder = root / sha256_json(spec)[:32]
    with contextlib.suppress(_DamagedError):
        if entry := _open(folder):
            return entry
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_suffix(".lock")):
            return _open_again(folder) or _build(folder, spec, build)
    except OSError as error:
        raise MachineError(
            f"Cannot write the token cache {folder}: {error.strerror or error}; free some space, or set "
            f"data.cache_dir or FOUNDRY_CACHE to a folder that can be written."
        ) from error


def _open(folder: Path) -> Entry | None:
    """Returns the entry in a folder, None if there is no folder; reads every file (0.2 GB/s without SHA instructions).

    Raises:
        _DamagedError: a file is missing or has changed.
    """
    if not folder.is_dir():
        return None
    try:
        facts = json.loads((folder / SIDECAR).read_text("utf-8"))
        checksum = facts.pop("checksum")
        if checksum != sha256_json(facts):
            raise _DamagedError(f"{SIDECAR} has changed")
        for name, sha256 in facts["files"].items():
            if sha256_unchanged(folder / name) != sha256:
                raise _DamagedError(f"{name} has changed")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _DamagedError(repr(error)) from None
    return Entry(folder, facts)


def _open_again(folder: Path) -> Entry | None:
    """Returns the entry that another process may have built while this one waited for the lock."""
    try:
        return _open(folder)
    except _DamagedError as error:
        log.warning("The token cache %s is damaged (%s); building it again.", folder, error)
        return None


def _build(folder: Path, spec: Mapping[str, Any], build: Callable[[Path], dict[str, Any]]) -> Entry:
    """Returns a new entry, put in place by one rename after everything is on disk."""
    log.info("Building the token cache %s.", folder)
    unfinished = folder.with_suffix(".building")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
    unfinished.mkdir()
    try:
        facts = {**build(unfinished), "spec": spec}
        facts["files"] = {path.name: sha256_file(path) for path in sorted(unfinished.iterdir())}
        sidecar = json.dumps({**facts, "checksum": sha256_json(facts)}, indent=1)
        (unfinished / SIDECAR).write_text(sidecar, "utf-8")
        for path in (*unfinished.iterdir(), unfinished):
            _fsync(path)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one; who has it mapped keeps what is mapped
        unfinished.rename(folder)
        _fsync(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return Entry(folder, facts)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock that the kernel drops when this process ends, however it ends."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("Waiting for another process to finish %s.", path.with_suffix(""))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
