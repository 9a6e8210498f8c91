"""The sha256 of values and files, as the token cache and the tokenizers use it."""

import functools
import hashlib
import json
import os
import pathlib
from typing import Any


def sha256_json(value: Any) -> str:
    """Returns the sha256 of a value's canonical JSON: sorted keys, no spaces, ASCII."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_unchanged(path: pathlib.Path) -> str:
    """Returns the sha256 of a file, read once by a process that asks for it run after run, unless it changes."""
    facts = path.stat()
    return _sha256_as_of(path, facts.st_ino, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _sha256_as_of(path: pathlib.Path, *_: int) -> str:
    return sha256_file(path)


def sha256_file(path: str | os.PathLike) -> str:
    """Returns the sha256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
