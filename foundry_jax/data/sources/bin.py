"""Tokens made elsewhere, in nanoGPT's layout: a folder with train.bin and val.bin.

The files are bare token ids, uint16, little endian, with no header: that is nanoGPT's own definition, so nothing is
guessed from sizes. A JSON sidecar beside them, meta.json or train.json, may say otherwise; every key is optional:

    {"dtype": "uint32", "vocab_size": 100277, "tokenizer_hash": "9f2c... (sha256)"}

A tokenizer.json in the folder is used unless data.tokenizer names another. Folders of the token cache have this
layout too. nanoGPT's meta.pkl is never read: unpickling a file runs whatever code it holds.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from foundry_jax.data.hashing import sha256_file
from foundry_jax.errors import UserError

log = logging.getLogger(__name__)

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
SIDECARS = ("meta.json", "train.json")
SCAN_TOKENS = 1 << 24  # read at a time when looking for the largest id


@dataclasses.dataclass(frozen=True)
class TokenFiles:
    """The two token files of a folder and what its sidecar says of them."""

    folder: Path
    dtype: str
    vocab_size: int | None
    tokenizer_hash: str | None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def train(self) -> Path:
        return self.folder / "train.bin"

    @property
    def validation(self) -> Path:
        return self.folder / "val.bin"

    def fingerprint(self) -> list:
        """Returns path, size and modification time of both files: unlike text, they may be too large to read."""
        stats = [(path, path.stat()) for path in (self.train, self.validation)]
        return [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]

    def scan(self) -> dict[str, Any]:
        """Returns {"max_id": the largest id in both files, "validation_hash": sha256 of val.bin}, reading them once."""
        largest = max(max_id(open_tokens(path, self.dtype)) for path in (self.train, self.validation))
        return {"max_id": largest, "validation_hash": sha256_file(self.validation)}


def find(path: str) -> TokenFiles:
    """Returns the token files of a folder.

    Raises:
        UserError: no such folder, a missing or empty file, a size that is no whole number of tokens, a bad sidecar.
    """
    folder = Path(os.path.expanduser(path))
    if not path or not folder.is_dir():
        raise UserError(f"data.path={path!r} must be a folder with train.bin and val.bin for data.source=bin.")
    sidecar = _read_sidecar(folder)
    files = TokenFiles(folder, sidecar.get("dtype", "uint16"), sidecar.get("vocab_size"), sidecar.get("tokenizer_hash"))
    for file in (files.train, files.validation):
        _check_size(file, files.dtype)
    return files


def open_tokens(path: Path, dtype: str) -> np.memmap:
    """Returns the tokens of a file, memory-mapped read-only: [number of tokens] uint16 or uint32."""
    return np.memmap(path, dtype=DTYPES[dtype], mode="r")


def max_id(tokens: np.ndarray) -> int:
    """Returns the largest id, reading a slice at a time."""
    return max(int(tokens[start : start + SCAN_TOKENS].max()) for start in range(0, len(tokens), SCAN_TOKENS))


def _read_sidecar(folder: Path) -> Mapping[str, Any]:
    """Returns the checked content of meta.json or train.json, {} without either."""
    path = next((folder / name for name in SIDECARS if (folder / name).is_file()), None)
    if path is None:
        if (folder / "meta.pkl").is_file():
            log.warning('%s/meta.pkl is not read (pickle runs code); write {"vocab_size": ...} to meta.json.', folder)
        return {}
    try:
        sidecar = json.loads(path.read_text("utf-8"))
        dtype, vocab_size = sidecar.get("dtype", "uint16"), sidecar.get("vocab_size", 1)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"Cannot read {path} as a JSON object: {error}.") from None
    if dtype not in DTYPES:
        raise UserError(f"{path}: dtype={dtype!r} must be one of {', '.join(DTYPES)}.")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise UserError(f"{path}: vocab_size={vocab_size!r} must be a positive whole number.")
    return sidecar


def _check_size(path: Path, dtype: str) -> None:
    if not path.is_file():
        raise UserError(f"No file {path}; data.source=bin needs train.bin and val.bin.")
    size, token_size = path.stat().st_size, DTYPES[dtype].itemsize
    if not os.access(path, os.R_OK):
        raise UserError(f"Cannot read {path}: Permission denied.")
    if size == 0:
        raise UserError(f"{path} is empty.")
    if size % token_size:
        raise UserError(f"{path} has {size} bytes, no multiple of {token_size} ({dtype}); is it cut short?")
