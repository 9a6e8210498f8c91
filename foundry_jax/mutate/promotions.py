"""The promotions of a config, replayed whenever it is loaded: configs/tiny.lineage.jsonl beside configs/tiny.py.

One record a line, only ever appended (by search/lineage.py):

    {"kind": "promotion", "id": 1, "parent": null, "name": "layernorm", "overrides": {"model.norm": "layernorm"}, ...,
     "previous": "", "sha256": "5d41..."}
    {"kind": "kept", "id": 2, "parent": 1, ...}                   a sweep that promoted nothing
    {"kind": "undo", "id": 3, "parent": 1, ...}                   promotion 1 is no longer in force

"parent" is the promotion that was the newest in force then. "sha256" is that of the record without it, and "previous"
that of the record above, so a line that was edited, left out or merged in shows. A config that builds on another
inherits its promotions, as it inherits every other edit of it.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ml_collections import ConfigDict

from foundry_jax.config import set_values
from foundry_jax.errors import UserError

SUFFIX = ".lineage.jsonl"
KINDS = ("promotion", "kept", "undo")


@dataclasses.dataclass(frozen=True)
class Promotion:
    """A promotion that is in force. overrides: {dotted key: value}; parent: the id of the one before, or None."""

    id: int
    name: str
    argument: str
    overrides: Mapping[str, Any]
    parent: int | None
    sha256: str
    record: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Content:
    """What a lineage file holds: its records, and how many of its bytes they take; what follows is a torn line."""

    records: tuple[dict[str, Any], ...]
    size: int


def file_of(spec: str | os.PathLike) -> pathlib.Path:
    """Returns where the lineage of a config is: beside the file of "configs/tiny.py[:argument]"."""
    return pathlib.Path(str(spec).partition(":")[0]).with_suffix(SUFFIX)


def replay(config: ConfigDict, spec: str | os.PathLike) -> ConfigDict:
    """Returns a copy of config with the promotions in force applied, in their order.

    Raises:
        UserError: the lineage file was damaged, or a promotion does not fit the config; names the line.
    """
    path = file_of(spec)
    for promotion in in_force(read(path).records, path):
        try:
            config = set_values(config, promotion.overrides)
        except UserError as error:
            raise UserError(
                f"{path}, line {promotion.id}: {error} Undo the promotion, or give the config what it needs."
            ) from error
    return config


def read(path: pathlib.Path) -> Content:
    """Returns the records of a lineage file, none if it is not there.

    A last line that is not whole was being written when the machine or the process died, and does not count.

    Raises:
        UserError: another line is no record, or does not follow from the one above; or the file cannot be read.
    """
    try:
        *lines, tail = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return Content((), 0)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}; without it the config is not known.") from error
    records, size = [], 0
    for line in lines:
        records.append(_record(path, line, records))
        size += len(line) + 1
    if tail and (last := _parse(tail)) is not None:  # whole, but for the end of the line
        _require_next(path, last, records)
        records.append(last)
        size += len(tail)
    return Content(tuple(records), size)


def in_force(records: Sequence[Mapping[str, Any]], path: pathlib.Path) -> list[Promotion]:
    """Returns the promotions that were not undone, the oldest first.

    Raises:
        UserError: a record contradicts those before it.
    """
    stack: list[Promotion] = []
    for record in records:
        top = stack[-1].id if stack else None
        undone = record["kind"] == "undo"
        if record.get("parent") != top or (undone and top is None):
            _refuse(path, record["id"], f"its parent is {record.get('parent')}, but in force above it is {top}")
        if undone:
            stack.pop()
        elif record["kind"] == "promotion":
            stack.append(as_promotion(record, path))
    return stack


def as_promotion(record: Mapping[str, Any], path: pathlib.Path) -> Promotion:
    """Returns what a record of a promotion says.

    Raises:
        UserError: it lacks something.
    """
    values = {name: record.get(name) for name in ("id", "name", "argument", "overrides", "parent", "sha256")}
    texts = (values["name"], values["argument"])
    if not isinstance(values["overrides"], dict) or not all(isinstance(text, str) for text in texts):
        _refuse(path, record["id"], "a promotion must have a name, an argument and overrides")
    return Promotion(**values, record=record)


def digest(record: Mapping[str, Any]) -> str:
    """Returns the sha256 of a record, without the one that it may hold."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _record(path: pathlib.Path, line: bytes, before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    record = _parse(line)
    if record is None:
        _refuse(path, len(before) + 1, "it is no record")
    _require_next(path, record, before)
    return record


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _require_next(path: pathlib.Path, record: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError unless the record is whole and follows from those before it."""
    number = len(before) + 1
    if record.get("kind") not in KINDS or record.get("sha256") != digest(record):
        _refuse(path, number, "it was edited")
    if record.get("id") != number or record.get("previous") != (before[-1]["sha256"] if before else ""):
        _refuse(path, number, "it does not follow from the line above")


def _refuse(path: pathlib.Path, number: int, reason: str) -> NoReturn:
    raise UserError(
        f"{path}, line {number}: {reason}; put the file back as it was, or delete this line and all that follow it."
    )
