"""How a config came to be what it is: promotions, sweeps that promoted nothing, and what was undone.

The file beside the config is described in mutate/promotions.py, which replays it. Here it is written: under a lock,
flushed to disk, never rewritten. Wherever a path is asked for, a config's spec ("configs/tiny.py:mla") or its lineage
file will do. Imports no JAX.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from foundry_jax import mutate
from foundry_jax.config import load_dict
from foundry_jax.data.hashing import sha256_file
from foundry_jax.errors import UserError
from foundry_jax.mutate import promotions as file_lib
from foundry_jax.mutate.promotions import SUFFIX, Promotion
from foundry_jax.mutate.stack import changes
from foundry_jax.registry import lookup
from foundry_jax.runfolder import decode_json, encode_json, fsync
from foundry_jax.schema import require

BETTER = "better"  # the verdict that promotes; see verdict.py
MATCHED_ARCHITECTURE = {"params": ("model.mlp_dim",)}  # by --match: keys that matching changed in the model itself
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}  # Lustre without -o flock, some FUSE mounts


@dataclasses.dataclass(frozen=True)
class Entry:
    """A record in the tree of a lineage. state: "in force", "undone", or "kept" (nothing was promoted)."""

    record: Mapping[str, Any]
    state: str
    children: "tuple[Entry, ...]"

    def to_json(self) -> dict[str, Any]:
        """Returns plain dicts and lists."""
        children = [child.to_json() for child in self.children]
        return {"state": self.state, "record": dict(self.record), "children": children}


def file_of(path: str | os.PathLike) -> pathlib.Path:
    """Returns the lineage file of a config: configs/tiny.lineage.jsonl for "configs/tiny.py:mla"."""
    return pathlib.Path(path) if str(path).endswith(SUFFIX) else file_lib.file_of(path)


def records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns all records, the oldest first.

    Raises:
        UserError: the file was damaged or edited into conflict; names the line.
    """
    found = file_lib.read(file_of(path)).records
    file_lib.in_force(found, file_of(path))
    return [decode_json(record) for record in found]


def promotions(path: str | os.PathLike) -> list[Promotion]:
    """Returns the promotions in force, the oldest first.

    Raises:
        UserError: as records does.
    """
    return file_lib.in_force(file_lib.read(file_of(path)).records, file_of(path))


def head(path: str | os.PathLike) -> str:
    """Returns what names the incumbent: the sha256 of the newest promotion in force, and "" if there is none.

    It chains all records before. Sweeps that promoted nothing leave it as it is, and so do a promotion and its undoing.
    """
    found = promotions(path)
    return found[-1].sha256 if found else ""


def promote(
    result: Mapping[str, Any],
    name: str,
    *,
    config_path: str | os.PathLike,
    expected_head: str,
    sweep: str | os.PathLike,
) -> Promotion:
    """Returns the promotion of a sweep's contestant, on disk; one that was made of this sweep before, as it is.

    Args:
        result: what the sweep came to (result.json).
        name: the contestant.
        config_path: of the config to be changed.
        expected_head: of the lineage when the sweep began.
        sweep: the sweep's folder.

    Raises:
        UserError: the contestant is not better, the incumbent has changed since, or the file cannot be written.
    """
    contestant = lookup(result["contestants"], name, "contestant")
    verdict = contestant["verdict"] or {}
    require(
        verdict.get("verdict") == BETTER,
        f"{name} is not promoted, because it is not {BETTER}: "
        f"{verdict.get('why') or contestant['reason'] or 'it has no verdict'}",
    )
    path = file_of(config_path)
    with _locked(path):
        if (made := _made_by(path, result, "promotion")) is not None:
            return file_lib.as_promotion(made, path)
        _require_same_incumbent(path, expected_head)
        values = {
            "kind": "promotion",
            "name": name,
            "argument": contestant["argument"],
            "overrides": overrides_of(result, name),
            "verdict": verdict,
            "mean": {who: result["contestants"][who]["mean"] for who in (result["incumbent"], name)},
        }
        return file_lib.as_promotion(_append(path, values | _facts(result, sweep)), path)


def record_kept(result: Mapping[str, Any], *, config_path: str | os.PathLike, sweep: str | os.PathLike) -> int:
    """Returns the id of the record that a sweep promoted nothing; one that was made of this sweep before, as it is.

    Raises:
        UserError: the file cannot be written.
    """
    path = file_of(config_path)
    with _locked(path):
        made = _made_by(path, result, "kept")
        if made is None:
            made = _append(path, {"kind": "kept", "why": result["decision"]["why"]} | _facts(result, sweep))
        return made["id"]


def undo(path: str | os.PathLike, command: str) -> Promotion:
    """Returns the newest promotion in force, which no longer is; `command` says who asked for that.

    Raises:
        UserError: there is none, or the file cannot be written.
    """
    path = file_of(path)
    with _locked(path):
        found = promotions(path)
        require(bool(found), f"{path} has no promotion in force, so there is nothing to undo.")
        _append(path, {"kind": "undo", "name": found[-1].name, "command": command})
    return found[-1]


