"""Items on disk, or on the hub: files to records that know where they stand.

Accepted are JSONL (.jsonl, .jsonl.gz), a list in a .json file, and .parquet. The path is a file or a folder; each task
says which names it looks for in a folder, and what a record holds. Without a path it is that of $FOUNDRY_EVAL_DATA;
without that, it is the data set on the Hugging Face hub, if the package `datasets` is there.
"""

import dataclasses
import gzip
import json
import logging
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from foundry_jax.data.hub import load_dataset
from foundry_jax.errors import UserError, first_line
from foundry_jax.schema import require

log = logging.getLogger(__name__)

VARIABLE = "FOUNDRY_EVAL_DATA"
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
SHARDS = "-?????-of-?????.parquet"  # as the hub names the parts of a split


@dataclasses.dataclass(frozen=True)
class Record:
    """One record: its fields, the place it was read from, and what one should look like."""

    where: str
    fields: Mapping[str, Any]
    shape: str

    def text(self, name: str) -> str:
        """Returns a field that must be text.

        Raises:
            UserError: it is not, or holds half of a surrogate pair, which is no character.
        """
        value = self.fields.get(name)
        self.require(isinstance(value, str), f"has no text {name!r}")
        self.require(_is_unicode(value), f"has half of a surrogate pair in {name!r}, which is no character")
        return value

    def require(self, condition: bool, problem: str) -> None:
        """Raises UserError unless the condition holds."""
        require(condition, f"{self.where} {problem}; a record is {self.shape}.")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a task's data lies.

    task: its name.
    shape: one record.
    splits: {split: names in a folder without their suffix}; the first split is the one to evaluate on.
    hub: what datasets.load_dataset takes besides the split; None: the hub has nothing.
    """

    task: str
    shape: str
    splits: Mapping[str, Sequence[str]]
    hub: Mapping[str, str] | None = None

    @property
    def accepted(self) -> str:
        """What to give, for messages."""
        names = " and ".join(f"{names[0]}.jsonl" for names in self.splits.values())
        return f"--data=FILE or FOLDER with {names} (accepted: {', '.join(SUFFIXES)}); a record is {self.shape}"


@dataclasses.dataclass(frozen=True)
class Split:
    """The records of one split and where they are from: paths, or one name on the hub."""

    records: Sequence[Record]
    origin: Sequence[pathlib.Path] | str


def load(layout: Layout, path: str | os.PathLike | None, wanted: Sequence[str]) -> dict[str, Split]:
    """Returns the wanted splits; of those after the first, which hold examples, only what there is.

    Args:
        path: a file with the first split, or a folder; None: as above.

    Raises:
        UserError: nothing there, no network, or a malformed file, with the number of the line.
    """
    path = path if path is not None else os.environ.get(VARIABLE) or None
    if path is None:
        return {split: _from_hub(layout, split) for split in wanted}
    found = {split: find(layout, pathlib.Path(path).expanduser(), split) for split in wanted}
    main = wanted[0]
    require(bool(found[main]), f"{layout.task} has no data at {path}: give {layout.accepted}.")
    return {split: Split(read_all(paths, layout.shape), paths) for split, paths in found.items() if paths}


def find(layout: Layout, path: pathlib.Path, split: str) -> list[pathlib.Path]:
    """Returns the files of a split; none if there are none.

    Raises:
        UserError: the path does not exist.
    """
    require(path.exists(), f"{layout.task}: there is no {path}; give {layout.accepted}.")
    if path.is_dir():
        return _in_folder(path, layout.splits[split])
    if split == next(iter(layout.splits)):
        return [path]
    return _in_folder(path.parent, layout.splits[split])


def _in_folder(folder: pathlib.Path, names: Sequence[str]) -> list[pathlib.Path]:
    for name in names:
        for suffix in SUFFIXES:
            if (folder / f"{name}{suffix}").is_file():
                return [folder / f"{name}{suffix}"]
        shards = sorted((folder / name).parent.glob(pathlib.Path(name).name + SHARDS))
        if shards:
            return shards
    return []


def read_all(paths: Sequence[pathlib.Path], shape: str) -> list[Record]:
    """Returns the records of some files.

    Raises:
        UserError: as in read, or there is no record.
    """
    records = [record for path in paths for record in read(path, shape)]
    require(bool(records), f"{paths[0]} has no records; one is {shape}.")
    return records


def read(path: pathlib.Path, shape: str) -> Iterator[Record]:
    """Yields the records of a file.

    Raises:
        UserError: it cannot be read, or a line is no JSON object: names the file and the line.
    """
    name = path.name
    require(name.endswith(SUFFIXES), f"{path} is none of {', '.join(SUFFIXES)}; a record is {shape}.")
    try:
        if name.endswith(".parquet"):
            rows = ((f"{path}, row {i}", row) for i, row in enumerate(_parquet(path), start=1))
        elif name.endswith(".json"):
            rows = _json(path, shape)
        else:
            rows = _json_lines(path, shape)
        for where, fields in rows:
            require(isinstance(fields, dict), f"{where} is no JSON object; a record is {shape}.")
            yield Record(where, fields, shape)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}.") from None
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from None


def _json_lines(path: pathlib.Path, shape: str) -> Iterator[tuple[str, Any]]:
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number},"
                yield where, _parse(line, where, shape)


def _json(path: pathlib.Path, shape: str) -> Iterator[tuple[str, Any]]:
    rows = _parse(path.read_bytes(), f"{path}", shape)
    require(isinstance(rows, list), f"{path} must hold a list of records; one is {shape}.")
    return ((f"{path}, record {i},", row) for i, row in enumerate(rows, start=1))


def _parse(data: bytes, where: str, shape: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); a record is {shape}.") from None


def _parquet(path: pathlib.Path) -> list[dict[str, Any]]:
    import pyarrow  # takes 0.25 s
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no Parquet file: {first_line(error)}.") from None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ------------------------------------------------------------------------------------------------ the hub


def _from_hub(layout: Layout, split: str) -> Split:
    """Returns a split from the hub, or from its cache if the hub cannot be reached.

    Raises:
        UserError: no data set, no package to get it with, or no network: says what files to give instead.
    """
    require(layout.hub is not None, f"{layout.task} has no data of its own: give {layout.accepted}.")
    repository = layout.hub["path"]
    subject, instead = f"{layout.task} was given no data, and {repository}", f"Instead, give {layout.accepted}."
    rows = load_dataset(**layout.hub, split=split, subject=subject, instead=instead)
    log.info("%s: %s records of %s.", layout.task, f"{len(rows):,}", repository)
    records = [Record(f"{repository}, {split}, row {i},", row, layout.shape) for i, row in enumerate(rows, start=1)]
    return Split(records, repository)
