"""One run's folder: who may write to it, its config, its result, its heartbeat.

    runs/x/.lock               held by the process that trains there
    runs/x/config.json         {"seed": 0, "model.num_layers": 4, ...}
    runs/x/checkpoints/        see checkpoint.py
    runs/x/metrics.jsonl       see metrics.py
    runs/x/source.json         {"name": "models/llama", "fingerprint": "3c0f..."}: what adapters are trained on
    runs/x/tokenizer.json      what the run's tokens mean
    runs/x/heartbeat.json      {"step": 120, "time": 1763800000.0}
    runs/x/data_windows.json   [[500, 37]]: from step 500 on, batches are read 37 further along
    runs/x/validation_blocks.json  {"nats": [..], "targets": [..], "bytes": 81920}: each validation sequence, in the end
    runs/x/result.json         written once, at the end

Imports no JAX, so that tools which only look at runs start quickly.
"""

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import pathlib
import socket
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from foundry_jax.errors import MachineError, UserError

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0  # a stalled run is looked for in minutes, so fewer writes lose nothing

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}  # Lustre without -o flock, some FUSE mounts
_ABSENT = object()


class RunFolder:
    """The folder of the run that this process trains; nobody else may write to it until close().

    With primary=False (any process of a multi-process run but the first) it is read, never written.
    """

    def __init__(self, path: str | os.PathLike, *, primary: bool = True):
        """Creates the folder if need be and takes its lock.

        Raises:
            UserError: another process holds the folder, or it cannot be written to.
        """
        self.path = pathlib.Path(path).absolute()
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self._primary = primary
        self._last_beat = -math.inf
        self._warned = False
        self._lock = _take_lock(self.path) if primary else None
        self._windows = _read_json(self.path / "data_windows.json") or []

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the folder back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write_config(self, flat: Mapping[str, Any], operational: Collection[str] = ()) -> None:
        """Stores the flat config on first use; later only operational keys may differ from it.

        Args:
            flat: {dotted key: value}.
            operational: keys and sections ("log", "log." or "log.*") that do not change the result.

        Raises:
            UserError: any other key differs; lists them all.
        """
        path = self.path / "config.json"
        new = json.loads(_dumps(flat))
        old = _read_json(path)
        changes = {} if old is None else _differences(old, new)
        refused = [text for key, text in changes.items() if not _covers(operational, key)]
        if refused:
            raise UserError(
                f"{self.path} holds a run with another config: {'; '.join(refused)}. "
                f"Use another --workdir, or set these back."
            )
        for text in changes.values():
            log.info("Config of %s: %s", self.path, text)
        if old is None or changes:
            self._write(path, new)

    def write_result(self, values: Mapping[str, Any]) -> None:
        """Stores the run's result, replacing an earlier one."""
        self._write(self.path / "result.json", values)

    def write_validation_blocks(self, nats: Sequence[float], targets: Sequence[float], num_bytes: int | None) -> None:
        """Stores what each validation sequence cost in the end: nats and number of targets; and the text's bytes."""
        self._write(
            self.path / "validation_blocks.json", {"nats": list(nats), "targets": list(targets), "bytes": num_bytes}
        )

    def require_same_source(self, name: str, fingerprint: str) -> None:
        """Notes what the parameters that are not trained were read from, so that a resumed run reads the same.

        Raises:
            UserError: it began with others.
        """
        path = self.path / "source.json"
        old = _read_json(path)
        if old is None:
            self._write(path, {"name": name, "fingerprint": fingerprint})
        elif old.get("fingerprint") != fingerprint:
            raise UserError(
                f"{self.path} began with weights of {old.get('name')} that are not those of {name} now: put them back, "
                f"or use another --workdir."
            )

    def keep(self, name: str, save: Callable[[pathlib.Path], None]) -> None:
        """Has `save` write a file that belongs to the run, and others beside it, unless the file is there already."""
        if not self._primary or (self.path / name).exists():
            return
        with _explained(self.path), tempfile.TemporaryDirectory(prefix=f".{name}.", dir=self.path) as folder:
            save(pathlib.Path(folder) / name)
            for path in sorted(pathlib.Path(folder).iterdir(), key=lambda path: path.name == name):  # it comes last
                fsync(path)
                os.replace(path, self.path / path.name)

    def heartbeat(self, step: int) -> None:
        """Notes that the run is alive and at which step; cheap, so call it every step."""
        now = time.monotonic()
        if not self._primary or now - self._last_beat < HEARTBEAT_SECONDS:
            return
        self._last_beat = now
        try:
            write_json_atomic(self.path / "heartbeat.json", {"step": step, "time": time.time()}, durable=False)
        except OSError as error:  # a full disk must not end a run that may outlive it
            if not self._warned:
                log.warning("No heartbeat in %s: %s", self.path, error.strerror)
            self._warned = True

    def add_data_window(self, from_step: int, offset: int) -> None:
        """Notes a roll-back to that step, from which on batches are read `offset` further along the data."""
        self._windows = [*self._windows, [from_step, offset]]
        self._write(self.path / "data_windows.json", self._windows)

    def data_offset(self, step: int) -> int:
        """Returns how many batches further along the data this step reads; 0 in an untroubled run.

        A later roll-back overrules an earlier one from its own step on.
        """
        offsets = [offset for from_step, offset in self._windows if from_step <= step]
        return offsets[-1] if offsets else 0

    @property
    def num_rollbacks(self) -> int:
        """How often the run was rolled back."""
        return len(self._windows)

    def _write(self, path: pathlib.Path, value: Any) -> None:
        if self._primary:
            with _explained(self.path):
                write_json_atomic(path, value)


