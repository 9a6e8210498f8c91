"""A DataConfig's tokens, on disk once and memory-mapped ever after.

A stream is separator, document, separator, document, ...: even a document's first token is predicted, and nothing is
left unmeasured. Tokenizers without a separator (char) give the plain concatenation. On disk (see cache.py) are entries
of two kinds, a fitted tokenizer, and one side of one source:

    <cache>/tokens/<key>/tokenizer.json

    <cache>/tokens/<key>/tokens.bin      bare ids, uint16 or uint32, little endian
    <cache>/tokens/<key>/starts.npy      [documents + 1] int64, where each document begins, and the end
    <cache>/tokens/<key>/trained.bin     of conversations: uint8 per token, 1 where it counts as a target
    <cache>/tokens/<key>/meta.json       {"dtype": "uint16", "documents": 688, "tokens": 3128587, "bytes": 10855127,
                                          "hash": "8866...", "filters": {...}, "spec": {...}, "files": {...}, ...}

Validation never depends on filters, packing or curriculum, and a tokenizer is fitted to the unfiltered text of what is
partly held out for validation: so a mutation of the data changes what is trained on, and nothing else.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foundry_jax.data import filtering
from foundry_jax.data.cache import Entry, cache_root, open_or_build
from foundry_jax.data.conversation import ALL_CONTROL_TOKENS, Encoded, Own, with_format
from foundry_jax.data.conversation import parse as parse_format
from foundry_jax.data.document import Document, Source
from foundry_jax.data.encoding import encode_all, text_or_chat
from foundry_jax.data.hashing import sha256_json
from foundry_jax.data.mixture import Part as SourcePart
from foundry_jax.data.mixture import opened
from foundry_jax.data.progress import counted
from foundry_jax.data.sources.bin import DTYPES, TokenFiles, open_tokens
from foundry_jax.data.split import Documents, require_both, split
from foundry_jax.data.stream import Stream
from foundry_jax.data.tokenize import TOKENIZERS, BPETokenizer, Tokenizer, load_tokenizer
from foundry_jax.data.tools import Tools
from foundry_jax.errors import UserError
from foundry_jax.registry import lookup
from foundry_jax.schema import require

if TYPE_CHECKING:  # config.py imports this
    from foundry_jax.config import DataConfig

log = logging.getLogger(__name__)

FORMAT = 2  # raise it when the same spec would give other tokens
ONE_KIND = "data.source=bin holds tokens, not documents"


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """What one source gives for training: its share of the sequences, and a key that changes with its content."""

    name: str
    stream: Stream
    weight: float
    key: str


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """What one source gives for validation; isolated: its documents never see each other."""

    stream: Stream
    isolated: bool
    key: str


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens for training and validation, and what is needed to measure a loss on them.

    tokenizer: None for token files that came without one.
    validation_hash: sha256 of the validation text, whatever the tokenizer or format; of val.bin for token files.
    validation_bytes: UTF-8 bytes of the predicted validation tokens; None if unknown. The loss in nats, summed over the
        whole validation stream, is divided by this (and by log 2) for bits per byte.
    reports: what the filters of each source removed, as filters.table.render takes it.
    """

    name: str
    train: tuple[Part, ...]
    validation: tuple[Held, ...]
    tokenizer: Tokenizer | None
    vocab_size: int
    validation_hash: str
    validation_bytes: int | None
    cache: Path
    reports: tuple[dict[str, Any], ...] = ()

    @property
    def num_validation_tokens(self) -> int:
        return sum(len(held.stream.tokens) for held in self.validation)

    @property
    def description(self) -> str:
        """One line for the log."""
        tokens = sum(len(part.stream.tokens) for part in self.train)
        return (
            f"{self.name}: {tokens:,} training and {self.num_validation_tokens:,} validation tokens, "
            f"vocabulary {self.vocab_size:,}, validation text {self.validation_hash[:12]}"
        )


