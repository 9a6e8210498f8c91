"""What a sweep has settled, one fact a line, so that a sweep that was killed goes on with the same facts.

    SWEEP/ledger.jsonl    {"key": "run/mla/seed-0", "value": {"status": "done", "metrics": {...}, ...}}

A fact is never changed. A line is written and flushed to disk before anything builds on it; a process that is killed
while it writes leaves a torn last line, which is cut off and settled again.
"""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from foundry_jax.errors import UserError
from foundry_jax.runfolder import decode_json, encode_json, fsync

NAME = "ledger.jsonl"


class Ledger:
    """The facts of one sweep's folder, whose lock the caller holds."""

    def __init__(self, folder: str | os.PathLike):
        """Reads what is settled.

        Raises:
            UserError: a line before the last is damaged, or the file cannot be written to.
        """
        self.path = pathlib.Path(folder) / NAME
        self._facts: dict[str, Any] = {}
        end, lines = 0, self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        for number, line in enumerate(lines, start=1):
            fact = _parse(line)
            if fact is None and number < len(lines):
                raise UserError(f"{self.path}, line {number}, is damaged: delete the file, and finished runs are kept.")
            if fact is not None:
                self._facts[fact[0]] = fact[1]
                end += len(line)
        if lines and end < self.path.stat().st_size:
            os.truncate(self.path, end)
            fsync(self.path)

    def __contains__(self, key: str) -> bool:
        return key in self._facts

    def get(self, key: str) -> Any:
        """Returns a fact, or None."""
        return self._facts.get(key)

    def under(self, prefix: str) -> dict[str, Any]:
        """Returns {rest of the key: fact} of all keys that begin with prefix/, in the order they were settled."""
        start = f"{prefix}/"
        return {key.removeprefix(start): fact for key, fact in self._facts.items() if key.startswith(start)}

    def settle(self, key: str, make: Callable[[], Any]) -> Any:
        """Returns the fact, which is made if it is not settled yet.

        Raises:
            UserError: it cannot be written.
        """
        if key not in self._facts:
            self._write(key, make())
        return self._facts[key]

    def _write(self, key: str, value: Any) -> None:
        line = json.dumps(encode_json({"key": key, "value": value}), allow_nan=False)
        is_new = not self.path.exists()
        try:
            with open(self.path, "ab") as file:
                file.write(f"{line}\n".encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"Cannot write to {self.path}: {error.strerror}; run it again once it can be.") from error
        if is_new:
            fsync(self.path.parent)
        self._facts[key] = decode_json(json.loads(line))["value"]  # as it will be read


def _parse(line: bytes) -> tuple[str, Any] | None:
    try:
        fact = decode_json(json.loads(line))
        return (fact["key"], fact["value"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
