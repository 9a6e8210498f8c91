"""A DataConfig's tokens, on disk once and memory-mapped ever after.

A stream is separator, document, separator, document, ...: even a document's first token is predicted, and nothing is
left unmeasured. Tokenizers without a separator (char) give the plain concatenation. On disk (see cache.py):

    <cache>/tokens/<key>/train.bin, val.bin    bare ids, uint16 or uint32, little endian
    <cache>/tokens/<key>/tokenizer.json
    <cache>/tokens/<key>/meta.json             {"dtype": "uint16", "vocab_size": 4096, "tokenizer_hash": "3c0f...",
                                                "validation_hash": "8866...", "validation_bytes": 467598,
                                                "train": {"documents": 688, "tokens": 3128587, "bytes": 10855127},
                                                "validation": {...}, "spec": {...}, "files": {...}, "checksum": "..."}
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foundry_jax.data.cache import Entry, cache_root, open_or_build
from foundry_jax.data.chat import Chat
from foundry_jax.data.sources import SOURCES
from foundry_jax.data.sources.bin import DTYPES, TokenFiles, open_tokens
from foundry_jax.data.sources.chat import ChatFiles, SpelledChats
from foundry_jax.data.sources.text import TextFiles
from foundry_jax.data.split import Texts, split
from foundry_jax.data.tokenize import TOKENIZERS, Tokenizer, batched, load_tokenizer
from foundry_jax.errors import UserError
from foundry_jax.registry import lookup

if TYPE_CHECKING:  # config.py imports the model's config, and data depends on neither
    from foundry_jax.config import DataConfig

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same spec would give other tokens
BATCH_CHARACTERS = 1 << 22  # encoded at a time: enough to keep every core busy

Source = TextFiles | SpelledChats


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens for training and validation, and what is needed to measure a loss on them.

    train_tokens, validation_tokens: [number of tokens] uint16 or uint32, memory-mapped.
    tokenizer: None for token files that came without one.
    validation_hash: sha256 of the validation text, whatever the tokenizer; of val.bin for token files.
    validation_bytes: UTF-8 bytes of the predicted validation tokens, all but the first; None if unknown. The loss
        in nats, summed over the whole validation stream, is divided by this (and by log 2) for bits per byte.
    """

    name: str
    train_tokens: np.memmap
    validation_tokens: np.memmap
    tokenizer: Tokenizer | None
    vocab_size: int
    validation_hash: str
    validation_bytes: int | None

    @property
    def description(self) -> str:
        """One line for the log."""
        return (
            f"{self.name}: {len(self.train_tokens):,} training and {len(self.validation_tokens):,} validation tokens, "
            f"vocabulary {self.vocab_size:,}, validation text {self.validation_hash[:12]}"
        )