def prepare(config: DataConfig, tokenizer: Tokenizer | None = None, tools: Tools | None = None) -> Corpus:
    """Returns the corpus a DataConfig describes; the first call writes it to the token cache, later ones map it.

    Args:
        tokenizer: the model's own, if it has one already; a path in config.tokenizer overrules it.
        tools: what filters and curricula may ask for; by default nothing.

    Raises:
        UserError: unknown source or tokenizer, data that is missing, empty or unreadable, a tokenizer that does not
            belong to the tokens, filters that leave nothing, or a cache that cannot be written.
    """
    parts = opened(config.source, config.path)
    if config.tokenizer not in TOKENIZERS:
        if re.fullmatch(r"\w+", config.tokenizer) and not Path(config.tokenizer).exists():
            lookup(TOKENIZERS, config.tokenizer, "data.tokenizer")  # a name that is none, not a path
        tokenizer = load_tokenizer(config.tokenizer)
    if any(isinstance(part.source, TokenFiles) for part in parts):
        require(len(parts) == 1, f"{ONE_KIND}: it cannot be mixed with others; data.source={config.source!r} does.")
        require(not config.filters, f"{ONE_KIND}: data.filters={config.filters!r} cannot be applied.")
        corpus = _of_tokens(parts[0].source, config, tokenizer)
    else:
        corpus = _Builder(config, parts, tools or Tools()).corpus(tokenizer)
    log.info("%s.", corpus.description)
    return corpus


class _Builder:
    """Makes the corpus of documents."""

    def __init__(self, config: DataConfig, parts: Sequence[SourcePart], tools: Tools):
        self.config, self.parts, self.tools = config, parts, tools
        self.root = cache_root(config.cache_dir)
        self.fingerprints = [part.source.fingerprint() for part in parts]
        self.formats = [config.format if _is_chat(part.source) else None for part in parts]
        # Pairs may be conversations where the text is none: a format that is named is meant.
        self.converses = any(self.formats) or not isinstance(parse_format(config.format), Own)
        self.sides = [self._sides(part) for part in parts]
        require_both(
            (all(train for train, _ in self.sides), any(validation for _, validation in self.sides)), config.validation
        )

    def _sides(self, part: SourcePart) -> tuple[Documents, Documents]:
        if part.held_out:
            return split(part.source, self.config.validation)
        return Documents(partial(iter, part.source)), Documents(partial(iter, ()))

    def corpus(self, tokenizer: Tokenizer | None) -> Corpus:
        """Returns the corpus of the given tokenizer, or of one fitted to it."""
        fitted = tokenizer is None
        tokenizer = tokenizer or self._fit()
        train = [self._train(number, tokenizer) for number in range(len(self.parts))]
        held = [number for number, part in enumerate(self.parts) if part.held_out and self.sides[number][1]]
        validation = [self._validation(number, tokenizer, check=not fitted) for number in held]
        hashes = [entry.facts["hash"] for entry in validation]
        return Corpus(
            name=", ".join(part.source.name for part in self.parts),
            train=tuple(
                Part(part.source.name, _open(entry), part.weight, entry.folder.name)
                for part, entry in zip(self.parts, train, strict=True)
            ),
            validation=tuple(
                Held(_open(entry), self.formats[number] is not None, entry.folder.name)
                for number, entry in zip(held, validation, strict=True)
            ),
            tokenizer=with_format(tokenizer, self.config.format) if self.converses else tokenizer,
            vocab_size=tokenizer.vocab_size,
            validation_hash=hashes[0] if len(hashes) == 1 else sha256_json(hashes),
            validation_bytes=sum(entry.facts["bytes"] - _unpredicted(entry, tokenizer) for entry in validation),
            cache=self.root,
            reports=tuple(entry.facts["filters"] for entry in train if entry.facts["filters"]),
        )

    def _fit(self) -> Tokenizer:
        """Returns the tokenizer that is fitted to what is partly held out."""
        kind = TOKENIZERS[self.config.tokenizer]
        special = ALL_CONTROL_TOKENS if self.converses and issubclass(kind, BPETokenizer) else ()
        fitted = [number for number, part in enumerate(self.parts) if part.held_out]
        spec = {
            "format": FORMAT,
            "sources": [self.fingerprints[number] for number in fitted],
            "validation": self.config.validation,
            "kind": kind.spec(self.config.vocab_size, special),
        }

        def build(folder: Path) -> dict[str, Any]:
            train, validation = (_Texts([self.sides[number][side] for number in fitted]) for side in (0, 1))
            kind.for_corpus(train, validation, self.config.vocab_size, special).save(folder / "tokenizer.json")
            return {}

        return load_tokenizer(open_or_build(self.root, spec, build).folder)

    def _train(self, number: int, tokenizer: Tokenizer) -> Entry:
        """Returns the entry of the training documents of a source, filtered."""
        spec = self._spec(number, tokenizer) | {
            "side": "train",
            "filters": filtering.fingerprint(self.config.filters, self.tools) if self.config.filters else None,
        }
        return open_or_build(self.root, spec, partial(self._write_train, number, tokenizer))

    def _write_train(self, number: int, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
        source, (documents, _) = self.parts[number].source, self.sides[number]
        if skipped := source.undecodable():
            log.warning("%d documents are not UTF-8 and left out: %s.", len(skipped), skipped[:5])
        report = None
        if self.config.filters:
            documents, report = filtering.filtered(documents, self.config.filters, self.tools)
        facts = self._write(folder, number, documents, tokenizer)
        return facts | {"filters": report and report.to_json()}

    def _validation(self, number: int, tokenizer: Tokenizer, *, check: bool) -> Entry:
        """Returns the entry of the validation documents of a source; check: warn if they cannot be decoded again."""
        spec = self._spec(number, tokenizer) | {"side": "validation"}
        return open_or_build(self.root, spec, partial(self._write_validation, number, tokenizer, check))

    def _write_validation(self, number: int, tokenizer: Tokenizer, check: bool, folder: Path) -> dict[str, Any]:
        return self._write(folder, number, self.sides[number][1], tokenizer, check=check)

    def _spec(self, number: int, tokenizer: Tokenizer) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "source": self.fingerprints[number],
            "validation": self.config.validation if self.parts[number].held_out else None,
            "codec": text_or_chat(tokenizer, self.formats[number]).fingerprint,
        }

    def _write(
        self, folder: Path, number: int, documents: Iterable[Document], tokenizer: Tokenizer, *, check: bool = False
    ) -> dict[str, Any]:
        shown = counted(documents, self.parts[number].source.name)
        pairs = encode_all(shown, tokenizer, self.formats[number])
        if check and self.formats[number] is None:
            pairs = _warning_if_lossy(pairs, tokenizer)
        return write_stream(folder, pairs, tokenizer)


