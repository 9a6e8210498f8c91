"""Documents as a folder of tokens that data.source=bin reads, and nanoGPT too.

train.bin, val.bin    separator, document, separator, document, ...: bare ids, uint16 or uint32, little endian
tokenizer.json
meta.json             {"dtype": "uint16", "vocab_size": 4096, "tokenizer_hash": "3c0f...",
                       "train": {"documents": 688, "tokens": 3128587, "bytes": 10855127}, "validation": {...}}
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from foundry_jax.data.document import Document, Source
from foundry_jax.data.encoding import encode_all
from foundry_jax.data.progress import counted
from foundry_jax.data.sources.bin import DTYPES
from foundry_jax.data.split import require_both, split
from foundry_jax.data.tokenize import FILE, Tokenizer
from foundry_jax.errors import MachineError, UserError
from foundry_jax.schema import require


def write(folder: Path, source: Source, tokenizer: Tokenizer, validation: str) -> dict[str, Any]:
    """Writes the tokens of a source to a new folder, whole or not at all, and returns what is in meta.json.

    Raises:
        UserError: the folder exists, there is no text for both sides, or the source has conversations.
        MachineError: the folder cannot be written.
    """
    require(not folder.exists(), f"{folder} exists; name a folder that does not.")
    first = next(iter(source), None)
    if first is not None and first.conversation is not None:
        raise UserError(
            f"{source.name} holds conversations, and bare ids do not say which of them are learned; train with "
            f"data.source=chat itself."
        )
    sides = dict(zip(("train", "validation"), split(source, validation), strict=True))
    require_both((bool(sides["train"]), bool(sides["validation"])), validation)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        facts = _write(unfinished, sides, tokenizer, source.name)
        unfinished.rename(folder)
    except OSError as error:
        raise MachineError(
            f"Cannot write {folder}: {error.strerror or error}; free some space, or choose another."
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return facts


def _write(folder: Path, sides: dict[str, Iterable[Document]], tokenizer: Tokenizer, name: str) -> dict[str, Any]:
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    facts = {"dtype": dtype, "vocab_size": tokenizer.vocab_size, "tokenizer_hash": tokenizer.hash}
    for side, file in (("train", "train.bin"), ("validation", "val.bin")):
        facts[side] = _write_tokens(folder / file, counted(sides[side], f"{name}, {side}"), tokenizer, dtype)
    tokenizer.save(folder / FILE)
    (folder / "meta.json").write_text(json.dumps(facts, indent=1), "utf-8")
    return facts


def _write_tokens(path: Path, documents: Iterable[Document], tokenizer: Tokenizer, dtype: str) -> dict[str, int]:
    """Writes the stream of some documents and returns their number, and the number of tokens and of UTF-8 bytes."""
    separator = np.array([] if tokenizer.separator_id is None else [tokenizer.separator_id], DTYPES[dtype])
    counts = {"documents": 0, "tokens": 0, "bytes": 0}
    with open(path, "wb") as file:
        for _, encoded in encode_all(documents, tokenizer, None):
            file.write(separator.tobytes() + encoded.ids.astype(DTYPES[dtype]).tobytes())
            counts["documents"] += 1
            counts["tokens"] += len(separator) + len(encoded.ids)
            counts["bytes"] += encoded.num_bytes
    return counts