def read_config(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Returns the flat config of a run, or None if it never started."""
    return _read_json(pathlib.Path(folder) / "config.json")


def read_result(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Returns the result of a run, or None if it has not finished."""
    return _read_json(pathlib.Path(folder) / "result.json", decode=True)


def read_validation_blocks(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Returns {"nats", "targets", "bytes"}: two numbers of each validation sequence; None if the run has none yet."""
    return _read_json(pathlib.Path(folder) / "validation_blocks.json")


def read_heartbeat(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Returns {"step", "time"} (seconds since 1970) of a run's last sign of life, or None."""
    return _read_json(pathlib.Path(folder) / "heartbeat.json")


def read_metrics(path: str | os.PathLike, kind: str | None = None) -> list[dict[str, Any]]:
    """Returns the rows, oldest first, of one kind or all; a torn last line is skipped.

    Raises:
        UserError: no such file, or a line before the last is not JSON.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"No metrics at {path}; name a run folder's metrics.jsonl.")
    rows = [row for _, row in metric_rows(path)]
    return [row for row in rows if kind in (None, row["kind"])]


def metric_rows(path: str | os.PathLike) -> list[tuple[bytes, dict[str, Any]]]:
    """Returns [(line with its newline, row)] of all whole lines."""
    *lines, _torn = pathlib.Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON; delete that line.") from error
        rows.append((line + b"\n", {"kind": row.pop("kind"), **decode_json(row)}))
    return rows


def write_json_atomic(path: str | os.PathLike, value: Any, *, durable: bool = True) -> None:
    """Replaces a file by value as JSON: readers and crashes see the old file or the new one, whole.

    With durable=False it survives a crash of the process, but perhaps not of the machine.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(_dumps(value) + "\n")
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync(path.parent)


def fsync(path: str | os.PathLike) -> None:
    """Makes a file's content, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def encode_json(value: Any) -> Any:
    """Returns value as standard JSON can hold it: array scalars as numbers, NaN and Inf as text.

    Every float32 and float64 comes back from decode_json bit for bit (NaN payloads aside).
    """
    if isinstance(value, Mapping):
        return {str(key): encode_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode_json(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def decode_json(value: Any) -> Any:
    """Returns what encode_json was given, with "NaN", "Infinity" and "-Infinity" as floats again."""
    if isinstance(value, dict):
        return {key: decode_json(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [decode_json(inner) for inner in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def _dumps(value: Any) -> str:
    return json.dumps(encode_json(value), indent=1, allow_nan=False)


def _read_json(path: pathlib.Path, *, decode: bool = False) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore it or delete the run.") from error
    return decode_json(value) if decode else value


def _take_lock(folder: pathlib.Path) -> int:
    """Returns an open descriptor that holds the folder's lock; the kernel frees it if we die."""
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _flock(lock, folder)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
        except BaseException:
            os.close(lock)
            raise
    return lock


def _flock(lock: int, folder: pathlib.Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(lock, 300, 0).decode(errors="replace") or "unknown"
        raise MachineError(
            f"{folder} is in use by process {holder}; wait for it, stop it, or use another --workdir."
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s is on a file system without locks: start no second run in it.", folder)


@contextlib.contextmanager
def _explained(folder: pathlib.Path) -> Iterator[None]:
    """Turns the operating system's refusal to write into one line that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = "free space or raise the quota" if full else "choose a --workdir you can write to"
        raise MachineError(f"Cannot write to {folder}: {error.strerror}; {cure}.") from error


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Returns {key: "key: was A, now B"} of every key whose value differs."""
    changes = {}
    for key in dict.fromkeys([*old, *new]):
        was, now = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if was != now:
            changes[key] = f"{key}: was {_show(was)}, now {_show(now)}"
    return changes


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)


def _covers(entries: Collection[str], key: str) -> bool:
    sections = [entry.removesuffix("*").removesuffix(".") for entry in entries]
    return any(key == section or key.startswith(f"{section}.") for section in sections)