@dataclasses.dataclass(frozen=True)
class _Texts:
    """The texts of several sides, one after the other; can be read again and again."""

    sides: Sequence[Documents]

    def __iter__(self) -> Iterator[str]:
        return (document.text for side in self.sides for document in side)


def write_stream(folder: Path, pairs: Iterable[tuple[Document, Encoded]], tokenizer: Tokenizer) -> dict[str, Any]:
    """Writes the stream of encoded documents to a folder, and returns the facts about it."""
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    separator = np.array([] if tokenizer.separator_id is None else [tokenizer.separator_id], DTYPES[dtype])
    starts, position, num_bytes, digest, masked = array.array("q", [0]), 0, 0, hashlib.sha256(), False
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "trained.bin", "wb") as trained:
        for document, (ids, mask, size) in pairs:
            tokens.write(separator.tobytes() + ids.astype(DTYPES[dtype]).tobytes())
            if mask is not None:
                masked = True
                trained.write(bytes(len(separator)) + mask.astype(np.uint8).tobytes())
            position += len(separator) + len(ids)
            starts.append(position)
            num_bytes += size
            _update(digest, document)
    if not masked:
        (folder / "trained.bin").unlink()
    np.save(folder / "starts.npy", np.frombuffer(starts, np.int64), allow_pickle=False)
    counts = {"documents": len(starts) - 1, "tokens": position, "bytes": num_bytes}
    return {"dtype": dtype, "masked": masked, **counts, "hash": digest.hexdigest(), "filters": None}


def _update(digest, document: Document) -> None:
    """Adds what a document says, after its length in 8 bytes, so that borders count too."""
    said = json.dumps(document.conversation) if document.conversation else document.text
    data = said.encode()
    digest.update(len(data).to_bytes(8, "little") + data)