def tree(path: str | os.PathLike) -> tuple[Entry, ...]:
    """Returns the records as a tree: below a promotion what was made while it was the newest in force.

    Raises:
        UserError: as records does.
    """
    in_force = {promotion.id for promotion in promotions(path)}
    found = [record for record in records(path) if record["kind"] != "undo"]

    def state(record: Mapping[str, Any]) -> str:
        return "kept" if record["kind"] == "kept" else "in force" if record["id"] in in_force else "undone"

    def below(parent: int | None) -> tuple[Entry, ...]:
        return tuple(Entry(r, state(r), below(r["id"])) for r in found if r["parent"] == parent)

    return below(None)


def overrides_of(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the keys that promoting a contestant sets: what its mutations change of the config's own values.

    Values that were derived (a width of 0) stay derived, and what the command line set for the whole sweep is left out.
    A learning rate that was tuned for the contestant is a part of it, and so is a width that was matched; a number of
    steps that was matched is not, since it belongs to the comparison.

    Raises:
        UserError: nothing is left to set, or the argument of the config sets the same.
    """
    spec, contestant = result["config"], result["contestants"][name]
    items = [contestant["argument"], *([f"lr={contestant['learning_rate']!r}"] if contestant["rates"] else [])]
    matched = MATCHED_ARCHITECTURE.get(result["match"], ())
    overrides = _raw_changes(spec, ",".join(items))
    overrides |= {key: contestant["changes"][key][1] for key in matched if key in contestant["changes"]}
    require(bool(overrides), f"{name} would change nothing of {spec}: that is what it is already.")
    _require_not_set_again(spec, name, overrides)
    return overrides


def require_promotable(spec: str, name: str, argument: str) -> None:
    """Raises UserError if a contestant could not be promoted however well it does; known before it is trained."""
    _require_not_set_again(spec, name, _raw_changes(spec, argument))


def _raw_changes(spec: str, argument: str) -> dict[str, Any]:
    parent = load_dict(spec)
    return {key: new for key, (_, new) in changes(parent, mutate.apply(parent, argument)).items()}


def _require_not_set_again(spec: str, name: str, overrides: Mapping[str, Any]) -> None:
    path, _, argument = spec.partition(":")
    twice = [key for key in changes(load_dict(path), load_dict(spec)) if key in overrides]
    require(
        not twice,
        f"{name} cannot be promoted: {', '.join(twice)} would be set again by the argument {argument!r} of {spec}. "
        f"Save that as a config of its own (python -m foundry_jax.mutate), and sweep it.",
    )


def _facts(result: Mapping[str, Any], sweep: str | os.PathLike) -> dict[str, Any]:
    """Returns what a record says of the sweep: everything that it takes to judge it, or to run it again."""
    kept = ("command", "config", "metric", "alpha", "min_effect", "match", "seeds", "started", "hashes")
    facts = {key: result[key] for key in kept}
    return facts | {
        "sweep": _shown(pathlib.Path(sweep)),
        "measured_with": result["overrides"],
        "contestants": {name: summary(contestant) for name, contestant in result["contestants"].items()},
        "hashes": result["hashes"] | {"config": sha256_file(result["config"].partition(":")[0])},
    }


def _shown(folder: pathlib.Path) -> str:
    """Returns a path as it is written here: lineages are committed, and read elsewhere."""
    here = pathlib.Path.cwd()
    return str(folder.absolute().relative_to(here)) if folder.absolute().is_relative_to(here) else str(folder)


def summary(contestant: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a record holds of a contestant of result.json."""
    verdict = contestant["verdict"] or {}
    return {
        **{key: contestant[key] for key in ("argument", "status", "reason")},
        **{key: verdict.get(key) for key in ("verdict", "effect", "interval")},
    }


def _made_by(path: pathlib.Path, result: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """Returns the record that this sweep has left, if it was killed after that."""
    found = [r for r in records(path) if r["kind"] == kind and r["started"] == result["started"]]
    return found[-1] if found else None


def _require_same_incumbent(path: pathlib.Path, expected_head: str) -> None:
    found = promotions(path)
    require(
        head(path) == expected_head,
        f"The incumbent changed since this sweep began: {path} "
        + (f"has {found[-1].name} as promotion {found[-1].id} now" if found else "has no promotion in force now")
        + ". Nothing is promoted; run the sweep again, in another --workdir.",
    )


def _append(path: pathlib.Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a new record, which is on disk; the caller holds the lock."""
    content = file_lib.read(path)
    in_force = file_lib.in_force(content.records, path)
    before = content.records[-1]["sha256"] if content.records else ""
    place = {"id": len(content.records) + 1, "time": time.time(), "parent": in_force[-1].id if in_force else None}
    record = json.loads(json.dumps(encode_json({"kind": values["kind"], **place, **values, "previous": before})))
    record["sha256"] = file_lib.digest(record)
    line = f"{json.dumps(record, ensure_ascii=False, allow_nan=False)}\n".encode()
    is_new = not path.exists()
    with _explained(path), open(path, "ab") as file:
        file.truncate(content.size)  # without a torn line at the end
        if content.size and not path.read_bytes().endswith(b"\n"):
            line = b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        fsync(path.parent)
    return decode_json(record)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from writing to a lineage file: its config is locked, which is there in any case."""
    config = path.with_name(path.name.removesuffix(SUFFIX) + ".py")
    require(config.is_file(), f"No config file {str(config)!r}, whose lineage {str(path)!r} would be.")
    lock = os.open(config, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def _explained(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"Cannot write to {path}: {error.strerror}; nothing is promoted. Run it again then.") from error
