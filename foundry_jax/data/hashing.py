"""The sha256 of values and files, as the token cache and the tokenizers use it."""

import hashlib
import json
import os
from typing import Any


def sha256_json(value: Any) -> str:
    """Returns the sha256 of a value's canonical JSON: sorted keys, no spaces, ASCII."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_file(path: str | os.PathLike) -> str:
    """Returns the sha256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