def prepare(config: DataConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Returns the corpus a DataConfig describes; the first call writes it to the token cache, later ones map it.

    Args:
        tokenizer: the model's own, if it has one already; config.tokenizer_path overrules it.

    Raises:
        UserError: unknown source or tokenizer, data that is missing, empty or unreadable, a tokenizer that does not
            belong to the tokens, or a cache that cannot be written.
    """
    source = lookup(SOURCES, config.source, "data.source")(config.path)
    kind = lookup(TOKENIZERS, config.tokenizer, "data.tokenizer")
    tokenizer = load_tokenizer(config.tokenizer_path) if config.tokenizer_path else tokenizer
    if isinstance(source, ChatFiles):
        source = source.spelled_by(_chat(tokenizer, config))
    if isinstance(source, TokenFiles):
        corpus = _from_tokens(source, config, tokenizer)
    else:
        corpus = _from_text(source, config, kind, tokenizer)
    log.info("%s.", corpus.description)
    return corpus


def _chat(tokenizer: Tokenizer | None, config: DataConfig) -> Chat:
    """Returns the chat that a tokenizer brings."""
    if tokenizer is None:
        raise UserError(
            "data.source=chat needs the tokenizer of a chat model: set init.source to one such as smollm2-135m, or "
            "data.tokenizer_path to a folder with its tokenizer.json and tokenizer_config.json."
        )
    return Chat.of(tokenizer, config.tokenizer_path or "The tokenizer")


def _from_text(source: Source, config: DataConfig, kind: type[Tokenizer], tokenizer: Tokenizer | None) -> Corpus:
    spec = {
        "format": FORMAT,
        "source": source.fingerprint(),
        "tokenizer": tokenizer.hash if tokenizer else kind.spec(config.vocab_size),
        "split": config.split,
        "validation_fraction": config.validation_fraction,
    }
    entry = open_or_build(cache_root(config.cache_dir), spec, partial(_tokenize, source, config, kind, tokenizer))
    tokens = TokenFiles(entry.folder, entry.facts["dtype"], entry.facts["vocab_size"], entry.facts["tokenizer_hash"])
    return _corpus(source.name, tokens, tokenizer or load_tokenizer(entry.folder), entry)


def _tokenize(
    source: Source, config: DataConfig, kind: type[Tokenizer], tokenizer: Tokenizer | None, folder: Path
) -> dict[str, Any]:
    """Writes train.bin, val.bin and tokenizer.json to a folder of the cache and returns the facts about them."""
    if skipped := source.undecodable():
        log.warning("%d of %d files are not UTF-8 and left out: %s.", len(skipped), len(source.paths), skipped[:5])
    is_chat = isinstance(source, SpelledChats)
    how = "last" if is_chat and config.split == "tail" else config.split  # conversations stay whole
    train, validation = split(source, how, config.validation_fraction)
    known = tokenizer is not None
    if not known:
        tokenizer = kind.for_corpus(train, validation, config.vocab_size)
    codec = source.chat if is_chat else tokenizer
    if known:
        _warn_if_lossy(codec, validation)
    tokenizer.save(folder / "tokenizer.json")
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    counts = {
        "train": _write_tokens(folder / "train.bin", train, codec, dtype),
        "validation": _write_tokens(folder / "val.bin", validation, codec, dtype),
    }
    return {
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_hash": tokenizer.hash,
        "validation_hash": _hash_texts(validation),
        "validation_bytes": counts["validation"]["bytes"] - _first_bytes(folder / "val.bin", dtype, tokenizer),
        **counts,
    }


def _write_tokens(path: Path, texts: Texts, codec: Tokenizer | Chat, dtype: str) -> dict[str, int]:
    """Writes the stream of some texts and returns their number, and the number of tokens and of UTF-8 bytes."""
    separator = [] if codec.separator_id is None else [codec.separator_id]
    separator = np.array(separator, DTYPES[dtype])
    documents = tokens = num_bytes = 0
    with open(path, "wb") as file:
        for batch in batched(texts, BATCH_CHARACTERS):
            for text, ids in zip(batch, codec.encode_batch(batch), strict=True):
                file.write(separator.tobytes() + ids.astype(DTYPES[dtype]).tobytes())
                documents += 1
                tokens += len(separator) + len(ids)
                num_bytes += codec.num_bytes(text)
    return {"documents": documents, "tokens": tokens, "bytes": num_bytes}


def _hash_texts(texts: Iterable[str]) -> str:
    """Returns the sha256 of some texts in UTF-8, each after its length in 8 bytes, so that borders count too."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _first_bytes(path: Path, dtype: str, tokenizer: Tokenizer) -> int:
    """Returns the bytes of the one token of a stream that nobody predicts, the first: none if it is a separator."""
    if tokenizer.separator_id is not None:
        return 0
    return int(tokenizer.token_bytes[open_tokens(path, dtype)[0]])


def _warn_if_lossy(codec: Tokenizer | Chat, texts: Texts) -> None:
    lossy = total = 0
    for batch in batched(texts, BATCH_CHARACTERS):
        for text, ids in zip(batch, codec.encode_batch(batch), strict=True):
            lossy += codec.decode(ids) != text
            total += 1
    if lossy:
        log.warning(
            "The tokenizer does not reproduce %d of %d validation texts: bits per byte will be too low.", lossy, total
        )


def _from_tokens(source: TokenFiles, config: DataConfig, tokenizer: Tokenizer | None) -> Corpus:
    if tokenizer is None and (source.folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(source.folder)
    if tokenizer and source.tokenizer_hash not in (None, tokenizer.hash):
        raise UserError(
            f"The tokens in {source.folder} were made with tokenizer {source.tokenizer_hash}, not with this one, "
            f"{tokenizer.hash}; set data.tokenizer_path to the one they were made with."
        )
    spec = {
        "format": FORMAT,
        "tokens": source.fingerprint(),
        "dtype": source.dtype,
        "tokenizer": tokenizer.hash if tokenizer else None,
    }
    entry = open_or_build(cache_root(config.cache_dir), spec, lambda folder: _scan(source, tokenizer))
    vocab_size = source.vocab_size or (tokenizer.vocab_size if tokenizer else config.vocab_size)
    if entry.facts["max_id"] >= vocab_size:
        raise UserError(
            f"{source.folder} holds token id {entry.facts['max_id']}, but the vocabulary ends at {vocab_size - 1}; "
            f"set data.vocab_size to {entry.facts['max_id'] + 1} or more, or use the tokenizer they were made with."
        )
    tokens = dataclasses.replace(source, vocab_size=vocab_size)
    return _corpus(source.name, tokens, tokenizer, entry)


def _scan(source: TokenFiles, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns the facts about token files that take reading all of them, so that this is done once."""
    facts = source.scan()
    sizes = tokenizer.token_bytes if tokenizer else None
    if sizes is None or facts["max_id"] >= len(sizes):
        return {**facts, "validation_bytes": None}
    tokens = open_tokens(source.validation, source.dtype)[1:]
    counts = np.bincount(tokens, minlength=len(sizes))
    return {**facts, "validation_bytes": int(counts @ sizes)}


def _corpus(name: str, tokens: TokenFiles, tokenizer: Tokenizer | None, entry: Entry) -> Corpus:
    return Corpus(
        name=name,
        train_tokens=open_tokens(tokens.train, tokens.dtype),
        validation_tokens=open_tokens(tokens.validation, tokens.dtype),
        tokenizer=tokenizer,
        vocab_size=tokens.vocab_size,
        validation_hash=entry.facts["validation_hash"],
        validation_bytes=entry.facts["validation_bytes"],
    )