def _open(entry: Entry) -> Stream:
    facts, folder = entry.facts, entry.folder
    return Stream(
        open_tokens(folder / "tokens.bin", facts["dtype"]),
        np.load(folder / "starts.npy", mmap_mode="r", allow_pickle=False),
        np.memmap(folder / "trained.bin", np.uint8, mode="r") if facts["masked"] else None,
    )


def _unpredicted(entry: Entry, tokenizer: Tokenizer) -> int:
    """Returns the bytes of the one token of a stream that nobody predicts, the first: none if it is a separator."""
    if tokenizer.separator_id is not None:
        return 0
    return int(tokenizer.token_bytes[_open(entry).tokens[0]])


def _is_chat(source: Source) -> bool:
    first = next(iter(source), None)
    return first is not None and first.conversation is not None


def _warning_if_lossy(
    pairs: Iterable[tuple[Document, Encoded]], tokenizer: Tokenizer
) -> Iterator[tuple[Document, Encoded]]:
    lossy = total = 0
    for document, encoded in pairs:
        lossy += tokenizer.decode(encoded.ids) != document.text
        total += 1
        yield document, encoded
    if lossy:
        log.warning(
            "The tokenizer does not reproduce %d of %d validation texts: bits per byte will be too low.", lossy, total
        )


def _of_tokens(source: TokenFiles, config: DataConfig, tokenizer: Tokenizer | None) -> Corpus:
    if tokenizer is None and (source.folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(source.folder)
    if tokenizer and source.tokenizer_hash not in (None, tokenizer.hash):
        raise UserError(
            f"The tokens in {source.folder} were made with tokenizer {source.tokenizer_hash}, not with this one, "
            f"{tokenizer.hash}; set data.tokenizer to the one they were made with."
        )
    spec = {
        "format": FORMAT,
        "tokens": source.fingerprint(),
        "dtype": source.dtype,
        "tokenizer": tokenizer.hash if tokenizer else None,
    }
    root = cache_root(config.cache_dir)
    entry = open_or_build(root, spec, partial(_scan, source, tokenizer))
    vocab_size = source.vocab_size or (tokenizer.vocab_size if tokenizer else config.vocab_size)
    if entry.facts["max_id"] >= vocab_size:
        raise UserError(
            f"{source.folder} holds token id {entry.facts['max_id']}, but the vocabulary ends at {vocab_size - 1}; "
            f"set data.vocab_size to {entry.facts['max_id'] + 1} or more, or use the tokenizer they were made with."
        )
    starts = [np.load(entry.folder / f"{side}.npy", mmap_mode="r", allow_pickle=False) for side in ("train", "val")]
    streams = [
        Stream(open_tokens(path, source.dtype), where)
        for path, where in zip((source.train, source.validation), starts, strict=True)
    ]
    return Corpus(
        name=source.name,
        train=(Part(source.name, streams[0], 1.0, entry.folder.name),),
        validation=(Held(streams[1], isolated=False, key=entry.folder.name),),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        validation_hash=entry.facts["validation_hash"],
        validation_bytes=entry.facts["validation_bytes"],
        cache=root,
    )


def _scan(source: TokenFiles, tokenizer: Tokenizer | None, folder: Path) -> dict[str, Any]:
    """Writes where documents begin, and returns the facts about token files that take reading all of them."""
    separator = tokenizer.separator_id if tokenizer else None
    for side, path in {"train": source.train, "val": source.validation}.items():
        np.save(folder / f"{side}.npy", _starts_of(open_tokens(path, source.dtype), separator), allow_pickle=False)
    facts = source.scan()
    sizes = tokenizer.token_bytes if tokenizer else None
    if sizes is None or facts["max_id"] >= len(sizes):
        return {**facts, "validation_bytes": None}
    tokens = open_tokens(source.validation, source.dtype)[1:]
    counts = np.bincount(tokens, minlength=len(sizes))
    return {**facts, "validation_bytes": int(counts @ sizes)}


def _starts_of(tokens: np.ndarray, separator: int | None) -> np.ndarray:
    """Returns where documents begin, and the end; without a separator there is one."""
    found = np.flatnonzero(tokens == separator) if separator is not None else np.array([], np.int64)
    return np.unique(np.concatenate([[0], found, [len(tokens)]])).astype(np.int64)
